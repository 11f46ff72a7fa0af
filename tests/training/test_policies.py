"""Above all the traps of several peft adapters on one model: what is trainable, and when, fails without an error."""

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from astrolabe_diffusers.training.adapter_files import save_adapter
from astrolabe_diffusers.training.policies import (
    CURRENT,
    OLD,
    add_policies,
    block_linear_names,
    ema_decay,
    follow_current,
    load_policies,
    policy_parameters,
    use_policy,
)
from tests.layouts.test_lora_modules import additions, difference_key, distilled, merged, output
from tests.tiny_pipeline import tiny_pipeline, tiny_transformer
from tests.training.helpers import randomize_adapters


@pytest.fixture(params=[(), ("all-linear",)], ids=["blocks", "all-linear"])
def transformer(request):
    model = tiny_transformer()
    torch.manual_seed(0)
    add_policies(model, rank=4, lora_alpha=8, target_modules=request.param)
    return model


def forward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 3, 4, 4, generator=generator)
    text = torch.randn(2, 5, 32, generator=generator)
    return model(latents, torch.tensor([625.0, 1000.0]), text, return_dict=False)[0]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def current_names(model):
    return {name for name, _ in model.named_parameters() if ".default." in name}


def test_lora_is_on_every_linear_of_the_blocks_and_nowhere_else():
    model = tiny_transformer()
    linears = {name for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)}
    add_policies(model, rank=2, lora_alpha=2)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A.default" in name}
    assert adapted == {f"blocks.{name}" for name in linears}
    assert len(adapted) == 2 * 10  # two blocks of 4 + 4 + 2


def test_target_modules_can_be_chosen():
    model = tiny_transformer()
    assert {"attn1.to_q", "attn2.to_out.0", "ffn.net.2"} < set(block_linear_names(model))
    add_policies(model, rank=2, lora_alpha=2, target_modules=["attn1.to_q"])
    assert len(policy_parameters(model)) == 2 * 2


def test_all_linear_layers():
    model = tiny_transformer()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    add_policies(model, rank=2, lora_alpha=2, target_modules=["all-linear", "patch_embedding"])
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A.default" in name}
    assert adapted == linears | {"patch_embedding"} and len(linears) == 2 * 10 + 6


@pytest.mark.parametrize("name, near", [("head.head", ";"), ("to_q.weight", ";"), ("proj_ou", r" \(did you")])
def test_a_target_module_that_there_is_none_of(name, near):
    """Also beside others, where peft would pass over it."""
    line = f"^no module is called '{name}'{near}.* target modules can be all-linear, attn1.to_k, .*, proj_out.$"
    with pytest.raises(ValueError, match=line):
        add_policies(tiny_transformer(), rank=2, lora_alpha=2, target_modules=["to_q", name])


def saved_lora(folder, rank=3, alpha=6, modules=("attn1.to_q", "ffn.net.2")):
    """A random LoRA as `save_lora_weights` writes it, and what the pipeline generates with it."""
    pipe = tiny_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules)))
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    with torch.no_grad():
        return forward(pipe.transformer)


def test_a_lora_as_the_start(tmp_path):
    expected = saved_lora(tmp_path)
    pipe = tiny_pipeline()
    with torch.no_grad():
        base = forward(pipe.transformer)
    load_policies(pipe, tmp_path)
    outputs = {}
    for policy in ("current", "old", "reference"):
        with use_policy(pipe.transformer, policy):
            outputs[policy] = forward(pipe.transformer)
    assert (outputs["current"] - expected).abs().max() < 1e-5 and torch.equal(outputs["old"], outputs["current"])
    assert torch.equal(outputs["reference"], base) and (base - expected).abs().max() > 0.01
    configs = pipe.transformer.peft_config
    assert all((config.r, config.lora_alpha) == (3, 6) for config in configs.values()) and len(configs) == 2
    # Two layers, each with A and B, in two blocks.
    assert trainable(pipe.transformer) == current_names(pipe.transformer) and len(trainable(pipe.transformer)) == 8


def lora_of_another_trainer(folder):
    """Ranks and alphas of single modules, a bias and a whole difference of the patch embedding; the file, and what the
    transformer with them predicts."""
    path, lora, _ = distilled(folder)
    whole = {name: tensor for name, tensor in additions().items() if "norm" not in name and "modulation" not in name}
    norms = {difference_key(name) for name in additions().keys() - whole.keys()}
    tensors = {name: x for name, x in load_file(path).items() if name.removeprefix("diffusion_model.") not in norms}
    save_file(tensors, folder / "start.safetensors")
    return folder / "start.safetensors", merged(lora, additions=whole)


def test_a_lora_of_another_trainer_as_the_start(tmp_path):
    """All policies have what is special of it, and what is saved has it too."""
    path, expected = lora_of_another_trainer(tmp_path)
    pipe = tiny_pipeline()
    base = output(pipe.transformer)
    load_policies(pipe, path, ("old", "reference"))
    outputs = {}
    for policy in ("current", "old", "reference", "base"):
        with use_policy(pipe.transformer, policy):
            outputs[policy] = output(pipe.transformer)
    assert (outputs["current"] - expected).abs().max() < 1e-5 and torch.equal(outputs["old"], outputs["current"])
    assert torch.equal(outputs["reference"], base) and torch.equal(outputs["base"], base)
    save_adapter(pipe.transformer, tmp_path / "saved")
    again = tiny_pipeline()
    again.load_lora_weights(tmp_path / "saved")
    assert (output(again.transformer) - expected).abs().max() < 1e-5


def test_loras_that_cannot_be_trained_on(tmp_path):
    with pytest.raises(ValueError, match="adds to norms or modulation.*fuse_lora"):
        load_policies(tiny_pipeline(), distilled(tmp_path)[0])
    pipe = tiny_pipeline()
    pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q"], use_dora=True))
    pipe.transformer.save_lora_adapter(tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA cannot be trained on"):
        load_policies(tiny_pipeline(), tmp_path / "dora")


def test_all_policies_coincide_at_first(transformer):
    base = forward(tiny_transformer())
    for policy in ("current", "old", "reference"):
        with use_policy(transformer, policy):
            torch.testing.assert_close(forward(transformer), base, rtol=0, atol=1e-6)
    pairs = zip(policy_parameters(transformer), policy_parameters(transformer, OLD), strict=True)
    assert all(torch.equal(current, old) for current, old in pairs)


def test_a_lora_starts_as_peft_s_own_does():
    """A is uniform in +-1 / sqrt(in), so its standard deviation is 1 / sqrt(3 in), whatever the rank; B is zero."""
    model = tiny_transformer(ffn_dim=96)
    torch.manual_seed(0)
    add_policies(model, rank=256, lora_alpha=256)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            assert 0.99 * bound < parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.03 * bound, name
        elif ".lora_B." in name:
            assert not parameter.any(), name
    assert {p.shape[1] for n, p in model.named_parameters() if ".lora_A." in n} == {24, 96}


def test_policies_differ_once_their_weights_do(transformer):
    randomize_adapters(transformer)
    outputs = []
    for policy in ("current", "old", "reference"):
        with use_policy(transformer, policy):
            outputs.append(forward(transformer))
    torch.testing.assert_close(outputs[0], forward(transformer).detach())
    torch.testing.assert_close(outputs[2], forward(tiny_transformer()), rtol=0, atol=1e-6)
    assert min((a - b).abs().max() for a, b in ((outputs[0], outputs[1]), (outputs[1], outputs[2]))) > 1e-2


def test_only_the_current_policy_is_trainable(transformer):
    assert trainable(transformer) == current_names(transformer) != set()
    assert {id(p) for p in policy_parameters(transformer)} == {
        id(p) for p in transformer.parameters() if p.requires_grad
    }


@pytest.mark.parametrize("policy", ["current", "old", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_use_policy_restores_the_current_one(transformer, policy, training):
    randomize_adapters(transformer)
    expected = forward(transformer).detach()
    transformer.train(training)
    with use_policy(transformer, policy):
        assert not transformer.training and not torch.is_grad_enabled()
    assert transformer.training == training and torch.is_grad_enabled()
    assert trainable(transformer) == current_names(transformer)
    torch.testing.assert_close(forward(transformer), expected)


@pytest.mark.parametrize("policy", ["old", "reference"])
def test_use_policy_restores_after_an_error(transformer, policy):
    with pytest.raises(RuntimeError, match="inside"), use_policy(transformer, policy):
        raise RuntimeError("inside")
    assert trainable(transformer) == current_names(transformer)
    assert transformer.active_adapters() == ["default"]


def test_unknown_policy(transformer):
    with pytest.raises(ValueError, match="current.*old.*reference"), use_policy(transformer, "new"):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_current_policy_only(transformer, checkpointing):
    randomize_adapters(transformer)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    for policy in ("reference", "old"):
        with use_policy(transformer, policy):
            forward(transformer)
    forward(transformer).square().mean().backward()
    with_gradient = {n for n, p in transformer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient == current_names(transformer)


def test_old_policy_is_blended_pairwise(transformer):
    randomize_adapters(transformer)
    old = [p.clone() for p in policy_parameters(transformer, OLD)]
    current = [p.clone() for p in policy_parameters(transformer)]
    follow_current(transformer, "old", 0.75)
    for before, now, target in zip(old, policy_parameters(transformer, OLD), current, strict=True):
        torch.testing.assert_close(now, 0.75 * before + 0.25 * target)
    assert all(map(torch.equal, policy_parameters(transformer), current))
    follow_current(transformer, "old", 0.0)
    assert all(map(torch.equal, policy_parameters(transformer, OLD), current))
    assert trainable(transformer) == current_names(transformer)


def test_the_average_warms_up():
    # 1/10, 2/11, 11/20, 81/90; from then on the given one.
    expected = [0.1, 2 / 11, 0.55, 0.9, 0.9]
    assert [ema_decay(step, 0.9) for step in (0, 1, 10, 80, 500)] == pytest.approx(expected)
    assert ema_decay(10**6, 0.5) == 0.5 and ema_decay(3, 0.5) == pytest.approx(4 / 13)


def test_lora_is_float32_on_a_bfloat16_base():
    model = tiny_transformer().to(torch.bfloat16)
    add_policies(model, rank=4, lora_alpha=4)
    for adapter in ("default", OLD):
        assert {p.dtype for p in policy_parameters(model, adapter)} == {torch.float32}
    assert model.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16


def test_optimizer_made_for_the_current_policy_moves_nothing_else(transformer):
    randomize_adapters(transformer)
    before = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    transformer.set_adapter(CURRENT)
    optimizer = torch.optim.AdamW(policy_parameters(transformer), lr=0.1, weight_decay=0.1)
    forward(transformer).square().mean().backward()
    optimizer.step()
    moved = {name for name, parameter in transformer.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == current_names(transformer)

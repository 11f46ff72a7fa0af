from collections import Counter

import pytest
import torch

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.rollout.samples import epoch_samples
from astrolabe_diffusers.rollout.sampling import Sampler
from astrolabe_diffusers.rollout.scoring import decode_videos
from astrolabe_diffusers.training import NFTConfig, NFTTrainer
from astrolabe_diffusers.training.adapter_files import save_adapter
from astrolabe_diffusers.training.awm import AWMTrainer
from astrolabe_diffusers.training.cm_grpo import CMGRPOTrainer
from astrolabe_diffusers.training.forward_process.predictors import BlockwisePredictor
from astrolabe_diffusers.training.policies import use_policy
from tests.tiny_pipeline import tiny_pipeline
from tests.training.helpers import BRIGHTNESS, numbers_of_run, randomize_adapters, tiny_arguments, tiny_settings


pytestmark = pytest.mark.usefixtures("no_charts")


@pytest.fixture(scope="module")
def trainer(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    sizes = dict(batches_per_epoch=4, gradient_accumulation_steps=2, max_train_steps=20)
    arguments = tiny_arguments(model_folder, folder, **sizes, eval_seeds=2, eval_num_frames=21)
    trainer = NFTTrainer(config=parse_args(arguments))
    randomize_adapters(trainer.transformer)
    trainer.start()
    yield trainer
    trainer.rewards.close()
    trainer.accelerator.end_training()


def latents_of(trainer, policy, samples):
    with use_policy(trainer.transformer, policy):
        embeds = trainer.rollouts.encoder(sample.prompt.text for sample in samples)
        return Sampler(trainer.pipeline, trainer.size)(embeds, samples)[0]


def test_old_policy_makes_the_samples(trainer):
    samples = trainer.held_out.samples[:4]
    batches = trainer.rollout(samples)
    expected = latents_of(trainer, "old", samples)
    torch.testing.assert_close(batches[0].latents, expected)
    for policy in ("current", "reference"):
        assert (latents_of(trainer, policy, samples) - expected).abs().max() > 1e-2


def test_current_policy_is_evaluated(trainer):
    trainer.evaluate()
    videos = decode_videos(trainer.pipeline.vae, latents_of(trainer, "current", trainer.held_out.samples))
    scores = trainer.report.evaluations[-1].scores["reward"]
    assert scores == pytest.approx(videos.mean(dim=(1, 2, 3, 4)).tolist(), abs=1e-5)


@pytest.mark.parametrize("merge", [True, False])
def test_rollouts_are_of_merged_weights_and_what_is_compared_is_not(model_folder, tmp_path, monkeypatch, merge):
    trainer = NFTTrainer(config=parse_args(tiny_arguments(model_folder, tmp_path, merge_lora=merge)))
    randomize_adapters(trainer.transformer)
    layer, seen = trainer.transformer.blocks[0].attn1.to_q, {}
    own = layer.base_layer.weight.clone()

    def weights_are():
        if not torch.equal(layer.base_layer.weight, own):
            return "merged" if layer.disable_adapters else "merged, and the LoRA beside it"
        return "the base's" if layer.disable_adapters else "unmerged"

    def watched(stage):
        method, passes = getattr(trainer, stage), seen.setdefault(stage, set())

        def run(*args):
            with layer.register_forward_pre_hook(lambda *_: passes.add(weights_are())):
                return method(*args)

        return run

    for stage in ("rollout", "evaluate", "update"):
        monkeypatch.setattr(trainer, stage, watched(stage))
    trainer.train()
    assert seen == {
        "rollout": {"merged" if merge else "unmerged"},
        "evaluate": {"unmerged"},
        "update": {"unmerged", "the base's"},
    }


def test_only_the_current_policy_is_given_to_the_optimizer(trainer):
    names = {id(parameter): name for name, parameter in trainer.transformer.named_parameters()}
    optimized = {names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {name for name in names.values() if ".default." in name}


def test_intervals_count_steps_and_end_with_the_run(trainer):
    due = []
    for trainer.step in range(2, 21, 2):  # two steps an epoch
        due.append(trainer.is_due(5))
    trainer.step = 0
    # 5 falls into 5-6, 10 into 9-10, 15 into 15-16, 20 into 19-20
    assert due == [False, False, True, False, True, False, False, True, False, True]


def test_old_policy_decay_follows_the_steps(trainer):
    decays = []
    for trainer.step in (0, 100, 500, 9000):
        decays.append(trainer.old_policy_decay)
    trainer.step = 0
    assert decays == pytest.approx([0, 0.1, 0.5, 0.5])


def test_old_policy_that_follows_at_once_needs_no_pass_in_the_first_step(model_folder, tmp_path, monkeypatch):
    predict_as = BlockwisePredictor.predict_as

    def run(name, **values):
        policies = []

        def counted(predictor, policy, frames):
            policies.append(policy)
            return predict_as(predictor, policy, frames)

        steps = {"batches_per_epoch": 2, "gradient_accumulation_steps": 1, "max_train_steps": 4}
        steps["blocks_per_pass"] = 2
        config = parse_args(tiny_arguments(model_folder, tmp_path / name, **steps, **values))
        with monkeypatch.context() as patch:
            patch.setattr(BlockwisePredictor, "predict_as", counted)
            NFTTrainer(config=config).train()
        return policies.count("old"), numbers_of_run(tmp_path / name)["pytorch_lora_weights.safetensors"]

    passes, weights = run("skipped", old_policy_decay_max=0)
    with_dropout, _ = run("dropout", old_policy_decay_max=0, lora_dropout=0.1)
    monkeypatch.setattr(NFTTrainer, "old_is_current", False)
    all_passes, expected = run("all", old_policy_decay_rate=0)
    assert weights == expected
    assert (passes, with_dropout, all_passes) == (2, 4, 4)  # both blocks in one, four steps


BOTH = f"{BRIGHTNESS}=1,tests.training.rewards:contrast=0"


@pytest.mark.parametrize(
    ("trainer_class", "values", "others", "passes"),
    [
        # Two batches, each a pass over the clean block that is seen, and one for each policy over both noisy ones.
        (NFTTrainer, {}, None, {"default": 2, "old": 4, "base": 2}),
        (NFTTrainer, {"kl_weight": 0.0}, None, {"default": 2, "old": 4}),
        # Each policy has its own context.
        (NFTTrainer, {"context_policy": "own"}, None, {"default": 4, "old": 4, "base": 4}),
        (NFTTrainer, {"context_policy": "own", "kl_weight": 0.0}, None, {"default": 4, "old": 4}),
        # The reference moves, and is an adapter.
        (NFTTrainer, {"reference_reset_kl": 9.0}, None, {"default": 2, "old": 4, "reference": 2}),
        (NFTTrainer, {"reference_reset_kl": 9.0, "kl_weight": 0.0}, None, {"default": 2, "old": 4}),
        # Held is the last sample, which is of the second batch; and none, for both rewards agree.
        (NFTTrainer, {"selective_kl": True, "rewards": BOTH}, -1.0, {"default": 2, "old": 4, "base": 1}),
        (NFTTrainer, {"selective_kl": True, "rewards": BOTH}, 1.0, {"default": 2, "old": 4}),
        (AWMTrainer, {}, None, {"default": 4, "base": 2}),
        (AWMTrainer, {"kl_weight": 0.0}, None, {"default": 4}),
        (CMGRPOTrainer, {"kl_weight": 0.1}, None, {"default": 2, "base": 2}),
        (CMGRPOTrainer, {}, None, {"default": 2}),
    ],
)
def test_the_reference_has_no_pass_without_samples_that_are_held_to_it(
    trainer_class, values, others, passes, model_folder, tmp_path
):
    settings = tiny_settings(model_folder, tmp_path, batches_per_epoch=2, blocks_per_pass=2, **values)
    trainer = trainer_class(config=trainer_class.config_class(**settings))
    trainer.start()
    samples = epoch_samples(trainer.prompts, num_groups=2, group_size=4, epoch=0, seed=0)
    batches = trainer.rollout(samples)
    rewards = torch.arange(8.0)
    scores = {"reward": rewards, BRIGHTNESS: rewards}
    if others is not None:
        scores["tests.training.rewards:contrast"] = others * rewards
    layer, counts = trainer.transformer.blocks[0].attn1.to_q, Counter()
    trainer.transformer.register_forward_pre_hook(
        lambda *_: counts.update(["base" if layer.disable_adapters else layer.active_adapter[0]])
    )
    advantages = trainer.advantages(scores, samples)
    trainer.update(batches, advantages, trainer.sample_values(scores, advantages))
    trainer.end()
    assert counts == passes


def test_a_run_that_starts_from_a_lora(model_folder, trainer, tmp_path, tmp_path_factory):
    """It begins where the LoRA was, and writes one with the same rank and alpha."""
    first = tmp_path_factory.mktemp("first")
    save_adapter(trainer.transformer, first, "default")
    sizes = dict(max_train_steps=1, eval_seeds=2, eval_num_frames=21, rank=2)
    arguments = tiny_arguments(model_folder, tmp_path, **sizes, init_lora=first)
    again = NFTTrainer(config=parse_args(arguments))
    again.train()
    again.rewards.close()
    trainer.evaluate()
    before = trainer.report.evaluations[-1].scores["reward"]
    assert again.report.evaluations[0].scores["reward"] == pytest.approx(before, abs=1e-5)
    config, written = trainer.transformer.peft_config["default"], again.transformer.peft_config["default"]
    assert (written.r, written.lora_alpha) == (config.r, config.lora_alpha) and config.r != 2


@pytest.mark.parametrize("given", [False, True])
def test_dtype_of_the_decoder(given, model_folder, tmp_path):
    """Of a pipeline that is loaded, and of one in Python."""
    arguments = dict(train_batch_size=2, batches_per_epoch=1, samples_per_prompt=2, num_eval_prompts=1, rank=2)
    config = NFTConfig(
        model=str(model_folder),
        output_dir=str(tmp_path / "run"),
        vae_dtype="bfloat16",
        rewards={"sharpness": 1.0},
        **arguments,
    )
    trainer = NFTTrainer(tiny_pipeline() if given else None, config, train_prompts=["a", "b"])
    assert trainer.pipeline.vae.dtype == torch.bfloat16 and trainer.transformer.dtype == torch.float32
    trainer.end()

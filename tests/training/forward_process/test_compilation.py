"""Which runs compile the blocks of the transformer, on a GPU and elsewhere."""

import pytest
import torch

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.models.attention_causal_wan import CausalWanSelfAttnProcessor
from astrolabe_diffusers.training.awm import AWMConfig
from astrolabe_diffusers.training.cm_grpo import CMGRPOConfig
from astrolabe_diffusers.training.forward_process import compilation
from astrolabe_diffusers.training.forward_process.compilation import compiler_works, compiles_blocks
from astrolabe_diffusers.training.nft import NFTConfig
from tests.own_transformer import OwnTransformer
from tests.tiny_pipeline import tiny_transformer
from tests.two_experts import two_expert_pipeline


CUDA, CPU = torch.device("cuda"), torch.device("cpu")
WINDOW = {"window_size": 21, "sample_frames": 42}


class OwnProcessor(CausalWanSelfAttnProcessor):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def with_own_processor():
    transformer = tiny_transformer()
    transformer.blocks[0].attn1.set_processor(OwnProcessor())
    return transformer


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """What is asked whether torch.compile works."""
    asked = []
    monkeypatch.setattr(compilation, "compiler_works", lambda device: asked.append(device) or True)
    return asked


def decide(config=NFTConfig, transformer=None, num_frames=21, device=CUDA, **settings):
    """Of 81 frames of video, seven blocks, in batches of one unless it is said."""
    config = config(**{"train_batch_size": 1} | settings)
    return compiles_blocks(config, transformer or tiny_transformer(), num_frames, device)


@pytest.mark.parametrize("config", [NFTConfig, AWMConfig, CMGRPOConfig])
@pytest.mark.parametrize("context", ["clean", "clean_grad"])
def test_a_clip_of_one_pass(config, context):
    assert decide(config, context=context)
    assert not decide(config, context=context, device=CPU)


@pytest.mark.parametrize(
    "settings",
    [
        {"context": "noisy"},
        {"context": "noisy", "num_frames": 60},
        {"context_policy": "own"},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": "full"},
        {"kl_weight": 0},
        {"train_batch_size": 4},
        {"train_batch_size": 4, "num_frames": 24},
        {"ema_decay": 0.9, "reference_reset_kl": 0.15},
        {"blocks_per_pass": 8},
        {"blocks_per_pass": 1},
        {"blocks_per_pass": 1, "num_frames": 24},
    ],
)
def test_what_changes_nothing(settings, compiler):
    num_frames = settings.pop("num_frames", 21)
    assert decide(num_frames=num_frames, **settings) and compiler == [CUDA]
    assert not decide(num_frames=num_frames, device=CPU, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_frames": 24},
        {"train_batch_size": 2},
        {"blocks_per_pass": 6},
        WINDOW,
        {**WINDOW, "blocks_per_pass": 1},
        {**WINDOW, "context": "clean_grad"},
        {**WINDOW, "transitions": ["roll"]},
    ],
)
def test_several_passes_and_windows(settings, compiler):
    num_frames = settings.pop("num_frames", 21)
    # A compiler is not looked for where it is not used.
    assert not decide(num_frames=num_frames, **settings) and not compiler


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: two_expert_pipeline().denoiser, True),
        (lambda: tiny_transformer(sink_size=3, local_attn_size=12, sink_ema=0.9), True),
        (lambda: tiny_transformer(sink_size=3, local_attn_size=12, memory_bank_size=3), False),
        (with_own_processor, False),
        (OwnTransformer, False),
    ],
)
def test_transformers(make, expected):
    assert decide(transformer=make()) == expected
    assert decide(transformer=make(), compile=True) and not decide(transformer=make(), compile=False)


def test_a_model_in_shards(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not decide()
    assert decide(compile=True)


@pytest.mark.parametrize("algorithm", ["nft", "awm", "cm_grpo"])
def test_the_quick_start_would_wait_for_it(algorithm):
    assert parse_args(["--algorithm", algorithm, "--config", "tiny_shapes"]).compile is False
    assert parse_args(["--algorithm", algorithm, "--config", "tiny_shapes", "--compile"]).compile
    assert parse_args(["--algorithm", algorithm]).compile is None


@pytest.mark.parametrize("device", [CUDA, CPU])
def test_what_is_said_goes_before(device, compiler):
    assert decide(compile=True, device=device) and not decide(compile=False, device=device)
    assert decide(compile=True, device=device, blocks_per_pass=1, **WINDOW)
    for settings in ({"blocks_per_pass": 6}, {"train_batch_size": 2}, WINDOW):
        with pytest.raises(
            UserError, match="^compile needs blocks_per_pass=1 where a video is trained in a window or"
        ):
            decide(compile=True, device=device, **settings)
    with pytest.raises(UserError, match="^compile needs context=clean and blocks_per_pass=1 where a window"):
        decide(compile=True, device=device, context="clean_grad", **WINDOW)
    assert not compiler


def test_a_machine_without_a_compiler(caplog):
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert not compiler_works(CPU)
    message = caplog.messages[-1]
    assert message.startswith("blocks are not compiled, for torch.compile fails: ") and "no-such-compiler" in message
    assert "\n" not in message


def test_no_compiler_no_compiled_blocks(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_works", lambda device: False)
    assert not decide()
    assert decide(compile=True)  # where it fails, it says why

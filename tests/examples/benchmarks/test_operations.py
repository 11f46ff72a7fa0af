"""The operations that the floor is made of, against torch's own counter."""

import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from astrolabe_diffusers.models import attention
from astrolabe_diffusers.training.checkpointing import CHECKPOINTING
from astrolabe_diffusers.training.nft.trainer import accumulate_gradients
from tests.tiny_pipeline import tiny_pipeline
from tests.training import helpers


WINDOW = {"num_frames_per_block": 1, "local_attn_size": 3, "sink_size": 1}
CONTEXT = {"num_frames_per_block": 3, "num_context_frames": 3, "sigmas": [1.0, 0.5, 0.0]}


@pytest.mark.parametrize(
    "config",
    [{"num_frames_per_block": 1}, WINDOW, {**WINDOW, "first_block_sigmas": [1.0], "rope_mode": "relative"}, CONTEXT],
)
def test_denoising(config, monkeypatch):
    """Of the yardstick's passes, for they do not change; torch counts no kernel of a CPU but the plain one."""
    from operations import denoising, transformer_pass
    from published_way import PublishedTransformer, PublishedWay

    pipe = tiny_pipeline(**config)
    passes, run = [], PublishedTransformer.__call__

    def counted(*args):
        with FlopCounterMode(display=False) as counter:
            flow = run(*args)
        passes.append(counter.get_total_flops())
        return flow

    monkeypatch.setattr(PublishedTransformer, "__call__", counted)
    num_frames = pipe.round_num_frames(33)
    text = pipe.encode_prompt(["a red circle", "a blue cross"])
    for _ in PublishedWay(pipe, SDPBackend.MATH).blocks(text, num_frames, 32, 48):
        pass

    # What is left out: the layers of the text and of the time, and once the keys and values of the text.
    n, dim = config["num_frames_per_block"], 24
    of_text, of_time = 2 * 16 * (32 * dim + dim * dim), 2 * n * (32 * dim + dim * dim + dim * 6 * dim)
    expected = sum(passes) - len(passes) * 2 * (of_text + of_time) - 2 * (2 * 2 * 2 * 16 * dim * dim)
    work = denoising(pipe, 2, num_frames, 32, 48)
    assert len(work) == 9 // n
    found = sum(block.operations for block in work)
    if "num_context_frames" not in config:  # the last block is written, too
        found += transformer_pass(pipe.transformer.config, 2, n, 6, 3 if "sink_size" in config else 9, 16).operations
    assert found == expected


@pytest.mark.parametrize("window", [-1, 4])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_gradient(checkpointing, window, monkeypatch):
    """Of our passes, by what three more blocks add: the text's and the time's layers are the same for both clips."""
    from operations import AttentionGradient, Linear, gradient

    monkeypatch.setattr(attention, "_KERNELS", [SDPBackend.MATH])
    rank, batch_size, frame_tokens, dim, patch = 4, 2, 4, 24, 16
    pipe = helpers.policy_pipeline(rank=rank, num_frames_per_block=1, local_attn_size=window)
    if checkpointing == "full":
        pipe.transformer.enable_gradient_checkpointing(CHECKPOINTING["full"])
    accelerator, counted, found = Accelerator(mixed_precision="no"), [], []
    for num_latents in (3, 6):
        batch = helpers.noised_batch(pipe, batch_size, num_latents)
        with FlopCounterMode(display=False) as counter:
            accumulate_gradients(accelerator, pipe.transformer, batch, helpers.config(), batch_size, True)
        counted.append(counter.get_total_flops())
        work = gradient(pipe, batch_size, 4 * num_latents - 3, 32, 32, rank, checkpointing, num_frozen=2)
        # The plain kernel keeps its scores.
        again = sum(n * kernel.operations // 5 for kernel, n in work.items() if isinstance(kernel, AttentionGradient))
        # The old policy is not merged; of the first block no gradient of what goes into Q, K and V is wanted, but of
        # what goes into the last layer.
        rows, clean_rows = (batch_size * frames * frame_tokens for frames in (num_latents, num_latents - 1))
        layers = {Linear(1, dim, dim): 6, Linear(1, dim, 32): 1, Linear(1, 32, dim): 1}
        lora = sum(2 * n * rank * (layer.inputs + layer.outputs) for layer, n in layers.items())
        of_old = 2 * rows * lora + clean_rows * (lora + 2 * 2 * rank * 2 * dim)
        of_first, of_last = 3 * 2 * rows * (dim * dim + dim * rank), 2 * rows * dim * patch
        found.append(work.operations - again + of_old - of_first + of_last)
    assert found[1] - found[0] == counted[1] - counted[0]


def test_decoding():
    from operations import decoding

    for config in ({}, {"vae_patch_size": 2, "vae_is_residual": True, "height": 64}):
        pipe = tiny_pipeline(**config)
        clip = {"height": pipe.config.height, "width": pipe.config.width}
        latents = torch.randn(2, 4, 5, *(size // pipe.vae.config.scale_factor_spatial for size in clip.values()))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            pipe.vae.decode(latents)
        convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
        found = decoding(pipe.vae, 2, 5, **clip)
        assert len(found) == 5 and sum(work.operations for work in found) == convolutions
        assert found[0].operations < found[1].operations


def test_the_floor_is_the_time_of_every_shape(monkeypatch):
    import operations

    measured = []

    def a_second(way):
        way()
        measured.append(way)
        return 1.0

    monkeypatch.setattr(operations, "_seconds", a_second)
    work = operations.denoising(tiny_pipeline(num_frames_per_block=1), 1, 25, 32, 48)
    work += operations.decoding(tiny_pipeline().vae, 1, 5, 32, 48)
    for block in work:
        assert block.floor(torch.device("cpu"), torch.float32) == sum(block.values())
    count = len(measured)
    assert count >= len(set().union(*work))
    work[0].floor(torch.device("cpu"), torch.float32)  # each is measured once
    assert len(measured) == count

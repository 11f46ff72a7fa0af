"""The slow reference of the tests against diffusers' own Wan, with the published attention masks as dense masks."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from tests.reference_causal_wan import ReferenceCausalWan, sinusoid, warped_sigmas
from tests.tiny_pipeline import sharpen_transformer


class Float64Sinusoid(torch.nn.Module):
    """Stands in for diffusers' float32 `timesteps_proj`, whose phase error at t = 1000 is about 1e-4."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, timestep):
        return sinusoid(timestep, self.dim).to(torch.float32)


class MaskedProcessor(WanAttnProcessor):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


class RepeatedRope(torch.nn.Module):
    """The clean and the noisy half of a teacher-forcing sequence sit at the same positions."""

    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def forward(self, hidden_states):
        half = hidden_states[:, :, : hidden_states.shape[2] // 2]
        return tuple(torch.cat([table, table], dim=1) for table in self.rope(half))


def stock_wan(config, state_dict=None, seed=0):
    model = WanTransformer3DModel(**config).eval()
    if state_dict is None:
        sharpen_transformer(model, torch.Generator().manual_seed(seed))
    else:
        model.load_state_dict(state_dict)
    model.condition_embedder.timesteps_proj = Float64Sinusoid(config["freq_dim"])
    return model


@torch.no_grad()
def stock_masked_forward(model, latents, timestep, text, mask):
    """Stock Wan over all frames; `timestep` [B, F], `mask` [tokens, tokens] bool, True where attention is allowed."""
    for block in model.blocks:
        block.attn1.set_processor(MaskedProcessor(mask[None, None]))
    tokens_per_frame = latents.shape[3] * latents.shape[4] // 4
    return model(latents, timestep.repeat_interleave(tokens_per_frame, dim=1), text).sample


def block_causal_mask(num_frames, tokens_per_frame, block_size, window=-1, sink=0):
    """The published block-causal training mask with a window, and with a sink added."""
    frame = torch.arange(num_frames * tokens_per_frame) // tokens_per_frame
    end = (frame // block_size + 1) * block_size
    allowed = frame[None, :] < end[:, None]
    if window != -1:
        recent = frame[None, :] >= end[:, None] - (window - sink)
        whole = end[:, None] <= window
        allowed &= recent | whole | (frame[None, :] < sink)
    return allowed


def teacher_forcing_mask(num_frames, tokens_per_frame, block_size, window=-1, sink=0):
    """The published mask over [clean; noisy] frames: a noisy block sees itself and the clean blocks before it."""
    causal = block_causal_mask(num_frames, tokens_per_frame, block_size, window, sink)
    block = torch.arange(num_frames * tokens_per_frame) // tokens_per_frame // block_size
    same = block[None, :] == block[:, None]
    return torch.cat(
        [torch.cat([causal, torch.zeros_like(causal)], dim=1), torch.cat([causal & ~same, same], dim=1)], dim=0
    )


BASE = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=32,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=1e-6,
    rope_max_seq_len=64,
)

CONFIGS = {
    "small": (BASE, (2, 4, 6, 4, 6)),
    "wide_heads": (BASE | dict(num_attention_heads=3, attention_head_dim=20, num_layers=3), (1, 4, 6, 6, 2)),
    "wan_like_split": (BASE | dict(num_attention_heads=1, attention_head_dim=32, ffn_dim=48), (1, 4, 6, 2, 4)),
    "no_cross_norm": (BASE | dict(cross_attn_norm=False, out_channels=6), (1, 4, 6, 4, 4)),
}


def causal(config, n, window=-1, sink=0, rope_mode="absolute"):
    return config | dict(num_frames_per_block=n, local_attn_size=window, sink_size=sink, rope_mode=rope_mode)


def max_error(a, b):
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_one_block_equals_stock_wan(name):
    config, shape = CONFIGS[name]
    model = stock_wan(config)
    reference = ReferenceCausalWan(model.state_dict(), causal(config, n=shape[2]))
    latents, text = torch.randn(shape), torch.randn(shape[0], 5, config["text_dim"])
    timestep = torch.tensor([833.3333, 1000.0])[: shape[0]]
    with torch.no_grad():
        expected = model(latents, timestep, text).sample
    assert expected.std() > 0.1
    assert max_error(reference.forward(latents, timestep, text), expected) <= 1e-5


@pytest.mark.parametrize("n, window, sink", [(1, -1, 0), (3, -1, 0), (2, 4, 0), (1, 3, 1), (2, 4, 2), (3, 5, 1)])
def test_masks(n, window, sink):
    config, shape = CONFIGS["small"]
    model = stock_wan(config)
    reference = ReferenceCausalWan(model.state_dict(), causal(config, n, window, sink))
    latents, clean, text = torch.randn(shape), torch.randn(shape), torch.randn(shape[0], 5, config["text_dim"])
    timestep = torch.rand(shape[0], shape[2]) * 1000

    mask = block_causal_mask(shape[2], 6, n, window, sink)
    expected = stock_masked_forward(model, latents, timestep, text, mask)
    assert max_error(reference.forward(latents, timestep, text), expected) <= 1e-5

    mask = teacher_forcing_mask(shape[2], 6, n, window, sink)
    model.rope = RepeatedRope(model.rope)
    both = torch.cat([clean, latents], dim=2)
    times = torch.cat([torch.zeros_like(timestep), timestep], dim=1)
    expected = stock_masked_forward(model, both, times, text, mask)[:, :, shape[2] :]
    assert max_error(reference.forward(latents, timestep, text, clean=clean), expected) <= 1e-5


@pytest.mark.parametrize("rope_mode", ["absolute", "relative"])
@pytest.mark.parametrize("n, window, sink", [(1, -1, 0), (1, 3, 1), (2, 4, 2), (3, 5, 1)])
def test_block_by_block_equals_whole(n, window, sink, rope_mode):
    config, shape = CONFIGS["small"]
    reference = ReferenceCausalWan(stock_wan(config).state_dict(), causal(config, n, window, sink, rope_mode))
    latents, clean, text = torch.randn(shape), torch.randn(shape), torch.randn(shape[0], 5, config["text_dim"])
    timestep = torch.rand(shape[0], shape[2]) * 1000
    whole = reference.forward(latents, timestep, text, clean=clean)
    blocks = []
    for start in range(0, shape[2], n):
        context = reference.context_of(clean[:, :, :start], text)
        part = slice(start, start + n)
        blocks.append(reference.block(latents[:, :, part], timestep[:, part], text, context, store=False))
    assert max_error(torch.cat(blocks, dim=2), whole) <= 1e-10


def test_relative_positions_shift_together():
    """Relative mode only changes how far the sink is from the window: without a sink it equals absolute mode."""
    config, shape = CONFIGS["small"]
    state = stock_wan(config).state_dict()
    latents, text = torch.randn(shape), torch.randn(shape[0], 5, config["text_dim"])
    timestep = torch.zeros(shape[0])
    outputs = {
        (mode, sink): ReferenceCausalWan(state, causal(config, 1, 3, sink, mode)).forward(latents, timestep, text)
        for mode in ("absolute", "relative")
        for sink in (0, 1)
    }
    assert torch.equal(outputs["absolute", 0], outputs["relative", 0])
    assert max_error(outputs["absolute", 1], outputs["relative", 1]) > 1e-2


def test_published_schedule():
    assert (1000 * warped_sigmas((1, 0.75, 0.5, 0.25), shift=5.0)).tolist() == pytest.approx(
        [1000, 937.5, 833.3333, 625], abs=1e-3
    )

"""The yardstick computes our videos: same noise, same frames, in float32 up to rounding."""

import pytest
import torch

from astrolabe_diffusers import CausalWanPipeline
from tests.tiny_pipeline import tiny_pipeline


# Seven blocks of a frame, or five of two: a window of four with a sink of one has thrown out half of them.
CASES = {
    "unlimited": {},
    "three frames a block": {"num_frames_per_block": 3, "num_frames": 33},
    "window": {"local_attn_size": 3},
    "window and sink": {"local_attn_size": 4, "sink_size": 1},
    "sink of two, two frames a block": {
        "num_frames_per_block": 2,
        "num_frames": 37,
        "local_attn_size": 6,
        "sink_size": 2,
    },
    "relative positions": {"local_attn_size": 4, "sink_size": 1, "rope_mode": "relative"},
    "a gap between them": {"local_attn_size": 4, "sink_size": 1, "rope_mode": "relative", "rope_window": 6},
    "EMA sink": {"local_attn_size": 3, "sink_size": 1, "rope_mode": "relative", "sink_ema": 0.7},
    "relative positions, no sink": {"local_attn_size": 3, "rope_mode": "relative"},
    "two steps": {"sigmas": [1.0, 0.5], "first_block_sigmas": [1.0, 0.75, 0.5, 0.25]},
    "no norm before the text": {"cross_attn_norm": False},
    "context encoded anew": {
        "num_frames_per_block": 3,
        "num_frames": 45,
        "num_context_frames": 3,
        "sigmas": [1.0, 0.5, 0.0],
    },
    "another autoencoder": {"vae_patch_size": 2, "vae_is_residual": True, "height": 32, "width": 64},
}


def both(pipe: CausalWanPipeline):
    """Our latents `(B, C, f, h, w)` and the yardstick's, then the frames `(B, F, 3, H, W)` in [0, 1]."""
    from published_way import PublishedWay

    prompts = ["a red circle moves left", "a blue cross moves up"]
    sizes = {name: pipe.config[name] for name in ("num_frames", "height", "width")}
    yardstick = PublishedWay(pipe)
    embeds = pipe.encode_prompt(prompts)
    for kind in ("latent", "pt"):
        theirs = yardstick.blocks(embeds, **sizes, generator=torch.Generator().manual_seed(1), decode=kind == "pt")
        theirs = torch.cat(list(theirs), dim=2)
        if kind == "latent":
            whole = yardstick.whole(theirs.split(2, dim=2)).transpose(1, 2)
        else:
            theirs = theirs.transpose(1, 2)
            torch.testing.assert_close(whole, theirs, atol=1e-5, rtol=1e-5)
            theirs = theirs / 2 + 0.5
        ours = pipe(prompts, **sizes, generator=torch.Generator().manual_seed(1), output_type=kind).frames
        yield ours, theirs


@pytest.mark.parametrize("case", CASES)
def test_the_same_video(case):
    pipe = tiny_pipeline(**{"num_frames_per_block": 1, "num_frames": 25} | CASES[case])
    for ours, theirs in both(pipe):
        assert ours.shape == theirs.shape and ours.std() > 0.05
        # The decoder of the random weights makes more of the latents' rounding.
        tolerance = 1e-5 if ours.shape[1] == 4 else 5e-5
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=1e-5)

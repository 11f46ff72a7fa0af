"""What a flush keeps, in numbers. That a video then comes out right is in `tests/pipelines/test_transitions.py`."""

import pytest
import torch

from astrolabe_diffusers.models.kv_cache_flush import kept_frames
from astrolabe_diffusers.models.rotary import CausalWanRotaryPosEmbed, apply_rotary


@pytest.mark.parametrize(
    "num_frames, window, block, sink, kept",
    [
        (1, 21, 1, 4, [0]),
        (2, 21, 1, 4, [0, 1]),
        (3, 12, 3, 3, [0, 1, 2]),
        (12, 12, 3, 3, [0, 10, 11]),
        (120, 12, 3, 3, [0, 118, 119]),
        (120, 6, 3, 1, [0, 118, 119]),
        (20, 21, 1, 0, [0, 18, 19]),
        # Without a sink the first frame leaves: of 20 slots the oldest has the frame before the last 19.
        (120, 21, 1, 0, [100, 118, 119]),
        # One slot and none beside the sink; one slot in all.
        (120, 6, 3, 2, [0, 119]),
        (120, 6, 3, 3, [0]),
        (120, 4, 3, 0, [119]),
    ],
)
def test_kept_frames(num_frames, window, block, sink, kept):
    assert kept_frames(num_frames, window - block, sink) == kept


def test_keys_move_back_in_time():
    """Rows before the table's first are computed: -42 undoes 42, in height and width nothing moves."""
    rope, generator = CausalWanRotaryPosEmbed(32, (1, 2, 2), 64), torch.Generator().manual_seed(0)
    key = torch.randn(1, 6, 2, 32, generator=generator)
    away = apply_rotary(key, rope.shift(-42, key.device))
    assert (apply_rotary(away, rope.shift(42, key.device)) - key).abs().max() < 1e-5
    assert (away - key)[..., : rope.t_dim].abs().max() > 0.1
    assert torch.equal(away[..., rope.t_dim :], key[..., rope.t_dim :])

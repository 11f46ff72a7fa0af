"""Rotary positions of latent frames, rows and columns."""

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device


Rotary = tuple[torch.Tensor, torch.Tensor]


def apply_rotary(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate the interleaved pairs of `x` `(B, L, heads, 2 * pairs)` by `(cos, sin)`, each `(1, L, 1, pairs)` fp32."""
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def sinusoids(positions: torch.Tensor, dim: int) -> Rotary:
    """cos and sin, each `(N, dim / 2)`, of positions or timesteps `(N,)`, from float64 angles as the published models
    are trained. In float32 the phase of t = 1000 is off by 1e-4, which is visible in the output."""
    dtype = maybe_adjust_dtype_for_device(torch.float64, positions.device)
    freqs = 10000.0 ** (-torch.arange(0, dim, 2, dtype=dtype, device=positions.device) / dim)
    angles = positions.to(dtype)[:, None] * freqs
    return angles.cos().float(), angles.sin().float()


class CausalWanRotaryPosEmbed(WanRotaryPosEmbed):
    """Wan's 3-D rotary positions starting at any latent frame."""

    def _temporal(self, start: int, num_frames: int, device: torch.device) -> Rotary:
        """cos and sin `(num_frames, t_dim / 2)` of frames `start..`, computed where the table has none."""
        if 0 <= start <= self.max_seq_len - num_frames:
            rows = slice(start, start + num_frames)
            return self.freqs_cos[rows, : self.t_dim : 2], self.freqs_sin[rows, : self.t_dim : 2]
        return sinusoids(torch.arange(start, start + num_frames, device=device), self.t_dim)

    def forward(self, hidden_states: torch.Tensor, frame_offset: int = 0) -> Rotary:
        """cos and sin, each `(1, F * H/2 * W/2, 1, head_dim / 2)`, of latents `(B, C, F, H, W)` whose first frame has
        this index."""
        _, p_h, p_w = self.patch_size
        f, h, w = hidden_states.shape[2], hidden_states.shape[3] // p_h, hidden_states.shape[4] // p_w
        t, hw = self.t_dim, self.t_dim + self.h_dim
        tables = []
        frames = self._temporal(frame_offset, f, hidden_states.device)
        for of_frames, table in zip(frames, (self.freqs_cos, self.freqs_sin)):
            rows, columns = table[:h, t:hw:2].view(1, h, 1, -1), table[:w, hw::2].view(1, 1, w, -1)
            parts = [part.expand(f, h, w, -1) for part in (of_frames.view(f, 1, 1, -1), rows, columns)]
            tables.append(torch.cat(parts, dim=-1).reshape(1, f * h * w, 1, -1))
        return tables[0], tables[1]

    def shift(self, num_frames: int, device: torch.device) -> Rotary:
        """The rotation, `(1, 1, 1, head_dim / 2)`, that moves keys `num_frames` later in time; negative: earlier."""
        cos, sin = self._temporal(num_frames, 1, device)
        still = (0, (self.h_dim + self.w_dim) // 2)
        return F.pad(cos, still, value=1.0).view(1, 1, 1, -1), F.pad(sin, still).view(1, 1, 1, -1)

"""Wan's video autoencoder on normalised latents, and decoding block by block."""

import threading

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm, unpatchify
from torch import nn


# Latent frames before a frame that it depends on, by all the convolutions of Wan's decoder in time, rounded up.
DECODER_MEMORY = 40
# Positions of a frame times latent frames that are decoded together: more would only take more memory.
LATENTS_AT_ONCE = 1024
# `AutoencoderKLWan` keeps what its encoder remembers in itself, where two threads would mix their videos.
_ENCODING = threading.Lock()


def _latent_stats(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stats = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=like.dtype, device=like.device)
    return stats.view(2, 1, -1, 1, 1, 1).unbind()


def _denormalised(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    mean, std = _latent_stats(vae, latents)
    return (latents * std + mean).to(vae.dtype)


def encode_video(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Normalised latents `(B, C, 1 + (F - 1) / 4, h, w)`, float32, of a video `(B, 3, F, H, W)` in [-1, 1].

    The mean of the posterior, as the published models take it.
    """
    with _ENCODING:
        latents = vae.encode(video.to(vae.dtype)).latent_dist.mode().float()
    mean, std = _latent_stats(vae, latents)
    return (latents - mean) / std


def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """The video `(B, 3, F, H, W)` in [-1, 1] of normalised latents `(B, C, f, h, w)`, decoded whole."""
    return vae.decode(_denormalised(vae, latents), return_dict=False)[0]


class FusedWanRMSNorm(WanRMS_norm):
    """`WanRMS_norm` in one kernel, which needs the channels last in memory; with them, `movedim` copies nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gamma = self.gamma.flatten().to(x.dtype)
        return F.rms_norm(x.movedim(1, -1), gamma.shape, gamma, eps=1e-24).movedim(-1, 1)


def use_channels_last(module: nn.Module):
    """Lay out the convolutions of Wan's autoencoder as cuDNN computes them, so that it need not copy its inputs.

    On an H100 in bf16, 480 x 832 pixels, this and the norms save a third of the decoder's time.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            memory_format = torch.channels_last_3d if isinstance(layer, nn.Conv3d) else torch.channels_last
            layer.weight.data = layer.weight.data.contiguous(memory_format=memory_format)
        elif type(layer) is WanRMS_norm and not isinstance(layer.bias, nn.Parameter):
            layer.__class__ = FusedWanRMSNorm


class FlatWanCausalConv3d(WanCausalConv3d):
    """`WanCausalConv3d`, without strides, of one small video as a convolution of images, whose channels are those of
    the frames that a frame is made from: for it alone torch has no fast convolution in three dimensions on a CPU."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        # torch's own limit, channels times frames times height; beyond, the copies would only take memory.
        if len(x) > 1 or x[0, ..., 0].numel() > 20480:
            return super().forward(x, cache_x)
        if cache_x is not None and self._padding[4]:
            x = torch.cat([cache_x, x], dim=2)
        missing = self._padding[4] - (0 if cache_x is None else cache_x.shape[2])
        frames = F.pad(x, (0, 0, 0, 0, max(missing, 0), 0))[0].transpose(0, 1)  # (F, C, H, W)
        size = self.kernel_size[0]
        stacked = torch.cat([frames[i : len(frames) - size + 1 + i] for i in range(size)], dim=1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        # Of height and width; the padding is given in the order of `F.pad`.
        padding = (self._padding[2], self._padding[0])
        return F.conv2d(stacked, weight, self.bias, padding=padding).transpose(0, 1).unsqueeze(0)


def flatten_convolutions(module: nn.Module):
    for layer in module.modules():
        if type(layer) is WanCausalConv3d:
            layer.__class__ = FlatWanCausalConv3d


class StreamingVAEDecoder:
    """Decodes a video piece by piece, with the result of decoding it whole, but for rounding.

    Wan's decoder is causal in time and remembers the last frames of every convolution. That memory is kept here, not
    in the autoencoder, so that several streams, and other uses of the same autoencoder, do not disturb each other.
    """

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = vae
        if vae.device.type == "cuda":
            use_channels_last(vae.decoder)
        elif vae.device.type == "cpu":
            flatten_convolutions(vae.decoder)
        self.reset()

    def reset(self):
        """Forget the past: the next latent frame starts a video."""
        self._features: dict[tuple[int, int], list] = {}  # by the tile's corner

    def select(self, videos: list[int]) -> "StreamingVAEDecoder":
        """A decoder of its own for some videos of the batch."""
        other = StreamingVAEDecoder(self.vae)
        other._features = {
            corner: [feature[videos] if isinstance(feature, torch.Tensor) else feature for feature in features]
            for corner, features in self._features.items()
        }
        return other

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The video `(B, 3, F, H, W)` in [-1, 1] of the next normalised latent frames `(B, C, f, h, w)`: one frame for
        the first latent frame of the video, `scale_factor_temporal` frames for every other."""
        vae = self.vae
        latents = _denormalised(vae, latents)
        scale = vae.spatial_compression_ratio
        tile = (vae.tile_sample_min_height // scale, vae.tile_sample_min_width // scale)
        if vae.use_tiling and (latents.shape[-2] > tile[0] or latents.shape[-1] > tile[1]):
            video = self._decode_tiles(latents, *tile)
        else:
            video = self._decode_tile(latents, (0, 0))
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        return video.clamp(-1.0, 1.0)

    def _decode_tile(self, latents: torch.Tensor, corner: tuple[int, int]) -> torch.Tensor:
        vae = self.vae
        hidden_states = vae.post_quant_conv(latents)
        first = corner not in self._features
        features = self._features.setdefault(corner, [None] * vae._cached_conv_counts["decoder"])
        # Small frames together: launching the kernels takes longer than running them. The video's first latent frame
        # by itself, as it is not doubled in time.
        together = max(1, LATENTS_AT_ONCE // hidden_states[0, 0, 0].numel())
        frames = []
        while hidden_states.shape[2]:
            count = 1 if first else together
            piece, hidden_states = hidden_states[:, :, :count], hidden_states[:, :, count:]
            frames.append(vae.decoder(piece, feat_cache=features, feat_idx=[0], first_chunk=first))
            first = False
        return torch.cat(frames, dim=2)

    def _decode_tiles(self, latents: torch.Tensor, tile_height: int, tile_width: int) -> torch.Tensor:
        """Overlapping tiles of the frame, each with a memory of its own, blended as `AutoencoderKLWan` does."""
        vae = self.vae
        scale, patch = vae.spatial_compression_ratio, vae.config.patch_size or 1
        strides = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
        overlap_y = (vae.tile_sample_min_height - strides[0]) // patch
        overlap_x = (vae.tile_sample_min_width - strides[1]) // patch
        above, rows = None, []
        for top in range(0, latents.shape[-2], strides[0] // scale):
            row = []
            for left in range(0, latents.shape[-1], strides[1] // scale):
                tile = latents[..., top : top + tile_height, left : left + tile_width]
                tile = self._decode_tile(tile, (top, left))
                if above is not None:
                    tile = vae.blend_v(above[len(row)], tile, overlap_y)
                if row:
                    tile = vae.blend_h(row[-1], tile, overlap_x)
                row.append(tile)
            rows.append(torch.cat([tile[..., : strides[0] // patch, : strides[1] // patch] for tile in row], dim=-1))
            above = row
        height, width = (size * scale // patch for size in latents.shape[-2:])
        return torch.cat(rows, dim=-2)[..., :height, :width]

"""Wan's video autoencoder on normalised latents, and decoding block by block."""

import copy
import threading

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import nn

from .latent_frames import num_latents_of
from .vae_decoder import decode_piece, decode_piece_by_calls
from .vae_encoder import encode_piece
from .vae_layers import Memory
from .vae_operations import lay_out, norm, unpatchify


# Latent frames before a frame that it depends on, by all the convolutions of Wan's decoder in time, rounded up.
DECODER_MEMORY = 40
# Latent frames are decoded, or encoded, together up to as many positions. Of small frames the kernels take less time
# to run than to launch; of large ones they run a few hundredths faster, if a GPU has the memory: a tenth of it, at
# these bytes a position.
POSITIONS_AT_ONCE, BYTES_PER_POSITION = 1024, 440_000
# `AutoencoderKLWan`'s own encoding keeps what it remembers in itself, where two threads would mix their videos.
_ENCODING = threading.Lock()


def latents_at_once(num_positions: int, device: torch.device) -> int:
    """How many latent frames, of all videos of a batch, with so many positions each."""
    positions = POSITIONS_AT_ONCE
    if device.type == "cuda":
        allowed = torch.cuda.get_per_process_memory_fraction(device)
        memory = allowed * torch.cuda.get_device_properties(device).total_memory
        positions = max(positions, int(memory / 10 / BYTES_PER_POSITION))
    return max(1, positions // max(1, num_positions))


def _latent_stats(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stats = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=like.dtype, device=like.device)
    return stats.view(2, 1, -1, 1, 1, 1).unbind()


def _denormalised(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    mean, std = _latent_stats(vae, latents)
    return (latents * std + mean).to(vae.dtype)


def encode_video(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Normalised latents `(B, C, 1 + (F - 1) // 4, h, w)`, float32, of a video `(B, 3, F, H, W)` in [-1, 1].

    The mean of the posterior, as the published models take it. Frames after the last 1 + 4 n are left out. With
    gradients or tiles, and where a call may run anything but diffusers' code (hooks, layers of another class), it is
    `vae.encode` that runs.
    """
    video = video.to(vae.dtype)
    ours = _is_plain(vae.encoder, vae.quant_conv) and not _overridden(vae, "encode", "_encode")
    if torch.is_grad_enabled() or vae.use_tiling or not ours:
        with _ENCODING:
            latents = vae.encode(video).latent_dist.mode()
    else:
        lay_out(vae.encoder)
        together = 1 if vae.use_slicing else len(video)
        latents = torch.cat([_encode(vae, videos) for videos in video.split(together)])
    latents = latents.float()
    mean, std = _latent_stats(vae, latents)
    return (latents - mean) / std


def _encode(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """The posterior's mean, as the autoencoder has it."""
    together = latents_at_once(video[:, 0, 0].numel() // vae.spatial_compression_ratio**2, video.device)
    count = num_latents_of(vae, video.shape[2])
    memory, latents = {}, []
    for start in range(0, count, together):
        frames = video[:, :, max(0, 4 * start - 3) : 4 * min(start + together, count) - 3]
        latents.append(encode_piece(vae, frames, memory))
    return torch.cat(latents, dim=2)


def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """The video `(B, 3, F, H, W)` in [-1, 1] of normalised latents `(B, C, f, h, w)`, decoded whole."""
    if torch.is_grad_enabled() or _overridden(vae, *_DECODING):
        return vae.decode(_denormalised(vae, latents), return_dict=False)[0]
    together = 1 if vae.use_slicing else len(latents)
    return torch.cat([StreamingVAEDecoder(vae).decode(videos) for videos in latents.split(together)])


class FusedWanRMSNorm(wan.WanRMS_norm):
    """`WanRMS_norm` in one kernel, which needs the channels last in memory; with them, `movedim` copies nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm(x.movedim(1, -1), self.gamma.flatten().to(x.dtype)).movedim(-1, 1)


def use_channels_last(module: nn.Module):
    """Lay out the convolutions of Wan's autoencoder as cuDNN computes them, so that it need not copy its inputs.

    On an H100 in bf16, 480 x 832 pixels, this and the norms save a third of the decoder's time.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            memory_format = torch.channels_last_3d if isinstance(layer, nn.Conv3d) else torch.channels_last
            layer.weight.data = layer.weight.data.contiguous(memory_format=memory_format)
        elif type(layer) is wan.WanRMS_norm and not isinstance(layer.bias, nn.Parameter):
            layer.__class__ = FusedWanRMSNorm


# What the modules of Wan's autoencoder compute, which is computed here without calling them.
_FORWARDS = {
    kind.forward
    for kind in (
        *(wan.WanEncoder3d, wan.WanDecoder3d, wan.WanMidBlock, wan.WanUpBlock, wan.WanResidualBlock),
        *(wan.WanResidualDownBlock, wan.WanResidualUpBlock, wan.AvgDown3D, wan.DupUp3D, wan.WanAttentionBlock),
        *(wan.WanResample, wan.WanUpsample, wan.WanCausalConv3d, wan.WanRMS_norm, FusedWanRMSNorm),
        *(nn.Conv2d, nn.ZeroPad2d, nn.SiLU, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleList),
    )
}
_DECODING = ("decode", "_decode", "tiled_decode")


def _is_plain(*modules: nn.Module) -> bool:
    """Whether calling these modules would run diffusers' code and nothing else: inside are no forward of another's,
    as of a subclass, a LoRA or a quantised layer, and no hooks, and nothing is compiled.

    Asked for before every use, as any of it may come later: a tenth of a millisecond for a decoder.
    """
    modules = list(modules)
    for module in modules:  # and for those that are appended
        attributes = vars(module)
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"] or attributes.get("_compiled_call_impl"):
            return False
        if getattr(module.forward, "__func__", None) not in _FORWARDS:
            return False
        modules += [child for child in attributes["_modules"].values() if child is not None]
    return True


def _overridden(vae: AutoencoderKLWan, *methods: str) -> bool:
    return any(getattr(type(vae), name) is not getattr(AutoencoderKLWan, name) for name in methods)


class StreamingVAEDecoder:
    """Decodes a video piece by piece, with the result of decoding it whole, but for rounding.

    Wan's decoder is causal in time and remembers the last frames of every convolution. That memory is kept here, not
    in the autoencoder, so that several streams, and other uses of the same autoencoder, do not disturb each other.

    A decoder in which a call may run anything but diffusers' code, as it does with hooks, compiled or with layers of
    another class, is called; any other is computed without its calls, which is faster.
    """

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = vae
        self.reset()

    def reset(self):
        """Forget the past: the next latent frame starts a video."""
        self._memory: dict[tuple[int, int], Memory] = {}  # by the tile's corner

    def select(self, videos: list[int]) -> "StreamingVAEDecoder":
        """A decoder of its own for some videos of the batch."""
        other = copy.copy(self)
        other._memory = {
            corner: {
                layer: frames[videos] if isinstance(frames, torch.Tensor) else frames
                for layer, frames in memory.items()
            }
            for corner, memory in self._memory.items()
        }
        return other

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The video `(B, 3, F, H, W)` in [-1, 1] of the next normalised latent frames `(B, C, f, h, w)`: one frame for
        the first latent frame of the video, `scale_factor_temporal` frames for every other.

        A `ValueError` if the autoencoder's class overrides `decode`, which takes whole videos, or if hooks or other
        layers have come into its decoder since the video began.
        """
        vae = self.vae
        self._choose_way()
        latents = _denormalised(vae, latents)
        scale = vae.spatial_compression_ratio
        tile = (vae.tile_sample_min_height // scale, vae.tile_sample_min_width // scale)
        if vae.use_tiling and (latents.shape[-2] > tile[0] or latents.shape[-1] > tile[1]):
            frames = self._decode_tiles(latents, *tile).permute(0, 2, 3, 4, 1)
        else:
            frames = self._decode_tile(latents, (0, 0))
        return unpatchify(frames, vae.config.patch_size or 1).clamp_(-1.0, 1.0).permute(0, 4, 1, 2, 3)

    def _choose_way(self):
        """Whether the decoder is called, at the beginning of a video: what is remembered differs."""
        vae, begins = self.vae, not self._memory
        if _overridden(vae, *_DECODING):
            raise ValueError(
                f"{type(vae).__name__} decodes whole videos by a method of its own, and this one is decoded piece by "
                "piece: override `forward` of its `decoder`, or of a module inside, in place of "
                f"{', '.join(_DECODING)}."
            )
        plain = _is_plain(vae.decoder, vae.post_quant_conv)
        if begins and plain:
            self._decode_piece = decode_piece
            lay_out(vae.decoder)
        elif begins:
            self._decode_piece = decode_piece_by_calls
        elif self._decode_piece is decode_piece and not plain:
            raise ValueError(
                "hooks, a compiled module or layers of another class have come into `vae.decoder` in the midst of a "
                "video: add them before it begins."
            )

    def _decode_tile(self, latents: torch.Tensor, corner: tuple[int, int]) -> torch.Tensor:
        pieces = []
        for piece in latents.split(latents_at_once(latents[:, 0, 0].numel(), latents.device), dim=2):
            pieces.append(self._decode_piece(self.vae, piece, self._memory.setdefault(corner, {})))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

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
                tile = self._decode_tile(tile, (top, left)).permute(0, 4, 1, 2, 3)
                if above is not None:
                    tile = vae.blend_v(above[len(row)], tile, overlap_y)
                if row:
                    tile = vae.blend_h(row[-1], tile, overlap_x)
                row.append(tile)
            rows.append(torch.cat([tile[..., : strides[0] // patch, : strides[1] // patch] for tile in row], dim=-1))
            above = row
        height, width = (size * scale // patch for size in latents.shape[-2:])
        return torch.cat(rows, dim=-2)[..., :height, :width]

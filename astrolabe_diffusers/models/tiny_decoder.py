"""Tiny decoders of Wan's latents in their published formats, TAEHV and LightTAE: fast, and not exact.

The architecture is that of https://github.com/madebyollin/taehv; lightx2v/Autoencoders on the Hub has LightTAE.
"""

import copy
import inspect
import math
from os import PathLike
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..layouts.tensor_files import HUB_ARGUMENTS, fetch_link, load_tensors, misfits, select_weights
from ..registration import register_with_diffusers
from .vae_operations import lay_out, spread
from .vae_streaming import latents_at_once


# Convolutions that tell the sizes of a file: the first, the last of each stage, and that to pixels.
_SIZED = tuple(f"decoder.{i}.weight" for i in (1, 8, 14, 20, 22))
# By the beginnings of their names, published files whose latents are de-normalised or not: nothing in them says it.
_DENORMALISED = {"lighttaew": True, "taew": False}


def _by_frame(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer for images `(N, C, H, W)` on frames `(B, F, H, W, C)`; their memory is what it calls channels-last."""
    y = layer(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return y.contiguous().unflatten(0, x.shape[:2])


class SoftClamp(nn.Module):
    """Keeps values within -3 and 3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(x / 3)


class MemBlock(nn.Module):
    """A residual block that sees its input of the same and of the previous frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """`x` are frames `(B, F, H, W, C)`, and `before` is the one before them, `(B, H, W, C)`."""
        past = torch.cat([before[:, None], x[:, :-1]], dim=1)
        return _by_frame(self.conv, torch.cat([x, past], dim=-1)).add_(x).relu_()


class TGrow(nn.Module):
    """Every frame becomes `times` frames, each twice as high and wide.

    The published models enlarge first, in a layer of its own. A convolution of one pixel computes the same before it,
    four times less often.
    """

    def __init__(self, channels: int, times: int):
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(channels, channels * times, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return spread(_by_frame(self.conv, x), self.times)


class TinyWanDecoder(ModelMixin, ConfigMixin):
    r"""
    A decoder of Wan's latents that computes a small part of what the autoencoder's does. Its frames are near to those,
    not equal. A pipeline that has one, as its component `tiny_decoder`, gives its frames.

    Args:
        latent_channels (`int`, defaults to 16): of the latents.
        block_out_channels (`list[int]`, defaults to `(256, 128, 64, 64)`):
            Widths: at the latents' size, and after each of three times that it is doubled.
        temporal_growth (`list[int]`, defaults to `(1, 2, 2)`): how many frames a frame becomes each time.
        patch_size (`int`, defaults to 1): each last pixel becomes a square of these (2 for the latents of Wan2.2).
        latents_mean, latents_std (`list[float]`, *optional*):
            What de-normalises the latents first (LightTAE); TAEHV takes them normalised.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (256, 128, 64, 64),
        temporal_growth: tuple[int, ...] = (1, 2, 2),
        patch_size: int = 1,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ):
        super().__init__()
        width = block_out_channels[0]
        layers = [SoftClamp(), nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
        for width, wider, times in zip(block_out_channels, block_out_channels[1:], temporal_growth):
            layers += [MemBlock(width) for _ in range(3)]
            # Published weights go by the number of their layer, and have one here that enlarges.
            layers += [nn.Identity(), TGrow(width, times), nn.Conv2d(width, wider, 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(block_out_channels[-1], 3 * patch_size**2, 3, padding=1)]
        if patch_size > 1:
            layers.append(nn.PixelShuffle(patch_size))
        self.decoder = nn.Sequential(*layers)

    @property
    def scale_factor_temporal(self) -> int:
        return math.prod(self.config.temporal_growth)

    @property
    def scale_factor_spatial(self) -> int:
        return 2 ** len(self.config.temporal_growth) * self.config.patch_size

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | PathLike,
        *,
        denormalised: bool | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        revision: str | None = None,
        **kwargs,
    ) -> "TinyWanDecoder":
        r"""
        Load a published file, such as `taew2_1.pth` or `lighttaew2_1.safetensors`; sizes are read off its tensors.

        Args:
            pretrained_model_link_or_path: path or Hub link of a safetensors or torch file. Its encoder is left out.
            denormalised: whether it takes de-normalised latents, those of Wan2.1, as LightTAE does and TAEHV does not.
                By default that is told by the file's name.
            dtype: of the parameters; the file's if not given. `torch_dtype` is its older name.
            revision: of the file on the Hub.
            kwargs: of `HUB_ARGUMENTS`, for downloads; and `temporal_growth`.

        Raises:
            ValueError: the file is no such decoder, or nothing says whether its latents are de-normalised; tensors
                are missing, unexpected or of another shape. The message names them.
        """
        dtype = torch_dtype if dtype is None else dtype
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        if unknown := kwargs.keys() - {"temporal_growth"}:
            raise ValueError(f"{cls.__name__}.from_single_file takes no {', '.join(sorted(unknown))}.")
        path = fetch_link(pretrained_model_link_or_path, revision=revision, **hub)
        tensors = select_weights(load_tensors(path))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}
        if missing := [name for name in _SIZED if name not in tensors]:
            raise ValueError(f"{path} is no tiny decoder in the format of TAEHV: it has no {', '.join(missing)}.")
        if denormalised is None:
            denormalised = _is_denormalised(Path(path).name)
        shapes = [tensors[name].shape for name in _SIZED]
        channels = shapes[0][1]
        if denormalised:
            defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
            stats = {name: defaults[name].default for name in ("latents_mean", "latents_std")}
            if channels != len(stats["latents_mean"]):
                raise ValueError(f"{path} takes de-normalised latents of {channels} channels, which are not Wan2.1's.")
            kwargs |= stats
        model = cls(
            latent_channels=channels,
            block_out_channels=[shape[0] for shape in shapes[:-1]],
            patch_size=math.isqrt(shapes[-1][0] // 3),
            **kwargs,
        )
        own = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for name, layer in model.named_modules():
            # TAEHV is published for several growths in time: the last rows are those of the last frames.
            if isinstance(layer, TGrow) and (key := f"{name}.conv.weight") in tensors:
                tensors[key] = tensors[key][-layer.conv.out_channels :]
        if problems := misfits(tensors, own):
            raise ValueError(f"{path} does not fit: {problems}.")
        # A copy: the file may be replaced while its memory map is in use.
        model.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}, assign=True)
        return model.eval()

    @torch.no_grad()
    def forward(
        self, latents: torch.Tensor, memory: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """
        The next frames of a video, and what to remember for those after them.

        `latents` `(B, C, f, h, w)` are normalised. `memory` are the last inputs `(B, H, W, C)` of the nine blocks that
        look back; `None` before a video's first frame. The frames are `(B, F, H, W, 3)`, about -1 to 1 and not clamped
        yet. F is `scale_factor_temporal` for every latent frame, 1 for the video's first.
        """
        config, after = self.config, []
        x = latents.permute(0, 2, 3, 4, 1)
        if config.latents_mean is not None:
            x = x * x.new_tensor(config.latents_std) + x.new_tensor(config.latents_mean)
        x = x.to(self.dtype)
        # Under autocast frames would come back in another dtype than what is remembered.
        with torch.autocast(x.device.type, enabled=False):
            for layer in self.decoder:
                if isinstance(layer, MemBlock):
                    before = torch.zeros_like(x[:, 0]) if memory is None else memory[len(after)]
                    after.append(x[:, -1].clone())
                    x = layer(x, before)
                else:
                    x = layer(x) if isinstance(layer, TGrow) else _by_frame(layer, x)
        if memory is None:
            x = x[:, self.scale_factor_temporal - 1 :]
        # It draws in [0, 1].
        return x * 2 - 1, after


def _is_denormalised(file: str) -> bool:
    for beginning, denormalised in _DENORMALISED.items():
        if file.lower().startswith(beginning):
            return denormalised
    raise ValueError(
        f"{file} may take normalised latents, as TAEHV's taew2_1 does, or de-normalised ones, as LightTAE's "
        "lighttaew2_1: give the file its published name, or say denormalised=True or False."
    )


class StreamingTinyDecoder:
    """Decodes a video piece by piece with a [`TinyWanDecoder`], with the result of decoding it whole; what
    [`StreamingVAEDecoder`] is for the autoencoder. Without tiles: it needs little memory."""

    def __init__(self, model: TinyWanDecoder):
        self.model = model
        lay_out(model)
        self.reset()

    def reset(self):
        """Forget the past: the next latent frame starts a video."""
        self._memory: list[torch.Tensor] | None = None

    def select(self, videos: list[int]) -> "StreamingTinyDecoder":
        """A decoder of its own for some videos of the batch."""
        other = copy.copy(self)
        other._memory = self._memory and [frames[videos] for frames in self._memory]
        return other

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The video `(B, 3, F, H, W)` in [-1, 1] of the next normalised latent frames `(B, C, f, h, w)`: one frame for
        the first latent frame of the video, `scale_factor_temporal` frames for every other."""
        pieces = []
        for piece in latents.split(latents_at_once(latents[:, 0, 0].numel(), latents.device), dim=2):
            frames, self._memory = self.model(piece, self._memory)
            pieces.append(frames)
        frames = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return frames.clamp_(-1.0, 1.0).permute(0, 4, 1, 2, 3)


register_with_diffusers(TinyWanDecoder)

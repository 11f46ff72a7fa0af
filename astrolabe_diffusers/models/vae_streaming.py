"""Wan's video autoencoder on normalised latents, and decoding block by block."""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify


def _latent_stats(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, dtype=like.dtype, device=like.device).view(shape)
    std = torch.tensor(vae.config.latents_std, dtype=like.dtype, device=like.device).view(shape)
    return mean, std


def encode_video(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """Normalised latents `(B, C, 1 + (F - 1) / 4, h, w)`, float32, of a video `(B, 3, F, H, W)` in [-1, 1].

    The mean of the posterior, as the published models take it.
    """
    latents = vae.encode(video.to(vae.dtype)).latent_dist.mode().float()
    mean, std = _latent_stats(vae, latents)
    return (latents - mean) / std


def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """The video `(B, 3, F, H, W)` in [-1, 1] of normalised latents `(B, C, f, h, w)`, decoded whole."""
    mean, std = _latent_stats(vae, latents)
    return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]


class StreamingVAEDecoder:
    """Decodes a video piece by piece, with the result of decoding it whole.

    Wan's decoder is causal in time and remembers the last frames of every convolution. That memory is kept here, not
    in the autoencoder, so that several streams, and other uses of the same autoencoder, do not disturb each other.
    """

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = vae
        self.reset()

    def reset(self):
        """Forget the past: the next latent frame starts a video."""
        self._features = None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Args:
            latents (`torch.Tensor` of shape `(B, C, f, h, w)`): the next normalised latent frames, one or more.

        Returns:
            `torch.Tensor` of shape `(B, 3, F, H, W)`, in [-1, 1]: one frame for the first latent frame of the video,
            `scale_factor_temporal` frames for every other.
        """
        vae = self.vae
        # The decoder is called directly, so offloading that hooks `vae.decode` has to be told.
        if hasattr(vae, "_hf_hook") and hasattr(vae._hf_hook, "pre_forward"):
            vae._hf_hook.pre_forward(vae)
        mean, std = _latent_stats(vae, latents)
        hidden_states = vae.post_quant_conv((latents * std + mean).to(vae.dtype))
        frames = []
        for i in range(hidden_states.shape[2]):
            first = self._features is None
            if first:
                self._features = [None] * vae._cached_conv_counts["decoder"]
            # One latent frame at a time, as AutoencoderKLWan does: its temporal upsampling depends on it.
            frames.append(
                vae.decoder(hidden_states[:, :, i : i + 1], feat_cache=self._features, feat_idx=[0], first_chunk=first)
            )
        video = torch.cat(frames, dim=2)
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        return video.clamp(-1.0, 1.0)

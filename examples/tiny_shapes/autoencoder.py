"""Stage 1: a small Wan video autoencoder, trained on clips of shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from data import sample_batch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from optimize import optimize

from astrolabe_diffusers.models.vae_streaming import use_channels_last


LATENT_CHANNELS = 16
PATCH = 4


def build_autoencoder() -> AutoencoderKLWan:
    """16x in space (4x by patches, 4x by convolutions) and 4x in time, with few channels: patches are what makes it
    fast on a CPU. The shortcuts are those of Wan2.2's autoencoder: it learns faster with them."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4 * PATCH,
    )


@contextmanager
def whole_clips(vae: AutoencoderKLWan) -> Iterator[None]:
    """Inside, encoder and decoder take a whole clip at once where the class goes through it in pieces.

    The result is the same, since every convolution is causal, for a fraction of the kernels. Without a feature cache
    the class leaves out resampling in time, which is added here: the first frame stands for itself, and from it on
    pairs of frames become one, or one becomes two.
    """

    def down(module, args, output):
        return torch.cat([output[:, :, :1], module.time_conv(output)], dim=2)

    def up(module, args):
        first, rest = args[0].split([1, args[0].shape[2] - 1], dim=2)
        doubled = module.time_conv(rest).unflatten(1, (2, -1))  # (B, 2, C, F, H, W)
        return torch.cat([first, doubled.movedim(1, 3).flatten(2, 3)], dim=2)

    hooks = []
    for module in vae.modules():
        if isinstance(module, WanResample) and module.mode == "downsample3d":
            hooks.append(module.register_forward_hook(down))
        elif isinstance(module, WanResample) and module.mode == "upsample3d":
            hooks.append(module.register_forward_pre_hook(up))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def encode_whole(vae: AutoencoderKLWan, video: torch.Tensor) -> DiagonalGaussianDistribution:
    """`vae.encode`, inside [`whole_clips`]."""
    return DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(patchify(video, vae.config.patch_size))))


def decode_whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamping, inside [`whole_clips`]."""
    # `first_chunk`: the clip begins here, so the shortcuts too make one frame of the first latent one.
    return unpatchify(vae.decoder(vae.post_quant_conv(latents), first_chunk=True), vae.config.patch_size)


def object_mask(videos: torch.Tensor) -> torch.Tensor:
    """Where `(B, F, 3, H, W)` differs from its background, which is what most pixels show: bool `(B, F, 1, H, W)`."""
    background = videos[..., ::8, ::8].flatten(3).contiguous().median(dim=3).values[..., None, None]
    return ((videos - background).abs() > 0.1).any(dim=2, keepdim=True)


def train_autoencoder(
    vae: AutoencoderKLWan,
    num_clips: int,
    steps: int,
    batch_size: int,
    device: torch.device,
    seed: int,
    resume: Path,
) -> None:
    """L1 and MSE reconstruction, with a light KL term that keeps the latents smooth enough to be denoised.

    The objects are a tenth of the pixels: weighed like all others they are learnt last, their shapes hardly at all.
    """
    generator = torch.Generator(device).manual_seed(seed)
    clips, masks = [], []
    for part in torch.arange(num_clips).split(128):
        # 25 frames are 7 latent frames: more than the convolutions look back, so that longer videos hold nothing new.
        videos = sample_batch(len(part), 25, generator, device, switch_prob=0.2)["videos"]
        clips.append((videos * 255).round().byte())
        masks.append(object_mask(videos))
    clips, masks = torch.cat(clips), torch.cat(masks)
    vae.to(device).train()
    use_channels_last(vae)
    encode, decode = (torch.compile(f, disable=device.type == "cpu") for f in (encode_whole, decode_whole))

    def loss_fn():
        index = torch.randint(num_clips, (batch_size,), device=device)
        video = clips[index].transpose(1, 2).float() / 127.5 - 1
        weight = 1 + 4 * masks[index].transpose(1, 2).float()
        # A graph cannot be captured with autocast's cache of cast weights.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            posterior = encode(vae, video)
            error = (decode(vae, posterior.sample()).float() - video).abs()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var - 1 - posterior.logvar).mean()
        return (weight / weight.mean() * (error + 2 * error**2)).mean() + 3e-5 * kl

    with whole_clips(vae):
        optimize("autoencoder", vae, loss_fn, steps, 3e-3, seed, resume)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        video = clips[:256].transpose(1, 2).float() / 127.5 - 1
        error = (vae.decode(vae.encode(video).latent_dist.mode()).sample - video).square().mean() / 4
        print(f"autoencoder PSNR {-10 * error.log10().item():.1f} dB", flush=True)


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, num_clips: int, device: torch.device, seed: int) -> None:
    """Write the channels' mean and standard deviation into the config, as Wan's has them."""
    generator = torch.Generator(device).manual_seed(seed)
    latents = []
    for part in torch.arange(num_clips).split(128):
        clips = sample_batch(len(part), 21, generator, device)["videos"]
        latents.append(vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode().transpose(0, 1).flatten(1))
    latents = torch.cat(latents, dim=1)
    vae.register_to_config(latents_mean=latents.mean(dim=1).tolist(), latents_std=latents.std(dim=1).tolist())

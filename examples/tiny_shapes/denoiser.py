"""Stages 2 and 3: teacher-forced flow matching, then distillation to the sampler's four steps."""

from dataclasses import dataclass

import torch
from data import sample_batch
from diffusers import AutoencoderKLWan
from optimize import optimize
from text import CaptionTokens
from torch import nn
from transformers import UMT5EncoderModel

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.models.vae_streaming import encode_video


BLOCK = 3
LATENT_FRAMES = 12
SHIFT = 5.0
# First blocks for each whole clip. They alone are made from noise and the caption; one is an eighth of the work.
FIRST_BLOCKS = 12
STEP_SIGMAS = (1.0, 0.75, 0.5, 0.25)
# Of the teacher's ODE.
ODE_STEPS = 24


def build_transformer(text_dim: int, latent_channels: int) -> CausalWanTransformer3DModel:
    """A window of three blocks, the first block as sink, and positions relative to the window: endless video."""
    return CausalWanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_dim,
        freq_dim=256,
        ffn_dim=512,
        num_layers=6,
        num_frames_per_block=BLOCK,
        sink_size=BLOCK,
        local_attn_size=3 * BLOCK,
        rope_mode="relative",
    )


class Denoiser(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: CausalWanTransformer3DModel):
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer

    def forward(self, noisy, sigmas, tokens, context):
        """Flow of `noisy` `(B, C, F, h, w)` at noise levels `sigmas` `(B, F)`, given the clean blocks `context`. None
        stands for a first block."""
        input_ids, mask = tokens
        text = self.text_encoder(input_ids, mask).last_hidden_state * mask.unsqueeze(-1)
        # A graph cannot be captured with autocast's cache of cast weights.
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=noisy.is_cuda, cache_enabled=False):
            return self.transformer(noisy, sigmas * 1000, text, clean_hidden_states=context).sample.float()


@dataclass
class LatentBank:
    """Encoded clips, kept on the device."""

    latents: torch.Tensor  # (N, C, F, h, w) half precision
    attributes: torch.Tensor  # (N, 4), what the caption says
    first_block: torch.Tensor  # (N,), first block that the caption describes: 0, or where the scene switches

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = torch.randint(len(self.latents), (size,), device=self.latents.device)
        return self.latents[index].float(), self.attributes[index], self.first_block[index]


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLWan, num_clips: int, caption_noise: float, switch_prob: float, device: torch.device, seed: int
) -> LatentBank:
    generator = torch.Generator(device).manual_seed(seed)
    latents, attributes, first_block = [], [], []
    num_frames = 1 + 4 * (LATENT_FRAMES - 1)
    for part in torch.arange(num_clips).split(256):
        batch = sample_batch(len(part), num_frames, generator, device, caption_noise, switch_prob)
        latents.append(encode_video(vae, batch["videos"].transpose(1, 2) * 2 - 1).half())
        attributes.append(batch["caption_attributes"])
        # Block b begins at frame 12 b - 3; 0 is no switch.
        first_block.append((batch["switch_frame"] + 3) // (4 * BLOCK))
    return LatentBank(torch.cat(latents), torch.cat(attributes), torch.cat(first_block))


def warp(sigmas: torch.Tensor) -> torch.Tensor:
    return SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)


def per_frame(values: torch.Tensor) -> torch.Tensor:
    """`(B, blocks)` -> `(B, blocks * BLOCK)`."""
    return values.repeat_interleave(BLOCK, dim=1)


def expand(values: torch.Tensor) -> torch.Tensor:
    """`(B, F)` -> `(B, 1, F, 1, 1)`."""
    return values[:, None, :, None, None]


def noisy_context(latents: torch.Tensor, most: float = 0.15) -> torch.Tensor:
    """Clean blocks with a little noise. Generated blocks are never as clean as data: a model that has only seen clean
    context drifts."""
    level = torch.rand(len(latents), 1, 1, 1, 1, device=latents.device) * most
    return latents + level * torch.randn_like(latents)


def described(errors: torch.Tensor, first_block: torch.Tensor) -> torch.Tensor:
    """Mean of squared errors `(B, C, F, h, w)` over the blocks that the caption describes."""
    per_block = errors.mean(dim=(1, 3, 4)).unflatten(1, (-1, BLOCK)).mean(dim=2)
    mask = torch.arange(per_block.shape[1], device=errors.device) >= first_block[:, None]
    return (per_block * mask).sum() / mask.sum()


def without_caption(attributes: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """`share` of the rows lose their caption."""
    dropped = torch.rand(len(attributes), 1, device=attributes.device) < share
    return attributes.masked_fill(dropped, -1)


def train_flow_matching(
    model: Denoiser, bank: LatentBank, tokens: CaptionTokens, steps: int, batch_size: int, seed: int
) -> None:
    """Each block at its own noise level, given the clean blocks before it."""
    device = bank.latents.device
    torch.manual_seed(seed)

    def errors(latents, attributes, context):
        sigmas = per_frame(warp(torch.rand(len(latents), latents.shape[2] // BLOCK, device=device)))
        noise = torch.randn_like(latents)
        noisy = latents.lerp(noise, expand(sigmas))
        flow = model(noisy, sigmas, tokens(without_caption(attributes, 0.1)), context)
        return (flow - (noise - latents)) ** 2

    def loss_fn():
        latents, attributes, first_block = bank.batch(batch_size)
        clips = described(errors(latents, attributes, noisy_context(latents)), first_block)
        latents, attributes, first_block = bank.batch(FIRST_BLOCKS * batch_size)
        return clips + described(errors(latents[:, :, :BLOCK], attributes, None), first_block)

    optimize("flow matching", model, loss_fn, steps, learning_rate=1.5e-3)


@torch.no_grad()
def solve_trajectories(
    model: Denoiser, bank: LatentBank, tokens: CaptionTokens, num_clips: int, guidance_scale: float, seed: int
) -> torch.Tensor:
    """The teacher's ODE from noise to video with classifier-free guidance, all blocks of a clip at once, each given
    the clean blocks before it: `(num_clips, len(STEP_SIGMAS) + 1, C, F, h, w)`, the points at the sampler's noise
    levels, and the end, for the first clips of the bank."""
    device = bank.latents.device
    torch.manual_seed(seed)
    raw = torch.linspace(1, 0, ODE_STEPS + 1, device=device)
    levels = warp(raw)
    keep = [ODE_STEPS - round(s * ODE_STEPS) for s in STEP_SIGMAS] + [ODE_STEPS]
    trajectories = []
    for clips in torch.arange(num_clips, device=device).split(1024):
        latents = bank.latents[clips].float()
        attributes, context = bank.attributes[clips], noisy_context(latents)
        captions, nothing = tokens(attributes), tokens(without_caption(attributes))
        sample = torch.randn_like(latents)
        points = []
        for i in range(ODE_STEPS + 1):
            if i in keep:
                points.append(sample.half())
            if i < ODE_STEPS:
                sigmas = levels[i].expand(len(latents), latents.shape[2])
                flow = model(sample, sigmas, nothing, context)
                flow = flow.lerp(model(sample, sigmas, captions, context), guidance_scale)
                sample = sample + (levels[i + 1] - levels[i]) * flow
        trajectories.append(torch.stack(points, dim=1))
    return torch.cat(trajectories)


def distill(
    model: Denoiser,
    bank: LatentBank,
    trajectories: torch.Tensor,
    tokens: CaptionTokens,
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """From any of the sampler's noise levels straight to the end of the teacher's trajectory."""
    device = bank.latents.device
    torch.manual_seed(seed)
    levels = warp(torch.tensor(STEP_SIGMAS, device=device))
    model.text_encoder.requires_grad_(False)

    def errors(points, attributes, context):
        size, frames = len(points), torch.arange(points.shape[3], device=device)
        which = per_frame(torch.randint(len(STEP_SIGMAS), (size, len(frames) // BLOCK), device=device))
        noisy = points[torch.arange(size, device=device)[:, None], which, :, frames].movedim(1, 2).float()
        sigmas = levels[which]
        flow = model(noisy, sigmas, tokens(attributes), context)
        return (noisy - expand(sigmas) * flow - points[:, -1]) ** 2

    def loss_fn():
        index = torch.randint(len(trajectories), (batch_size,), device=device)
        context = noisy_context(bank.latents[index].float())
        clips = described(errors(trajectories[index], bank.attributes[index], context), bank.first_block[index])
        index = torch.randint(len(trajectories), (FIRST_BLOCKS * batch_size,), device=device)
        points = trajectories[index, :, :, :BLOCK]
        return clips + described(errors(points, bank.attributes[index], None), bank.first_block[index])

    optimize("distillation", model, loss_fn, steps, learning_rate=5e-4)

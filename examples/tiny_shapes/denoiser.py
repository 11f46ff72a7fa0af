"""Stages 2 and 3: teacher-forced flow matching, then distillation to the sampler's four steps."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from autoencoder import encode_whole, whole_clips
from data import captions, sample_batch
from diffusers import AutoencoderKLWan
from optimize import optimize
from text import END, token_ids
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.models.attention_causal_wan import CausalWanCrossAttnProcessor


BLOCK = 3
LATENT_FRAMES = 12
SHIFT = 5.0
# Of the clips whose scene changes: those whose context is computed with the new caption.
RECACHED_SHARE = 0.25
# Most noise on a context.
CONTEXT_NOISE = 0.15
# First blocks for each whole clip. They alone are made from noise and the caption; one is an eighth of the work.
FIRST_BLOCKS = 8
STEP_SIGMAS = (1.0, 0.75, 0.5, 0.25)
# Of the teacher's ODE.
ODE_STEPS = 24


def build_transformer(text_dim: int, latent_channels: int) -> CausalWanTransformer3DModel:
    """A window of three blocks, the first block as sink, and positions relative to the window: endless video. Few wide
    layers, as the launch of a layer costs a CPU more than its arithmetic."""
    return CausalWanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=8,
        attention_head_dim=32,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_dim,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=4,
        num_frames_per_block=BLOCK,
        sink_size=BLOCK,
        local_attn_size=3 * BLOCK,
        rope_mode="relative",
    )


class SceneAttnProcessor(CausalWanCrossAttnProcessor):
    """Attention of each token to the text of its own scene, of two that are given one after the other: `late`, bool
    `(B, L, 1)`, tells which. With None there is one text, as in inference."""

    late: torch.Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs):
        attend = super().__call__
        if self.late is None:
            return attend(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        first, second = (attend(attn, hidden_states, text) for text in encoder_hidden_states.chunk(2, dim=1))
        return torch.where(self.late, second, first)


class Denoiser(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: CausalWanTransformer3DModel):
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.processor = SceneAttnProcessor()
        for block in transformer.blocks:
            block.attn2.set_processor(self.processor)
        if torch.cuda.is_available():
            transformer.compile_repeated_blocks()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        mask = (input_ids != self.text_encoder.config.pad_token_id).long()
        return self.text_encoder(input_ids, mask).last_hidden_state * mask.unsqueeze(-1)

    def forward(self, noisy, sigmas, clips: "Clips | None", input_ids=None):
        """Flow of `noisy` `(B, C, F, h, w)` at noise levels `sigmas` `(B, F)`: of whole `clips`, given their clean
        blocks, or of first blocks with captions `input_ids` `(B, L)`."""
        if clips is None:
            text, context = self.embed(input_ids), None
        else:
            text = torch.cat([self.embed(clips.before), self.embed(clips.after)], dim=1)
            context = clips.context
            late = torch.cat([per_frame(clips.late_context), per_frame(clips.late)], dim=1)
            _, height, width = self.transformer.config.patch_size
            tokens = noisy.shape[3] * noisy.shape[4] // (height * width)  # of a frame
            self.processor.late = late.repeat_interleave(tokens, dim=1)[..., None]
        # A graph cannot be captured with autocast's cache of cast weights.
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=noisy.is_cuda, cache_enabled=False):
            flow = self.transformer(noisy, sigmas * 1000, text, clean_hidden_states=context).sample.float()
        self.processor.late = None
        return flow


@dataclass
class Clips:
    """A batch of encoded clips with what their blocks are made from."""

    latents: torch.Tensor  # (B, C, F, h, w)
    context: torch.Tensor  # the same, as earlier blocks are seen
    before: torch.Tensor  # (B, L) token ids of the first scene's caption, and of the second's
    after: torch.Tensor
    late: torch.Tensor  # (B, blocks) bool, the blocks of the second scene
    late_context: torch.Tensor  # and those whose keys are computed with its caption
    counts: torch.Tensor  # (B, blocks) bool, those that are learnt from

    def without_captions(self, share: float = 1.0) -> "Clips":
        """`share` of the clips lose theirs: </s> is all that is left."""
        dropped = torch.rand(len(self.latents), 1, device=self.latents.device) < share
        none = torch.zeros_like(self.before)
        none[:, 0] = END
        before, after = (torch.where(dropped, none, ids) for ids in (self.before, self.after))
        return replace(self, before=before, after=after)


@dataclass
class ClipBank:
    """Encoded clips, kept on the device."""

    latents: torch.Tensor  # (N, C, F, h, w) half precision
    before: torch.Tensor  # (N, L) token ids of the two scenes' captions, equal where there is one scene
    after: torch.Tensor
    switch_block: torch.Tensor  # (N,), first block of the second scene; 0 where there is one

    def clips(self, index: torch.Tensor, recached_share: float = RECACHED_SHARE) -> Clips:
        latents = self.latents[index].float()
        block = torch.arange(latents.shape[2] // BLOCK, device=latents.device)
        switch = self.switch_block[index][:, None]
        late = block >= switch
        # What is in the cache stays as the first caption has made it ("roll"), or is computed anew ("recache").
        recached = torch.rand(len(index), 1, device=latents.device) < recached_share
        late_context, counts = late | recached, late | ~recached
        # A little noise: generated blocks are never as clean as data; a model that has only seen clean ones drifts.
        level = torch.rand(len(index), 1, 1, 1, 1, device=latents.device) * CONTEXT_NOISE
        context = latents + level * torch.randn_like(latents)
        return Clips(latents, context, self.before[index], self.after[index], late, late_context, counts)

    def batch(self, size: int) -> Clips:
        return self.clips(torch.randint(len(self.latents), (size,), device=self.latents.device))


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    num_clips: int,
    switch_prob: float,
    device: torch.device,
    seed: int,
) -> ClipBank:
    generator = torch.Generator(device).manual_seed(seed)
    latents, before, after, switch_block = [], [], [], []
    num_frames = 1 + 4 * (LATENT_FRAMES - 1)
    mean, std = (
        torch.tensor(s, device=device).view(1, -1, 1, 1, 1) for s in (vae.config.latents_mean, vae.config.latents_std)
    )
    with whole_clips(vae):
        for part in torch.arange(num_clips).split(128):
            batch = sample_batch(len(part), num_frames, generator, device, switch_prob)
            mode = encode_whole(vae, batch["videos"].transpose(1, 2) * 2 - 1).mode()
            latents.append(((mode - mean) / std).half())
            before.append(token_ids(tokenizer, captions(batch["before"])))
            after.append(token_ids(tokenizer, captions(batch["after"])))
            # Block b begins at frame 12 b - 3; 0 is no switch.
            switch_block.append((batch["switch_frame"] + 3) // (4 * BLOCK))
    ids = (torch.cat(before).to(device), torch.cat(after).to(device))
    return ClipBank(torch.cat(latents), *ids, torch.cat(switch_block))


def warp(sigmas: torch.Tensor) -> torch.Tensor:
    return SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)


def per_frame(values: torch.Tensor) -> torch.Tensor:
    """`(B, blocks)` -> `(B, blocks * BLOCK)`."""
    return values.repeat_interleave(BLOCK, dim=1)


def expand(values: torch.Tensor) -> torch.Tensor:
    """`(B, F)` -> `(B, 1, F, 1, 1)`."""
    return values[:, None, :, None, None]


def learnt(errors: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of squared errors `(B, C, F, h, w)` over the blocks that count."""
    per_block = errors.mean(dim=(1, 3, 4)).unflatten(1, (-1, BLOCK)).mean(dim=2)
    return (per_block * counts).sum() / counts.sum()


def train_flow_matching(model: Denoiser, bank: ClipBank, steps: int, batch_size: int, seed: int, resume: Path) -> None:
    """Each block at its own noise level, given the clean blocks before it."""
    device = bank.latents.device

    def errors(latents, *conditions):
        sigmas = per_frame(warp(torch.rand(len(latents), latents.shape[2] // BLOCK, device=device)))
        noise = torch.randn_like(latents)
        flow = model(latents.lerp(noise, expand(sigmas)), sigmas, *conditions)
        return (flow - (noise - latents)) ** 2

    def loss_fn():
        clips = bank.batch(batch_size).without_captions(0.1)
        whole = learnt(errors(clips.latents, clips), clips.counts)
        clips = bank.batch(FIRST_BLOCKS * batch_size).without_captions(0.1)
        return whole + errors(clips.latents[:, :, :BLOCK], None, clips.before).mean()

    optimize("flow matching", model, loss_fn, steps, 1.5e-3, seed, resume)


@torch.no_grad()
def solve_trajectories(
    model: Denoiser, bank: ClipBank, num_clips: int, guidance_scale: float, seed: int
) -> torch.Tensor:
    """The teacher's ODE from noise to video with classifier-free guidance, all blocks of a clip at once, each given
    the clean blocks before it: `(num_clips, len(STEP_SIGMAS) + 1, C, F, h, w)`, the points at the sampler's noise
    levels, and the end, for the first clips of the bank."""
    device = bank.latents.device
    torch.manual_seed(seed)
    levels = warp(torch.linspace(1, 0, ODE_STEPS + 1, device=device))
    keep = [ODE_STEPS - round(s * ODE_STEPS) for s in STEP_SIGMAS] + [ODE_STEPS]
    trajectories = []
    for index in torch.arange(num_clips, device=device).split(1024):
        clips = bank.clips(index, recached_share=0)
        nothing = clips.without_captions()
        sample = torch.randn_like(clips.latents)
        points = []
        for i in range(ODE_STEPS + 1):
            if i in keep:
                points.append(sample.half())
            if i < ODE_STEPS:
                sigmas = levels[i].expand(sample.shape[0], sample.shape[2])
                flow = model(sample, sigmas, nothing)
                flow = flow.lerp(model(sample, sigmas, clips), guidance_scale)
                sample = sample + (levels[i + 1] - levels[i]) * flow
        trajectories.append(torch.stack(points, dim=1))
    return torch.cat(trajectories)


def distill(
    model: Denoiser,
    bank: ClipBank,
    trajectories: torch.Tensor,
    steps: int,
    batch_size: int,
    seed: int,
    resume: Path,
) -> None:
    """From any of the sampler's noise levels straight to the end of the teacher's trajectory."""
    device = bank.latents.device
    levels = warp(torch.tensor(STEP_SIGMAS, device=device))
    model.text_encoder.requires_grad_(False)

    def errors(points, *conditions):
        size, frames = len(points), torch.arange(points.shape[3], device=device)
        which = per_frame(torch.randint(len(STEP_SIGMAS), (size, len(frames) // BLOCK), device=device))
        noisy = points[torch.arange(size, device=device)[:, None], which, :, frames].movedim(1, 2).float()
        sigmas = levels[which]
        flow = model(noisy, sigmas, *conditions)
        return (noisy - expand(sigmas) * flow - points[:, -1]) ** 2

    def loss_fn():
        index = torch.randint(len(trajectories), (batch_size,), device=device)
        clips = bank.clips(index)
        whole = learnt(errors(trajectories[index], clips), clips.counts)
        index = torch.randint(len(trajectories), (FIRST_BLOCKS * batch_size,), device=device)
        return whole + errors(trajectories[index][:, :, :, :BLOCK], None, bank.before[index]).mean()

    optimize("distillation", model, loss_fn, steps, 5e-4, seed, resume)

"""How far 8-bit layers are from the model's own: what it gives of the same noise, before and after."""

from dataclasses import dataclass

import torch
from torchao.quantization import quantize_

from astrolabe_diffusers import CausalWanPipeline
from astrolabe_diffusers.pipelines.quantization import quant_type


@dataclass
class FirstBlock:
    """Of the first block of a video from seed 0, `(1, C, n, h, w)` each."""

    flow: torch.Tensor  # of a single pass, from noise
    latents: torch.Tensor  # after all steps


@torch.no_grad()
def first_block(pipe: CausalWanPipeline, prompt: str, height: int, width: int) -> FirstBlock:
    embeds, device = pipe.encode_prompt(prompt), pipe._execution_device
    scale, num_latents = pipe.vae.config.scale_factor_temporal, pipe.transformer.config.num_frames_per_block
    size = {"height": height, "width": width, "num_frames": 1 + scale * (num_latents - 1)}
    # Of a CPU: the same on all devices and in all dtypes, up to its rounding.
    noise = pipe.prepare_latents(1, **size, device=device, generator=torch.Generator().manual_seed(0))
    dtype = pipe.transformer.dtype
    flow = pipe.transformer(noise.to(dtype), torch.tensor([1000.0], device=device), embeds, return_dict=False)[0]
    generator = torch.Generator().manual_seed(0)
    latents = pipe(prompt_embeds=embeds, **size, latents=noise, generator=generator, output_type="latent").frames
    return FirstBlock(flow, latents)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The length of their difference by that of `expected`."""
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def quantize_blocks(
    pipe: CausalWanPipeline, quantization: str, prompt: str, height: int, width: int
) -> dict[str, float]:
    """Makes the blocks' linear layers those of `quantization`. Returns the errors of the flow and of the latents of
    [`first_block`], relative to what they were."""
    before = first_block(pipe, prompt, height, width)
    quantize_(pipe.transformer.blocks, quant_type(quantization))
    after = first_block(pipe, prompt, height, width)
    return {name: relative_error(getattr(after, name), getattr(before, name)) for name in ("flow", "latents")}

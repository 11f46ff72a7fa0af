"""The yardstick of `training.py --baseline`: the gradient of a step, computed the way the published code computes it.

Astrolabe trains a whole clip as one sequence. This is that way, on the layers of `published_way.py`, with our weights
and our LoRAs, and on its own: what becomes faster in the package does not become faster here. What it has of the
original:

- All frames of a clip have noise of one level, and each block sees those before it with that noise (`context=noisy`),
  in one pass of the whole clip.
- Self-attention is torch's flex attention under a mask of blocks, compiled by itself as there
  (`max-autotune-no-cudagraphs`), on a sequence that is padded to a multiple of 128. The rest is eager. The mask is
  made once. On a CPU, where flex attention has no backward pass, it is torch's plain attention under the same mask.
- Three passes: the old policy's and the reference's without gradients, the current policy's with them. Policies are
  peft's adapters, not merged, and the reference is the model with none.
- The LoRA is in float32, the model in bfloat16, under autocast where the run has bf16.
- Every layer is checkpointed, attention included.
- Positions, text, norms and modulation are computed as `published_way.py` says; the text's keys and values in every
  pass. The clean latents are computed in float64.

What it has not, and what would only add to its time: DDP around the model, and the values that are logged. Attention
to the text is torch's, with the kernel that is asked for, where the original calls flash-attn.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from published_way import PublishedTransformer
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from astrolabe_diffusers import CausalWanTransformer3DModel
from astrolabe_diffusers.training.nft.config import NFTConfig
from astrolabe_diffusers.training.nft.trainer import NFTBatch
from astrolabe_diffusers.training.policies import CURRENT, OLD


TILE = 128  # tokens; sequences are padded to a multiple


@functools.cache
def compiled_flex_attention() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")


class BlockCausalAttention:
    """
    Attention of a clip's tokens to those of their own block and of the blocks before it.

    Args:
        num_tokens: of the clip.
        block_tokens: of a block, which divide it.
        window_tokens: how many a block sees, its own included; all if `None`.
        flex: by flex attention, compiled unless on a CPU; otherwise by torch's plain attention.
    """

    def __init__(
        self, num_tokens: int, block_tokens: int, window_tokens: int | None, device: torch.device, flex: bool
    ):
        self.length = math.ceil(num_tokens / TILE) * TILE
        ends = torch.zeros(self.length, dtype=torch.int64, device=device)
        ends[:num_tokens] = (torch.arange(num_tokens, device=device) // block_tokens + 1) * block_tokens

        def sees(batch, head, query, key):
            seen = key < ends[query]
            if window_tokens is not None:
                seen = seen & (key >= ends[query] - window_tokens)
            return seen | (query == key)  # what is padded sees itself alone

        sizes = None, None, self.length, self.length, device
        if flex:
            attend = compiled_flex_attention() if device.type == "cuda" else flex_attention
            self.attend = functools.partial(attend, block_mask=create_block_mask(sees, *sizes))
        else:
            self.attend = functools.partial(F.scaled_dot_product_attention, attn_mask=create_mask(sees, *sizes))

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`(B, L, heads, head_dim)` each."""
        num_tokens = query.shape[1]
        query, key, value = (
            torch.cat([x, x.new_zeros(len(x), self.length - num_tokens, *x.shape[2:])], dim=1).transpose(1, 2)
            for x in (query, key, value)
        )
        return self.attend(query, key, value)[:, :, :num_tokens].transpose(1, 2)


@contextmanager
def frozen_policy(transformer: CausalWanTransformer3DModel, policy: str) -> Iterator[None]:
    """Inside, without gradients, the adapter of the old policy acts, or of `"base"` none; afterwards the current's."""
    if policy == "base":
        transformer.disable_adapters()
    else:
        transformer.set_adapter(OLD)
    with torch.no_grad():
        yield
    transformer.enable_adapters()
    transformer.set_adapter(CURRENT)


class PublishedTraining:
    """
    Gradients of NFT's loss. In float32 they are those of `context="noisy"`, up to rounding.

    Args:
        transformer: with the policies' adapters, of which the current one is active.
        config: beta and the KL's weight are taken from it.
        latent_size: frames, height and width of the latents.
        autocast: makes the context of a pass.
        kernel: of the attention to the text; torch's choice by default.
    """

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        config: NFTConfig,
        latent_size: tuple[int, int, int],
        autocast: Callable[[], AbstractContextManager],
        kernel: SDPBackend | None = None,
    ):
        self.transformer, self.config, self.autocast = transformer, config, autocast
        self.model = PublishedTransformer(transformer, kernel)
        frames, height, width = latent_size
        frame_tokens = (height // self.model.patch[1]) * (width // self.model.patch[2])
        window = None if self.model.window == -1 else self.model.window * frame_tokens
        self.attention = BlockCausalAttention(
            frames * frame_tokens,
            transformer.config.num_frames_per_block * frame_tokens,
            window,
            self.model.device,
            flex=self.model.device.type == "cuda",
        )

    def accumulate_gradients(self, batch: NFTBatch, samples_per_step: int) -> torch.Tensor:
        """Adds those of the batch, divided by `samples_per_step`, to the current policy's parameters, and returns the
        sum of its losses."""
        config = self.config
        with frozen_policy(self.transformer, "old"):
            old = self.predict(batch)
        with frozen_policy(self.transformer, "base"):
            reference = self.predict(batch)
        current = self.predict(batch)

        def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return ((a - b) ** 2).mean(dim=(1, 2, 3, 4))

        positive = distance(config.beta * current + (1 - config.beta) * old, batch.clean)
        negative = distance((1 + config.beta) * old - config.beta * current, batch.clean)
        policy_loss = batch.optimality * positive + (1 - batch.optimality) * negative
        kl = batch.kl_weight * distance(current, reference)
        loss = (batch.weight * policy_loss + config.kl_weight * kl).sum()
        (loss / samples_per_step).backward()
        return loss.detach()

    def predict(self, batch: NFTBatch) -> torch.Tensor:
        """The clean latents `(B, C, F, h, w)`, as the active policy predicts them from the noisy ones."""
        noisy, dtype = batch.noisy, self.model.dtype
        timestep = batch.timestep[:, None].expand(-1, noisy.shape[2])
        pasts = [self.attention] * len(self.model.layers)
        with self.autocast():
            latents, text = noisy.transpose(1, 2).to(dtype), batch.prompt_embeds.to(dtype)
            flow = self.model(latents, timestep, text, pasts, 0).transpose(1, 2)
        sigma = batch.sigma.double().view(-1, 1, 1, 1, 1)
        return (noisy.double() - sigma * flow.double()).to(noisy.dtype)

"""What pipelines and training need of a transformer, whatever its family."""

from typing import Any, Protocol, runtime_checkable

import torch

from .kv_cache import CausalWanKVCache


class CausalTransformerConfig(Protocol):
    """The values that are read, all as [`CausalWanTransformer3DModel`] has them; `image_dim` is `None`."""

    in_channels: int
    patch_size: tuple[int, int, int]
    num_layers: int
    num_frames_per_block: int
    local_attn_size: int
    sink_size: int
    rope_mode: str
    rope_max_seq_len: int
    image_dim: None


# diffusers compares a pipeline's components with the annotations of its `__init__`.
@runtime_checkable
class CausalTransformer(Protocol):
    """
    A transformer that predicts videos block by block. To be saved, loaded and trained it is also a diffusers
    `ModelMixin`, `ConfigMixin` and `PeftAdapterMixin`; it need not be a subclass of ours.
    """

    config: CausalTransformerConfig
    dtype: torch.dtype
    # Classes that `compile_repeated_blocks` compiles, and whose Linear layers get a LoRA if a run names no modules.
    _repeated_blocks: list[str]

    # May have `packs_blocks`, true if it knows two more cache modes; nothing needs them ([`store_mode`]). And
    # `packs_clips`, true if a pass may have several blocks with a [`ClipKVCache`], in training. And
    # `can_flush`, true if a [`CausalWanRotaryPosEmbed`], its `rope`, rotates its keys in time and its cache may be
    # flushed ([`CausalWanKVCache.flush`]): transitions that move frames need it.

    def new_kv_cache(self, max_frames: int | None = None, past_weight: float = 1.0) -> CausalWanKVCache:
        """An empty cache for one generation."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        kv_cache: CausalWanKVCache | None = None,
        kv_cache_mode: str | None = None,
        frame_offset: int = 0,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """
        The flow, noise minus clean, of `hidden_states` `(B, C, F, H, W)` in the same shape, differentiably; the first
        of a tuple if not `return_dict`.

        With a cache: `kv_cache.begin_block(...)` first; in layer i `kv_cache.get(i).extend(key, value)` for what the
        block sees, `(B, tokens, heads, dim)`, and `store(key, value)` if the mode is `"write"`; then `advance(F)`.
        With `"read"` nothing may change. Without one, all blocks at once, each of which sees those before it. The
        other arguments are as [`CausalWanTransformer3DModel.forward`] has them, `timestep` `(B,)`.

        With `packs_blocks` also the modes `"store"`, which is `"write"` for those who do not look at the flow, and
        `"store+read"`: a clean block, to be stored, followed by a noisy one as long that sees it, whose timestep and
        flow these are. Where `kv_cache.can_pair(...)`: `begin_block(..., paired=True)`, in every layer
        `extend_pair(key, value)`, which stores the first and gives what each of the two sees, and `advance(F / 2)`.

        With `packs_clips` also a [`ClipKVCache`], with `"read"`, `"write"` and `"store"`: several blocks from frame
        `frame_offset` on. `begin_clip(...)` first; in every layer a block sees the part of `keys` and `values` that
        window and sink allow, of clean blocks also those of its own pass, and itself; then as above. And with `"read"`
        `clean_hidden_states`, the clean blocks of the same frames with gradients, which follow those in the cache.
        """


def packs_blocks(transformer: CausalTransformer) -> bool:
    """Whether it knows the cache modes `"store"` and `"store+read"`."""
    return getattr(transformer, "packs_blocks", False)


def packs_clips(transformer: CausalTransformer) -> bool:
    """Whether a pass may have several blocks, with a [`ClipKVCache`]."""
    return getattr(transformer, "packs_clips", False)


def store_mode(transformer: CausalTransformer) -> str:
    """The cache mode that stores a clean block whose flow nobody wants."""
    return "store" if packs_blocks(transformer) else "write"

"""Two experts as one transformer: one denoises, the other writes the cache (Self Gradient Forcing+)."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from .contract import CausalTransformer, CausalTransformerConfig, packs_clips, store_mode
from .kv_cache import CausalWanKVCache
from .kv_cache_clip import ClipKVCache


# What two experts that share a cache have in common: all that the contract names, the shape of a key, and where the
# sink is and what it takes up.
_COMMON = (*CausalTransformerConfig.__annotations__, "num_attention_heads", "attention_head_dim", "text_dim")
_COMMON += ("rope_window", "sink_ema", "upcast_sink_ema", "memory_bank_size")


class ExpertPair(nn.Module):
    """
    A [`CausalTransformer`] of two: noisy blocks (`"read"`) go through `transformer`, and clean ones (`"write"`,
    `"store"`), whose keys and values noisy blocks see, through `memory_transformer`. Both are called with the same
    arguments; there is no `"store+read"`, for a pass has one expert's weights. What the memory expert predicts is not
    computed where it knows `"store"`.

    Adapters are the experts' own: what peft is asked of the pair goes to those that have any.
    """

    packs_blocks = False
    config = property(attrgetter("transformer.config"))
    dtype = property(attrgetter("transformer.dtype"))
    device = property(attrgetter("transformer.device"))

    def __init__(self, transformer: CausalTransformer, memory_transformer: CausalTransformer):
        super().__init__()
        self.transformer, self.memory_transformer = transformer, memory_transformer
        self.training = transformer.training

    @property
    def packs_clips(self) -> bool:
        return packs_clips(self.transformer) and packs_clips(self.memory_transformer)

    @property
    def _repeated_blocks(self) -> list[str]:
        return [*self.transformer._repeated_blocks, *self.memory_transformer._repeated_blocks]

    def new_kv_cache(self, max_frames: int | None = None, past_weight: float = 1.0) -> CausalWanKVCache:
        return self.transformer.new_kv_cache(max_frames, past_weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        kv_cache: CausalWanKVCache | None = None,
        kv_cache_mode: str | None = None,
        clean_hidden_states: torch.Tensor | None = None,
        **kwargs,
    ) -> Any:
        """As [`CausalWanTransformer3DModel.forward`]. With `clean_hidden_states` noisy blocks see what the memory
        expert makes of these, with gradients into both experts. A `ValueError` without these or a cache: then noisy
        blocks would see what the memory expert has not made; or with both."""
        if clean_hidden_states is not None and kv_cache is not None:
            raise ValueError("pass `kv_cache` or `clean_hidden_states`: with two experts these are whole videos.")
        if clean_hidden_states is not None:
            kv_cache, kv_cache_mode = self._store_clip(clean_hidden_states, encoder_hidden_states, **kwargs), "read"
        if kv_cache is None:
            raise ValueError("a memory transformer has no part in a pass without `kv_cache` or `clean_hidden_states`.")
        expert = self.transformer
        if kv_cache_mode != "read":
            expert, kv_cache_mode = self.memory_transformer, store_mode(self.memory_transformer)
        inputs = hidden_states, timestep, encoder_hidden_states
        return expert(*inputs, kv_cache=kv_cache, kv_cache_mode=kv_cache_mode, **kwargs)

    def _store_clip(
        self,
        clean: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        **_,
    ) -> ClipKVCache:
        """The keys and values of a clip's blocks, with their graph. Nothing sees the last one's."""
        cache = ClipKVCache(self.config.num_layers, keeps_graph=True)
        clean = clean[:, :, : -self.config.num_frames_per_block]
        if clean.shape[2]:
            timestep = torch.zeros(len(clean), device=clean.device)
            mode = store_mode(self.memory_transformer)
            inputs = clean, timestep, encoder_hidden_states
            arguments = {"attention_kwargs": attention_kwargs, "return_dict": False}
            self.memory_transformer(*inputs, kv_cache=cache, kv_cache_mode=mode, **arguments)
        return cache

    # What policies ask of a transformer with adapters.

    @property
    def peft_config(self) -> dict[str, Any]:
        configs = [expert.peft_config for expert in adapted_experts(self).values()]
        return configs[0] if configs else {}

    def set_adapter(self, adapter_name: str):
        for expert in adapted_experts(self).values():
            expert.set_adapter(adapter_name)

    def disable_adapters(self):
        for expert in adapted_experts(self).values():
            expert.disable_adapters()

    def enable_adapters(self):
        for expert in adapted_experts(self).values():
            expert.enable_adapters()


def experts_of(transformer: nn.Module) -> dict[str, nn.Module]:
    """The experts of a pair, or a transformer alone, by the names of their components in a pipeline."""
    return dict(transformer.named_children()) if isinstance(transformer, ExpertPair) else {"transformer": transformer}


def adapted_experts(transformer: nn.Module) -> dict[str, nn.Module]:
    """Those of [`experts_of`] that have adapters."""
    experts = experts_of(transformer)
    return {name: expert for name, expert in experts.items() if getattr(expert, "peft_config", None)}


def differences(transformer: CausalTransformer, memory_transformer: CausalTransformer) -> Iterator[str]:
    """In words, by what two experts cannot share a cache."""
    here, there = transformer.config, memory_transformer.config
    for name in _COMMON:
        if here.get(name) != there.get(name):
            yield f"`{name}` is {there.get(name)!r} and not {here.get(name)!r}"
    if here.get("memory_bank_size") and there.get("memory_bank_size"):
        yield "a memory bank is chosen by the text's keys of one transformer, not of two"
    if transformer.dtype != memory_transformer.dtype:
        yield f"its dtype is {memory_transformer.dtype} and not {transformer.dtype}"

"""Attention of the causal Wan transformer: block-causal or cached self-attention, and attention to the text."""

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, _get_qkv_projections
from peft.tuners.tuners_utils import BaseTunerLayer

from .attention import attend, attend_with_shared_past
from .block_layout import BlockLayout
from .block_operations import norm_and_rotate
from .kv_cache import CausalWanKVLayerCache
from .kv_cache_clip import ClipKVLayerCache
from .rotary import Rotary


def _project(
    attn: WanAttention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, `(B, L, dim)` each, before their norms."""
    if attn.fused_projections and any(isinstance(x, BaseTunerLayer) for x in (attn.to_q, attn.to_k, attn.to_v)):
        # They would do nothing.
        raise ValueError("a LoRA needs Q, K and V apart, and they are fused: call unfuse_qkv_projections() first.")
    return _get_qkv_projections(attn, hidden_states, encoder_hidden_states)


def _by_heads(attn: WanAttention, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (attn.heads, -1))


def _project_out(attn: WanAttention, hidden_states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2, 3).to(dtype)))


def text_key(
    attn: WanAttention, encoder_hidden_states: torch.Tensor, kv_cache: CausalWanKVLayerCache
) -> torch.Tensor:
    """Keys `(B, L, heads, head_dim)` of the text, those that the cache keeps if it does."""
    if kv_cache.state.keeps_text and kv_cache.text is not None:
        return kv_cache.text[0]
    if attn.fused_projections:
        key = attn.to_kv(encoder_hidden_states).chunk(2, dim=-1)[0]
    else:
        key = attn.to_k(encoder_hidden_states)
    return _by_heads(attn, attn.norm_k(key).type_as(key))


class CausalWanSelfAttnProcessor:
    """Self-attention of a causal Wan block: dense attention per block over the keys it may see, so every attention
    backend works and no mask is built.

    `kv_cache_mode` is `"read"`, `"write"` or `"store+read"`, of a pair of blocks, as the transformer has them; and in
    the last layer, of what nothing but keys and values is wanted: `"keys"` stores them and attends to nothing,
    `"keys+read"` does this with the first of a pair, and returns the second one's attention.
    """

    _attention_backend = None

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Rotary | None = None,
        layout: BlockLayout | None = None,
        kv_cache: CausalWanKVLayerCache | None = None,
        kv_cache_mode: str | None = None,
    ) -> torch.Tensor | None:
        if kv_cache_mode == "keys" and not attn.fused_projections:
            query, key, value = None, attn.to_k(hidden_states), attn.to_v(hidden_states)
        else:
            query, key, value = _project(attn, hidden_states)
        key, value = norm_and_rotate(attn.norm_k, key, rotary_emb, attn.heads), _by_heads(attn, value)
        if kv_cache_mode == "keys":
            kv_cache.store(key, value)
            return None
        query = norm_and_rotate(attn.norm_q, query, rotary_emb, attn.heads)
        if kv_cache_mode in ("store+read", "keys+read"):
            views = kv_cache.extend_pair(key, value)
            queries = query.chunk(2, dim=1)
            wanted = slice(1, 2) if kv_cache_mode == "keys+read" else slice(2)
            attended = [
                attend(own_query, *seen, backend=self._attention_backend)
                for own_query, seen in zip(queries[wanted], views[wanted])
            ]
            hidden_states = torch.cat(attended, dim=1)
        elif layout is not None:
            hidden_states = self._block_causal(query, key, value, layout, kv_cache)
        else:
            own = kv_cache.extend(key, value)
            if kv_cache.past is None:
                hidden_states = attend(query, *own, attention_mask, self._attention_backend)
            else:
                hidden_states = attend_with_shared_past(query, kv_cache.past, own, self._attention_backend)
        if kv_cache_mode == "write":
            kv_cache.store(key, value)
        return _project_out(attn, hidden_states, query.dtype)

    def _block_causal(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: BlockLayout,
        kv_cache: ClipKVLayerCache | None,
    ) -> torch.Tensor:
        n, unit = layout.block_frames, layout.unit
        # Split once, then join what a block sees: the gradient of a split is one concatenation, while every slice of
        # the whole sequence would cost a gradient of its full size.
        keys, values = (x.split(unit * layout.frame_tokens, dim=1) for x in (key, value))
        # What may be context, from the clip's first frame on. Noisy blocks lie behind all that they see of it.
        clean_keys, clean_values = keys, values
        if kv_cache is not None:
            clean_keys, clean_values = (*kv_cache.keys, *keys), (*kv_cache.values, *values)
        sinks = layout.sinks(clean_keys, clean_values)
        outputs = []
        for index, own_query in enumerate(query.split(n * layout.frame_tokens, dim=1)):
            # With teacher forcing the second half are the noisy frames; the context of both is the clean half.
            block = index % len(layout.sink_shifts)
            start = layout.first_frame + block * n
            own = slice(index * n // unit, (index + 1) * n // unit)
            context = layout.units(layout.context(start, start + n))
            context_keys, context_values = ([units[i] for i in context] for units in (clean_keys, clean_values))
            if sinks[block] is not None:
                context_keys[: layout.sink_units], context_values[: layout.sink_units] = sinks[block]
            seen = [*context_keys, *keys[own]], [*context_values, *values[own]]
            outputs.append(self._attend_to_units(own_query, *seen))
        return torch.cat(outputs, dim=1)

    def _attend_to_units(
        self, query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> torch.Tensor:
        # Of what the videos share there is one for all.
        shared = [len(key) < len(query) for key in keys]
        own = [torch.cat([x for x, one in zip(units, shared) if not one], dim=1) for units in (keys, values)]
        if not any(shared):
            return attend(query, *own, backend=self._attention_backend)
        past = [torch.cat([x for x, one in zip(units, shared) if one], dim=1) for units in (keys, values)]
        return attend_with_shared_past(query, past, own, self._attention_backend)


class CausalWanCrossAttnProcessor:
    """Attention to the text, whose keys and values a cache may keep ([`CausalWanKVCache.set_text`])."""

    _attention_backend = None

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
        kv_cache: CausalWanKVLayerCache | None = None,
    ) -> torch.Tensor:
        # What is cached carries no graph: with grad the text is projected anew, or its weights would never learn.
        keep = kv_cache is not None and kv_cache.state.keeps_text and not torch.is_grad_enabled()
        if keep and kv_cache.text is not None:
            query = attn.to_q(hidden_states)
            key, value = kv_cache.text
        else:
            query, key, value = _project(attn, hidden_states, encoder_hidden_states)
            key, value = _by_heads(attn, attn.norm_k(key).type_as(key)), _by_heads(attn, value)
            if keep:
                kv_cache.text = key, value
        query = _by_heads(attn, attn.norm_q(query).type_as(query))
        hidden_states = attend(query, key, value, backend=self._attention_backend)
        return _project_out(attn, hidden_states, query.dtype)

"""Block-wise causal Wan transformer with a KV cache."""

from inspect import signature, unwrap
from os import PathLike
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel, WanTransformerBlock
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import close_matches
from ..layouts.published_models import PublishedModel, find_published_model
from ..layouts.tensor_files import HUB_ARGUMENTS, fetch_link
from ..layouts.wan_checkpoints import check_fits, infer_config, load_original_weights
from ..registration import register_with_diffusers
from .attention_causal_wan import CausalWanCrossAttnProcessor, CausalWanSelfAttnProcessor, text_key
from .block_layout import BlockLayout
from .block_operations import add_gated, norm_and_modulate
from .kv_cache import CausalWanKVCache, CausalWanKVLayerCache
from .kv_cache_clip import ClipKVCache
from .kv_cache_ema_sink import EMASinkKVCache, SinkEMA
from .kv_cache_memory_bank import BANK_UPDATES, MemoryBank, MemoryBankKVCache, MemoryBankState
from .lora_layers import (
    apply_lora_scale,
    check_lora_weights,
    check_no_loose_lora,
    check_nothing_fused,
    lora_lock,
    plain_state_dict,
    put_back_loose_weights,
    recomputed,
    scale_to_fuse,
    tuner_layers,
)
from .module_calls import forward_of
from .rotary import CausalWanRotaryPosEmbed, Rotary, sinusoids


# What each layer does in a pass with this `kv_cache_mode`, the last one apart: of a clean block whose output nobody
# wants it gives only the keys and values.
_LAYER_MODES = {
    None: (None, None),
    "read": ("read", "read"),
    "write": ("write", "write"),
    "store": ("write", "keys"),
    "store+read": ("store+read", "keys+read"),
}


class CausalWanTimesteps(nn.Module):
    """Sinusoidal embedding `[cos, sin]` of timesteps `(N,)`."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.num_channels = num_channels

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.cat(sinusoids(timesteps, self.num_channels), dim=-1)


class CausalWanTransformerBlock(WanTransformerBlock):
    """A Wan block whose modulation is per frame and whose self-attention is block-causal or cached."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attn1.set_processor(CausalWanSelfAttnProcessor())
        self.attn2.set_processor(CausalWanCrossAttnProcessor())
        # The table goes through it, so that a LoRA can add to it (`LoraDiff`).
        self.modulation = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: Rotary,
        layout: BlockLayout | None = None,
        kv_cache: CausalWanKVLayerCache | None = None,
        kv_cache_mode: str | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens `(B, L, dim)` to tokens; where keys and values are all that is wanted, they are returned as they are
        ([`CausalWanSelfAttnProcessor`])."""
        # (B, frames or 1, 1, dim) each, broadcast over the tokens of a frame
        shift_msa, scale_msa, gate_msa, c_shift_msa, c_scale_msa, c_gate_msa = (
            self.modulation(self.scale_shift_table).unsqueeze(0) + temb.float()
        ).chunk(6, dim=2)

        if kv_cache is not None and kv_cache.needs_text_key(kv_cache_mode):
            kv_cache.see_text(text_key(self.attn2, encoder_hidden_states, kv_cache))
        norm_hidden_states = norm_and_modulate(self.norm1, hidden_states, scale_msa, shift_msa)
        past = {"layout": layout, "kv_cache": kv_cache, "kv_cache_mode": kv_cache_mode}
        attn_output = self.attn1(norm_hidden_states, None, attention_mask, rotary_emb, **past)
        if kv_cache_mode == "keys":
            return hidden_states
        if kv_cache_mode == "keys+read":
            unchanged, hidden_states = hidden_states.chunk(2, dim=1)
            modulation = (gate_msa, c_shift_msa, c_scale_msa, c_gate_msa)
            gate_msa, c_shift_msa, c_scale_msa, c_gate_msa = (x.chunk(2, dim=1)[1] for x in modulation)
        hidden_states = add_gated(hidden_states, attn_output, gate_msa)

        norm_hidden_states = norm_and_modulate(self.norm2, hidden_states)
        hidden_states = hidden_states + self.attn2(norm_hidden_states, encoder_hidden_states, kv_cache=kv_cache)

        norm_hidden_states = norm_and_modulate(self.norm3, hidden_states, c_scale_msa, c_shift_msa)
        hidden_states = add_gated(hidden_states, self.ffn(norm_hidden_states), c_gate_msa)
        return torch.cat([unchanged, hidden_states], dim=1) if kv_cache_mode == "keys+read" else hidden_states


class CausalWanTransformer3DModel(WanTransformer3DModel):
    r"""
    Wan2.1 transformer that generates a video block by block: full attention inside a block, and from a block to the
    clean blocks before it (Self-Forcing and its descendants).

    Parameters have the names of diffusers' [`WanTransformer3DModel`], so that stock Wan folders, single files and LoRA
    load. The arguments are those of the stock class and:

    Args:
        num_frames_per_block (`int`, defaults to 3): latent frames in a block.
        sink_size (`int`, defaults to 0): first latent frames that stay visible when the window moves on.
        local_attn_size (`int`, defaults to -1):
            Latent frames a block can see, itself and the sink included; -1 for all.
        rope_mode (`str`, defaults to `"absolute"`):
            `"absolute"`: a frame keeps the position of its index, which must stay below `rope_max_seq_len`.
            `"relative"`: once the window moves, the sink is placed right before it, so that no distance exceeds the
            window and the video may go on for ever.
        rope_window (`int`, *optional*):
            Of `"relative"`: positions that sink and window have between them, `local_attn_size` if not given. With
            more the sink is moved later, and there is a gap between it and the window (Self Gradient Forcing).
        sink_ema (`float`, *optional*):
            Decay, in (0, 1), with which the sink takes up the frames that leave the window (Reward Forcing); by
            default it stays as it is. See [`SinkEMA`].
        upcast_sink_ema (`bool`, defaults to `True`):
            Keep that sink in float32. The release keeps it in the cache's type: in bfloat16 it hardly ever changes.
        memory_bank_size (`int`, defaults to 0):
            Earlier latent frames, chosen by the text, that a block sees beside sink and window (MemFlow). Needs a
            window and absolute positions. Blocks then take a pass each, with a cache.
        memory_bank_interval (`int`, defaults to 3): of so many blocks, one has its first frame recorded for the bank.
        memory_bank_update (`str`, defaults to `"once"`):
            `"once"`: each recorded frame enters the bank once. `"interactive"` and `"single_prompt"`: as MemFlow's two
            pipelines, with copies of frames; see [`MemoryBank`].
    """

    # A subclass with blocks of its own names them in `_repeated_blocks` too: their Linear layers get a LoRA.
    block_class = CausalWanTransformerBlock
    _no_split_modules = ["CausalWanTransformerBlock"]
    _repeated_blocks = ["CausalWanTransformerBlock"]
    _skip_keys = ["kv_cache"]
    _cp_plan = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        register_with_diffusers(cls)

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        num_frames_per_block: int = 3,
        sink_size: int = 0,
        local_attn_size: int = -1,
        rope_mode: str = "absolute",
        rope_window: int | None = None,
        sink_ema: float | None = None,
        upcast_sink_ema: bool = True,
        memory_bank_size: int = 0,
        memory_bank_interval: int = 3,
        memory_bank_update: str = "once",
    ) -> None:
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError("image-conditioned Wan checkpoints (`image_dim`, `added_kv_proj_dim`) are not supported.")
        counts = dict.fromkeys(("num_attention_heads", "attention_head_dim", "num_layers", "rope_max_seq_len"), 1)
        counts |= {"num_frames_per_block": 1, "sink_size": 0, "local_attn_size": -1}
        for name, least in (counts | {"memory_bank_size": 0, "memory_bank_interval": 1}).items():
            value = self.config[name]
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, but is {value!r}.")
        if rope_mode not in ("absolute", "relative"):
            raise ValueError(f"`rope_mode` must be one of ('absolute', 'relative') but is {rope_mode!r}.")
        check_window(self.config)
        if memory_bank_update not in BANK_UPDATES:
            raise ValueError(f"`memory_bank_update` must be one of {BANK_UPDATES} but is {memory_bank_update!r}.")
        # The parent builds everything but the blocks, whose class is ours.
        stock = signature(WanTransformer3DModel.__init__).parameters.keys() & self.config.keys()
        super().__init__(**{name: self.config[name] for name in stock} | {"num_layers": 0})
        self.register_to_config(num_layers=num_layers)
        inner_dim = num_attention_heads * attention_head_dim
        self.blocks = nn.ModuleList(
            self.block_class(inner_dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        self.rope = CausalWanRotaryPosEmbed(attention_head_dim, patch_size, rope_max_seq_len)
        self.condition_embedder.timesteps_proj = CausalWanTimesteps(freq_dim)
        self.modulation = nn.Identity()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike, output_loading_info: bool = False, **kwargs
    ) -> "CausalWanTransformer3DModel":
        """As the parent's, which would leave tensors that the files lack without values, and saved quantised weights
        in another dtype than the rest: a `ValueError` here."""
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"the transformer of {pretrained_model_name_or_path} lacks {len(missing)} tensors: {names}."
            )
        for dtype in {p.dtype for p in model.parameters() if is_traceable_wrapper_subclass(p)} - {model.dtype}:
            raise ValueError(
                f"the transformer of {pretrained_model_name_or_path} was quantised in {dtype}: load it in that, not "
                f"in {model.dtype}."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | PathLike | dict[str, Any],
        *,
        recipe: str | None = None,
        weights: str | tuple[str, ...] = (),
        config: str | PathLike | None = None,
        subfolder: str = "transformer",
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        low_cpu_mem_usage: bool = True,
        disable_mmap: bool = False,
        revision: str | None = None,
        config_revision: str | None = None,
        **kwargs,
    ) -> "CausalWanTransformer3DModel":
        r"""
        Load a checkpoint in its original layout, or in that of Diffusers, ComfyUI or DiffSynth.

        Args:
            pretrained_model_link_or_path_or_dict:
                Path or Hub link of a safetensors or torch file, path of a folder of shards or of their index, or what
                such a file holds. 8-bit weights are multiplied by their scales; their files become float32.
            recipe: the published model that it is, of `PUBLISHED_MODELS`, or the YAML file that says what one is: the
                entry that its authors load is taken, and the config gets its block, window and sink. Sigmas are the
                pipeline's.
            weights: the entry of a training checkpoint that holds the model, or several of which the first found is
                taken. A file with several that may be meant needs this or `recipe`.
            config: pipeline folder or Hub id whose transformer's config (in `subfolder`) is taken; sizes are read off
                the tensors by default.
            dtype: of the parameters, those that diffusers keeps in float32 excepted. `torch_dtype` is its older name.
            low_cpu_mem_usage: has no effect: weights are never initialised.
            disable_mmap: read files whole instead of through a memory map.
            revision, config_revision: of the file and of `config` on the Hub.
            kwargs: of `HUB_ARGUMENTS`, for downloads; and config values, such as `num_frames_per_block=1`, which go
                before those of `config` and `recipe`.

        Raises:
            ValueError: an argument is not known; the file is no checkpoint or holds several models; tensors are
                missing, unexpected or of another shape. The message names them.
        """
        dtype = torch_dtype if dtype is None else dtype
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        cls._check_single_file_arguments(dtype, kwargs)
        published = None if recipe is None else find_published_model(recipe)
        checkpoint = pretrained_model_link_or_path_or_dict
        if not isinstance(checkpoint, dict):
            checkpoint = fetch_link(checkpoint, revision=revision, **hub)
        original = load_original_weights(checkpoint, weights, published, map_files=not disable_mmap)
        if config:
            sizes = cls.load_config(config, subfolder=subfolder, revision=config_revision, **hub)
        else:
            sizes = infer_config(original.tensors, kwargs.get("attention_head_dim", 128))
        with init_empty_weights():
            model = cls.from_recipe(sizes, published, **kwargs) if published else cls.from_config(sizes, **kwargs)
        check_fits(original.tensors, {name: tensor.shape for name, tensor in model.state_dict().items()})
        tensors = {}
        for name in original.tensors:
            keep = dtype is not None and not set(name.split(".")).isdisjoint(cls._keep_in_fp32_modules)
            # A copy: the file may be replaced while its memory map is in use.
            tensors[name] = original.value(name).to(device, torch.float32 if keep else dtype, copy=True)
        model.load_state_dict(tensors, assign=True)
        return model.to(device).eval() if device is not None else model.eval()

    @classmethod
    def from_recipe(cls, sizes: dict[str, Any], recipe: PublishedModel, **kwargs) -> "CausalWanTransformer3DModel":
        """A model of these sizes, as `from_config`, with what a recipe says of it; `kwargs` go before either."""
        recipe.check_names("transformer", cls._get_init_keys(cls) - {"self"})
        return cls.from_config(sizes, **recipe.transformer | kwargs)

    @classmethod
    def _check_single_file_arguments(cls, dtype: Any, config: dict[str, Any]):
        known = cls._get_init_keys(cls) - {"self"}
        for name in config.keys() - known:
            arguments = known | set(signature(cls.from_single_file).parameters) | set(HUB_ARGUMENTS)
            raise ValueError(
                f"{cls.__name__}.from_single_file takes no `{name}`{close_matches(name, arguments)}; it takes its own "
                "arguments and the values of the model's config."
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"`dtype` must be a floating-point torch.dtype, such as torch.bfloat16, not {dtype!r}.")

    @property
    def packs_blocks(self) -> bool:
        """
        Whether the cache modes `"store"` and `"store+read"` may be used: where all that is given the mode is ours, the
        forwards of model, blocks and self-attention, and the processors of that. What a user puts in the place of one
        gets `"read"` and `"write"`; a subclass in which it knows the others too says `packs_blocks = True`.
        """
        return self._is_ours()

    @property
    def packs_clips(self) -> bool:
        """Likewise whether it may be given a [`ClipKVCache`]; a subclass that knows it says `packs_clips = True`."""
        return self._is_ours() and not self.config.memory_bank_size

    def _is_ours(self) -> bool:
        # Accelerate and autocast wrap a whole model's forward, and leave alone what it is given.
        return unwrap(self.forward) in _KNOW_ALL_MODES and all(
            forward_of(block) in _KNOW_ALL_MODES
            and forward_of(block.attn1) in _KNOW_ALL_MODES
            and type(block.attn1.processor).__call__ in _KNOW_ALL_MODES
            for block in self.blocks
        )

    def new_kv_cache(self, max_frames: int | None = None, past_weight: float = 1.0) -> CausalWanKVCache:
        config = self.config
        if (ema := self._sink_ema()) is not None:
            return EMASinkKVCache(config.num_layers, ema, max_frames, past_weight)
        if config.memory_bank_size:
            bank = MemoryBank(config.memory_bank_size, config.memory_bank_interval, config.memory_bank_update)
            return MemoryBankKVCache(config.num_layers, max_frames, past_weight, bank)
        return CausalWanKVCache(config.num_layers, max_frames, past_weight)

    @property
    def can_flush(self) -> bool:
        """
        Whether the transitions that forget a part of the window are possible: not where a sink takes up what leaves
        it, or a memory bank has its places beside it.
        """
        return self._sink_ema() is None and not self.config.memory_bank_size

    def _sink_ema(self) -> SinkEMA | None:
        config = self.config
        # Training may take window or sink away.
        if config.sink_ema is None or config.sink_size == 0 or config.local_attn_size == -1:
            return None
        return SinkEMA(config.sink_ema, config.sink_size, config.upcast_sink_ema, self.rope)

    def set_adapters(self, adapter_names: list[str] | str, weights=None):
        """As the parent's. Weights that are not finite are refused, others than 1 of a DoRA, and all while a LoRA is
        fused."""
        layers = tuner_layers(self)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = weights if isinstance(weights, list) else [weights] * len(names)
        for name, weight in zip(names, given):
            values = weight.values() if isinstance(weight, dict) else [1.0 if weight is None else weight]
            check_lora_weights(layers, values, [name])
        with lora_lock(self):
            check_nothing_fused(layers)
            super().set_adapters(adapter_names, weights)

    def disable_lora(self):
        """As the parent's. What is fused is taken out at once; peft waits for the next call."""
        self._unfuse_what_is_fused()
        super().disable_lora()

    def disable_adapters(self):
        """As `disable_lora`."""
        self._unfuse_what_is_fused()
        super().disable_adapters()

    def _unfuse_what_is_fused(self):
        if any(layer.merged for layer in tuner_layers(self)):
            self.unfuse_lora()

    def compile_repeated_blocks(self, *args, **kwargs):
        # Reading, writing or both, with a cache or none, in the last layer or not, text kept or new, one video or a
        # batch, one LoRA or another: more than torch's 8 graphs.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        super().compile_repeated_blocks(*args, **kwargs)

    def fuse_lora(self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None):
        """As the parent's, but `lora_scale` ends with `unfuse_lora`, and is refused like a weight. Quantised weights
        are refused: they would be rounded anew, here and by `unfuse_lora`. So is a LoRA that is disabled."""
        if getattr(self, "is_quantized", False):
            raise ValueError(
                "a LoRA cannot be fused into quantised weights: fuse it before they are, or leave it loose."
            )
        layers = tuner_layers(self)
        check_lora_weights(layers, [lora_scale], adapter_names)
        if any(layer.disable_adapters for layer in layers):
            raise ValueError("a LoRA that is disabled cannot be fused: call enable_lora() first.")
        with lora_lock(self):
            scale_to_fuse(layers, lora_scale, adapter_names)
            try:
                super().fuse_lora(safe_fusing=safe_fusing, adapter_names=adapter_names)
            finally:
                put_back_loose_weights(layers)

    def unfuse_lora(self):
        """As the parent's; the LoRAs have the weights that they had before they were fused."""
        with lora_lock(self):
            super().unfuse_lora()
            put_back_loose_weights(tuner_layers(self))

    def enable_cache(self, config):
        """Raises a `ValueError`: what Diffusers' caches skip are passes of a model without a KV cache."""
        raise ValueError(
            f"{type(config).__name__} skips attention or blocks in some steps, and this model's blocks see what every "
            "pass has stored: it has no such cache."
        )

    def fuse_qkv_projections(self):
        if any(tuner_layers(block) for block in self.blocks):
            raise ValueError("a LoRA needs Q, K and V apart: call unload_lora_weights() before they are fused.")
        super().fuse_qkv_projections()

    def save_pretrained(self, save_directory: str | PathLike, *args, **kwargs):
        """As the parent's. A fused LoRA is saved as the weights that it has made; one that is loaded and not fused has
        no place in a transformer's file, and is refused."""
        check_no_loose_lora(self)
        plain = self
        if tuner_layers(self):
            with init_empty_weights():
                plain = type(self).from_config(self.config)
            plain.load_state_dict(plain_state_dict(self), assign=True)
            plain.hf_quantizer = getattr(self, "hf_quantizer", None)
        super(CausalWanTransformer3DModel, plain).save_pretrained(save_directory, *args, **kwargs)

    @apply_lora_scale
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        *,
        kv_cache: CausalWanKVCache | None = None,
        kv_cache_mode: str | None = None,
        frame_offset: int = 0,
        clean_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Predict the flow `noise - clean` of `hidden_states`.

        Without a cache, all blocks of a video are computed at once, each seeing the blocks before it that window and
        sink allow; with `clean_hidden_states` it sees those clean blocks, at t = 0, instead of the noisy ones (teacher
        forcing). With a cache, the input is one block of any number of frames that sees the cached frames and itself;
        with a [`ClipKVCache`] any number of blocks, each of which sees the clean ones before it and itself; these are
        then in the cache, or, from the pass's first frame on, `clean_hidden_states`.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, F, H, W)`): noisy latents.
            timestep (`torch.Tensor` of shape `(B,)` or `(B, F)`): 0 (clean) to 1000 (noise), fractions included.
            encoder_hidden_states (`torch.Tensor` of shape `(B, L, text_dim)`): text embeddings.
            kv_cache ([`CausalWanKVCache`], *optional*): the clean blocks so far.
            kv_cache_mode (`str`, *optional*):
                `"read"`: attend to the cache and leave it as it is (with grad, its contents are constants; run the
                backward pass before the next write). `"write"`: also store this block, which should then be clean.
                `"store"`: store it and return nothing, which saves most of the last layer. `"store+read"`, without
                grad: two blocks in one pass where [`CausalWanKVCache.can_pair`] says so. `hidden_states` are a clean
                block, which is stored, followed by one as long, which sees it; `timestep` is the second one's, and so
                is what is returned.
            frame_offset (`int`):
                Latent frame index of the first frame; with a cache, the number of frames in it. With a [`ClipKVCache`]
                noisy blocks may begin earlier.
            clean_hidden_states (`(B, C, F, H, W)`, *optional*):
                The clean video, for teacher forcing, with gradients; where a [`ClipKVCache`] is read, that of the
                frames from `frame_offset` on, and the cache has those before.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` multiplies the weights of the LoRAs, in this call.

        Returns:
            [`Transformer2DModelOutput`] or a tuple with the flow, `(B, C, F, H, W)`; of the second block alone with
            `"store+read"`, and `None` with `"store"`.
        """
        size = hidden_states.shape[2:]
        forced = clean_hidden_states is not None
        if forced and kv_cache is not None and not (isinstance(kv_cache, ClipKVCache) and kv_cache_mode == "read"):
            raise ValueError(
                "pass `kv_cache` or `clean_hidden_states`: both are the clean blocks to attend to; a `ClipKVCache` "
                "that is read may have those before them."
            )
        layout = self._begin_pass(hidden_states, kv_cache, kv_cache_mode, frame_offset, forced)
        timestep = timestep.unsqueeze(1) if timestep.ndim == 1 else timestep  # (B, 1) or (B, F)
        rotary_emb = self.rope(hidden_states, frame_offset)
        hidden_states = self._embed(hidden_states)
        if forced:
            hidden_states = torch.cat([self._embed(clean_hidden_states), hidden_states], dim=1)
            rotary_emb = tuple(torch.cat([table, table], dim=1) for table in rotary_emb)
            timestep = timestep.expand(-1, size[0])
        paired = kv_cache_mode == "store+read"
        if paired or forced:
            timestep = torch.cat([torch.zeros_like(timestep), timestep], dim=1)
        temb, timestep_proj = self._embed_time(timestep, encoder_hidden_states.dtype)
        # The keys of cached text are all that is used of it.
        if kv_cache is None or not kv_cache.begin_text(encoder_hidden_states, self):
            encoder_hidden_states = self.condition_embedder.text_embedder(encoder_hidden_states)

        inputs = (encoder_hidden_states, timestep_proj, rotary_emb, layout)
        hidden_states = self._run_blocks(hidden_states, inputs, kv_cache, kv_cache_mode)
        if paired:
            size = (size[0] // 2, *size[1:])
        if kv_cache_mode not in (None, "read"):
            kv_cache.advance(size[0])
        if kv_cache_mode == "store":
            return Transformer2DModelOutput(sample=None) if return_dict else (None,)
        if paired or forced:
            hidden_states, temb = hidden_states.chunk(2, dim=1)[1], temb.chunk(2, dim=1)[1]
        output = self._project_out(hidden_states, temb, size)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _begin_pass(
        self,
        latents: torch.Tensor,
        kv_cache: CausalWanKVCache | None,
        kv_cache_mode: str | None,
        frame_offset: int,
        forced: bool,
    ) -> BlockLayout | None:
        """Check a pass and prepare its cache; what each block sees if it may have several."""
        batch_size, _, num_frames, height, width = latents.shape
        _, p_h, p_w = self.config.patch_size
        frame_tokens = (height // p_h) * (width // p_w)
        relative = self.config.rope_mode == "relative"
        if not relative and frame_offset + num_frames > self.config.rope_max_seq_len:
            raise ValueError(
                f"latent frame {frame_offset + num_frames - 1} passes the model's {self.config.rope_max_seq_len} "
                "absolute positions: make a shorter video or use a model with rope_mode='relative'."
            )
        if self.config.memory_bank_size and not (kv_cache and isinstance(kv_cache.state, MemoryBankState)):
            raise ValueError("a model with a memory bank takes a block a pass, with a `kv_cache` of `new_kv_cache()`.")
        if kv_cache is None:
            if kv_cache_mode is not None:
                raise ValueError(f"`kv_cache_mode={kv_cache_mode!r}` needs a `kv_cache`.")
            return self._block_layout(num_frames, frame_tokens, latents.device)
        packs_clip = isinstance(kv_cache, ClipKVCache)
        modes = ("read", "write", "store") if packs_clip else tuple(_LAYER_MODES)[1:]
        if kv_cache_mode not in modes:
            raise ValueError(f"`kv_cache_mode` must be one of {modes} but is {kv_cache_mode!r}.")
        if packs_clip:
            layout = self._block_layout(num_frames, frame_tokens, latents.device, frame_offset, kv_cache.num_taken)
            shape = (batch_size, height, width)
            kv_cache.begin_clip(layout, shape, stores=kv_cache_mode != "read", brings_clean=forced)
            return layout
        if isinstance(kv_cache, EMASinkKVCache) != (self._sink_ema() is not None):
            raise ValueError("`kv_cache` must be of the model's `new_kv_cache()`: `sink_ema` needs one of its own.")
        paired = kv_cache_mode == "store+read"
        if paired and relative:
            # Where the first block sees it.
            kv_cache.place_sink(frame_offset + num_frames // 2 - self._rope_window, self.rope, latents.device)
        shape = (batch_size, height, width)
        kv_cache.begin_block(frame_offset, num_frames, frame_tokens, shape, self.config, paired)
        if relative:
            kv_cache.place_sink(frame_offset + num_frames - self._rope_window, self.rope, latents.device)
        return None

    @property
    def _rope_window(self) -> int:
        return self.config.rope_window or self.config.local_attn_size

    def _embed(self, latents: torch.Tensor) -> torch.Tensor:
        return self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()

    def _embed_time(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Of timesteps `(B, frames or 1)`: `(B, frames or 1, dim)` and the blocks' modulation `(..., 6, dim)`."""
        embedder = self.condition_embedder
        time_dtype = embedder.time_embedder.linear_1.weight.dtype
        temb = embedder.time_embedder(embedder.timesteps_proj(timestep.flatten()).to(time_dtype))
        temb = temb.to(dtype).unflatten(0, timestep.shape)
        return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(2, (6, -1))

    def _run_blocks(
        self, hidden_states: torch.Tensor, inputs: tuple, kv_cache: CausalWanKVCache | None, kv_cache_mode: str | None
    ) -> torch.Tensor:
        mask = None
        if kv_cache_mode == "read":
            mask = kv_cache.attention_mask(hidden_states.shape[1], hidden_states.device, hidden_states.dtype)
        # A checkpointed block runs twice: it must not write, but where what it writes is done with by then.
        writes = kv_cache_mode not in (None, "read")
        may_run_twice = not writes or kv_cache.keeps_graph
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing and may_run_twice
        mode, last_mode = _LAYER_MODES[kv_cache_mode]
        for i, block in enumerate(self.blocks):
            layer_cache = None if kv_cache is None else kv_cache.get(i)
            args = (*inputs, layer_cache, last_mode if i + 1 == len(self.blocks) else mode, mask)
            if checkpointing:
                hidden_states = self._gradient_checkpointing_func(recomputed(block), hidden_states, *args)
            else:
                hidden_states = block(hidden_states, *args)
            if writes:
                kv_cache.commit(i)
        return hidden_states

    def _project_out(self, hidden_states: torch.Tensor, temb: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """Tokens to latents `(B, C, *size)`."""
        shift, scale = (self.modulation(self.scale_shift_table).unsqueeze(0) + temb.unsqueeze(2)).chunk(2, dim=2)
        normed = self.norm_out(hidden_states.float()).unflatten(1, (temb.shape[1], -1)) * (1 + scale) + shift
        hidden_states = self.proj_out(normed.flatten(1, 2).type_as(hidden_states))
        patch = self.config.patch_size
        grid = [length // p for length, p in zip(size, patch)]
        hidden_states = hidden_states.unflatten(2, (*patch, -1)).unflatten(1, grid)
        return hidden_states.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _block_layout(
        self, num_frames: int, frame_tokens: int, device: torch.device, first_frame: int = 0, num_taken: int = 0
    ) -> BlockLayout:
        n, attn_window = self.config.num_frames_per_block, self.config.local_attn_size
        sink_size = self.config.sink_size if attn_window != -1 else 0
        if num_frames % n != 0:
            raise ValueError(f"{num_frames} latent frames are no whole number of blocks of {n} frames.")
        moves_sink = self.config.rope_mode == "relative" and sink_size
        # A list: of a dict, torch.compile does not guard that a block's number is no key.
        shifts = [
            self.rope.shift(end - self._rope_window, device) if moves_sink and end > self._rope_window else None
            for end in range(first_frame + n, first_frame + num_frames + 1, n)
        ]
        ema = self._sink_ema()
        return BlockLayout(frame_tokens, n, attn_window, sink_size, shifts, first_frame, ema, num_taken)


def check_window(config):
    """Raises a `ValueError` if what a transformer's config says of window, sink and positions does not go together."""
    window, sink_size, relative = config.local_attn_size, config.sink_size, config.rope_mode == "relative"
    least = sink_size + config.num_frames_per_block
    if window != -1 and window < least:
        raise ValueError(
            f"`local_attn_size` must be -1 or at least `sink_size + num_frames_per_block` = {least}, but is {window}."
        )
    # A transformer of one's own need not have these.
    rows, ema, bank_size = (config.get(name) for name in ("rope_window", "sink_ema", "memory_bank_size"))
    if rows is not None and not (relative and window != -1):
        raise ValueError(
            f"`rope_window={rows!r}` needs rope_mode='relative' and a window, `local_attn_size`, but they are "
            f"{config.rope_mode!r} and {window}."
        )
    if rows is not None and (not isinstance(rows, int) or rows < window):
        raise ValueError(
            f"`rope_window` must be None or a whole number of at least `local_attn_size` = {window}, but is {rows!r}."
        )
    if ema is not None and not (0 < ema < 1 and sink_size > 0 and window != -1):
        raise ValueError(
            f"`sink_ema` must be a decay in (0, 1) and needs a `sink_size` and a `local_attn_size`, but they are "
            f"{ema}, {sink_size} and {window}; `None` is a sink that stays as it is."
        )
    if bank_size and (window == -1 or relative or ema is not None):
        raise ValueError(
            f"`memory_bank_size={bank_size}` needs a `local_attn_size` other than -1, no `sink_ema` and "
            "`rope_mode='absolute'`: the bank has frames that leave the window, at their own positions."
        )


_KNOW_ALL_MODES = {
    unwrap(CausalWanTransformer3DModel.forward),
    CausalWanTransformerBlock.forward,
    WanAttention.forward,
    CausalWanSelfAttnProcessor.__call__,
}

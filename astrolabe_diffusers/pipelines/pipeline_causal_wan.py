"""Text-to-video with causal Wan models, block by block."""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchLCMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from ..layouts.experts import EXPERTS
from ..models.contract import CausalTransformer
from ..models.expert_pair import ExpertPair, differences
from ..models.latent_frames import num_frames_of, num_latents_of
from ..models.lora_layers import check_no_loose_lora
from ..models.module_calls import has_hooks
from ..models.tiny_decoder import StreamingTinyDecoder, TinyWanDecoder
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..models.vae_operations import to_uint8
from ..models.vae_streaming import StreamingVAEDecoder
from ..registration import register_with_diffusers
from .block_generation import BlockGenerator, EncodedScene, Sampling, begin_scenes, blend_scenes, draw_noise
from .lora import CausalWanLoraLoaderMixin
from .prompt_tokens import tokenize, warn_once
from .scene_prompt import TRANSITIONS, Scene, check_sequence_length, check_transition, parse_scenes, plan_scenes
from .sigmas import check_sigmas
from .start_frames import BilinearVideoProcessor, StartFrames, read_start
from .stream import Calls, CausalWanPipelineOutput, CausalWanStream, PromptSwitch


OUTPUT_TYPES = ("np", "pt", "pil", "uint8", "latent")


def _parse(prompt: str | list[str] | None) -> list[list[Scene]]:
    """The scenes of each video; without a prompt, one that lasts."""
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise ValueError(f"`prompt` has to be of type `str` or `list` but is {type(prompt)}.")
    texts = prompt if isinstance(prompt, list) else [prompt or ""]
    if not texts:
        raise ValueError("`prompt` is an empty list.")
    return [parse_scenes(text) for text in texts]


def _longest_take(cuts: list[list[int]], num_blocks: int) -> int:
    """The most blocks of a video without a cut between them."""
    takes = (itertools.pairwise([0, *blocks, num_blocks]) for blocks in cuts)
    return max(end - start for ends in takes for start, end in ends)


def _check_count(name: str, value: int):
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, not {value!r}.")


class CausalWanPipeline(DiffusionPipeline, CausalWanLoraLoaderMixin):
    r"""
    Text-to-video with a causal Wan model: a few denoising steps a block, a KV cache of the blocks before, and decoding
    as the blocks come.

    Args:
        tokenizer, text_encoder: google/umt5-xxl for the published models.
        vae ([`AutoencoderKLWan`]): video autoencoder.
        scheduler ([`FlowMatchLCMScheduler`]): few-step sampler; its `shift` warps `sigmas`.
        transformer ([`CausalWanTransformer3DModel`]): the model, or another [`CausalTransformer`].
        sigmas (`list[float]`, defaults to `(1.0, 0.75, 0.5, 0.25)`):
            Noise levels of the steps before the shift; (1, .75, .5, .25) at shift 5 are t = 1000, 937.5, 833.3, 625.
        first_block_sigmas (`list[float]`, *optional*):
            Of the first generated block and of that after a hard cut: models of one or two steps make it in four.
        num_context_frames (`int`, *optional*):
            Every block sees this many latent frames before it, encoded anew for it, in place of a cache that grows
            (Krea's server). Positions never pass the block's, so the video may go on for ever. The context
            begins with the video's first latent frame after one block and after one given and one generated; then
            with a decoded frame that is encoded by itself.
        past_weight (`float`, defaults to 1.0): in (0, 1], see [`CausalWanKVCache`].
        max_sequence_length (`int`, defaults to 512):
            Text tokens. The transformer has no text mask and sees the zero padding: keep what it was trained with.
        height, width, num_frames (`int`, defaults to 480, 832, 81): size of a video in pixels and frames.
        frame_rate (`int`, defaults to 16): frames per second the model was trained at.
        tiny_decoder ([`TinyWanDecoder`], *optional*):
            Decodes in place of the autoencoder: much faster, and lossy. Training looks at the autoencoder's frames.
        memory_transformer ([`CausalWanTransformer3DModel`], *optional*):
            A second expert, which writes the cache (SGF+): all passes over clean blocks are its, those that are given
            included. `transformer` denoises, and sees what it has written.

    The settings, from `sigmas` to `frame_rate`, are stored in `model_index.json` and serve as the defaults of
    `__call__`. Without transformer and autoencoder (`None`) the pipeline encodes prompts; without tokenizer and text
    encoder it takes `prompt_embeds`.

    Raises:
        ValueError: a setting out of its range, transformer or scheduler of a model that is not causal, or a memory
            transformer that cannot share a cache with the transformer.
    """

    # Makes the blocks, one after the other; a subclass may have its own.
    block_generator_class = BlockGenerator
    # The memory transformer is not in it: it takes turns with the transformer, block by block, and both stay.
    model_cpu_offload_seq = "text_encoder->transformer"
    # Decode after every block: they would chase the transformer off the device and back, for a quarter of a gigabyte.
    _exclude_from_cpu_offload = ["vae", "tiny_decoder"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _optional_components = ["tokenizer", "text_encoder", "vae", "transformer", "tiny_decoder", "memory_transformer"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: UMT5EncoderModel | None,
        vae: AutoencoderKLWan | None,
        scheduler: FlowMatchLCMScheduler | None,
        transformer: CausalTransformer | None,
        sigmas: list[float] = (1.0, 0.75, 0.5, 0.25),
        first_block_sigmas: list[float] | None = None,
        num_context_frames: int | None = None,
        past_weight: float = 1.0,
        max_sequence_length: int = 512,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        frame_rate: int = 16,
        tiny_decoder: TinyWanDecoder | None = None,
        memory_transformer: CausalTransformer | None = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
            transformer=transformer,
            tiny_decoder=tiny_decoder,
            memory_transformer=memory_transformer,
        )
        if first_block_sigmas is not None:
            first_block_sigmas = check_sigmas(first_block_sigmas, "first_block_sigmas")
        self.register_to_config(
            sigmas=check_sigmas(sigmas),
            first_block_sigmas=first_block_sigmas,
            num_context_frames=num_context_frames,
            past_weight=past_weight,
            max_sequence_length=max_sequence_length,
            height=height,
            width=width,
            num_frames=num_frames,
            frame_rate=frame_rate,
        )
        self._check_kinds()
        check_sequence_length(max_sequence_length)
        for name in ("height", "width", "num_frames"):
            _check_count(name, self.config[name])
        if num_context_frames is not None:
            _check_count("num_context_frames", num_context_frames)
        if not isinstance(frame_rate, Real) or not 0 < frame_rate < math.inf:
            raise ValueError(f"`frame_rate` must be a number above 0, not {frame_rate!r}.")
        if not isinstance(past_weight, Real) or not 0 < past_weight <= 1:
            raise ValueError(f"`past_weight` must be a number above 0 and at most 1, not {past_weight!r}.")
        self._calls = Calls()
        self._pair: ExpertPair | None = None
        scale = vae.config.scale_factor_spatial if vae is not None else 8
        self.video_processor = BilinearVideoProcessor(vae_scale_factor=scale)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        register_with_diffusers(cls)

    def register_modules(self, **kwargs):
        super().register_modules(**kwargs)
        # The Hub accepts an index only if every library in it is a known one. Our model classes are attributes of
        # diffusers once this package is imported, so the index says what diffusers' own would.
        for name, module in kwargs.items():
            if isinstance(module, (CausalWanTransformer3DModel, TinyWanDecoder)):
                self.register_to_config(**{name: ("diffusers", type(module).__name__)})

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the parent's; a LoRA that is loaded and not fused is refused, before anything is written."""
        for expert in self.experts.values():
            check_no_loose_lora(expert)
        # Of `pipe.tiny_decoder = ...` where there was none diffusers would save nothing.
        self.register_modules(tiny_decoder=self.tiny_decoder, memory_transformer=self.memory_transformer)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs):
        """A pipeline of the components and settings of another one, but for those given. Components keep their dtypes,
        where the parent's makes them float32, in the other pipeline too; with `dtype` they all get that one."""
        torch_dtype = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or torch_dtype
        components, settings = cls._get_signature_keys(cls)
        values = {name: getattr(pipeline, name, None) for name in components}
        values |= {name: pipeline.config[name] for name in settings if name in pipeline.config}
        made = cls(**(values | kwargs))
        made.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return made.to(dtype=dtype) if dtype else made

    # These belong to a call, of which several may be under way: to the one that this thread is in, as a callback is,
    # or else to the one that made the latest block.
    num_timesteps = property(attrgetter("_calls.current.num_timesteps"))
    current_block = property(attrgetter("_calls.current.block"), doc="Index of the block being generated.")
    current_timestep = property(attrgetter("_calls.current.timestep"))

    @property
    def interrupt(self) -> bool:
        """Whether the video ends with the current block. Set `_interrupt` in a callback to end this callback's call
        after the step, with what the model has predicted of the block; outside of a call, to end all that are under
        way, streams that wait included."""
        return self._calls.current.interrupt

    _interrupt = interrupt.setter(lambda self, value: self._calls.set_interrupt(value))

    def _check_kinds(self):
        """What only fails in the middle of a block, or gives noise: a model that is not causal, another sampler."""
        if self.transformer is not None and "num_frames_per_block" not in self.transformer.config:
            raise ValueError(
                f"the transformer is a {type(self.transformer).__name__}, which does not generate block by block: "
                "convert a published causal model with `astrolabe convert`, or load causal weights with "
                "CausalWanTransformer3DModel.from_pretrained or from_single_file and pass them as `transformer`."
            )
        if self.scheduler is not None and not isinstance(self.scheduler, FlowMatchLCMScheduler):
            raise ValueError(
                f"the scheduler is a {type(self.scheduler).__name__}, but few-step models are sampled with a "
                "FlowMatchLCMScheduler: pass `scheduler=FlowMatchLCMScheduler(shift=5.0)`, as all published ones have."
            )
        if self.tiny_decoder is not None:
            self._check_tiny_decoder()
        if None not in (self.transformer, self.memory_transformer):
            for difference in differences(self.transformer, self.memory_transformer):
                raise ValueError(f"`memory_transformer` cannot write the cache of `transformer`: {difference}.")

    @property
    def experts(self) -> dict[str, CausalTransformer]:
        """Transformer and memory transformer, by name, those that there are."""
        models = {name: getattr(self, name) for name in EXPERTS}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def denoiser(self) -> CausalTransformer | None:
        """What makes blocks: the transformer, or with a memory transformer both, as one [`ExpertPair`]."""
        if self.memory_transformer is None or self.transformer is None:
            return self.transformer
        experts = list(self.experts.values())
        # The same one as long as it can be: accelerate gives it a forward under autocast.
        if self._pair is None or list(self._pair.children()) != experts:
            self._pair = ExpertPair(*experts)
        return self._pair

    def _check_tiny_decoder(self):
        if not isinstance(self.tiny_decoder, TinyWanDecoder):
            raise ValueError(f"`tiny_decoder` is a {type(self.tiny_decoder).__name__}, but must be a TinyWanDecoder.")
        if self.config.num_context_frames is not None:
            raise ValueError(
                "`tiny_decoder` cannot be used with `num_context_frames`: the model's context is encoded from the "
                "autoencoder's own frames, so every block is decoded exactly anyway."
            )
        if self.vae is None:
            return
        tiny, vae = self.tiny_decoder, self.vae.config
        found = tiny.config.latent_channels, tiny.scale_factor_temporal, tiny.scale_factor_spatial
        wanted = vae.z_dim, vae.scale_factor_temporal, vae.scale_factor_spatial
        if found != wanted:
            raise ValueError(
                f"`tiny_decoder` is of another autoencoder: it has (latent channels, frames, pixels a side) {found} a "
                f"latent, the pipeline's {wanted}."
            )

    def new_decoder(self) -> StreamingVAEDecoder | StreamingTinyDecoder:
        """Of one video, or of several that go on together, from their beginning."""
        return StreamingVAEDecoder(self.vae) if self.tiny_decoder is None else StreamingTinyDecoder(self.tiny_decoder)

    def _require(self, *names: str, instead: str = ""):
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(f"this pipeline was loaded without {' and '.join(missing)}: load it with them{instead}.")

    def check_components(self):
        """Raises a `ValueError` if the pipeline cannot generate: it lacks a component, or has one of another kind."""
        self._require("vae", "scheduler", "transformer")
        self._check_kinds()

    def check_text_encoder(self):
        """Raises a `ValueError` if the pipeline cannot encode prompts."""
        self._require("tokenizer", "text_encoder")

    @property
    def is_endless(self) -> bool:
        """Whether a video may go on for ever: the memory of the model is bounded, and positions are not."""
        config = self.transformer.config
        windowed = config.rope_mode == "relative" and config.local_attn_size != -1
        return windowed or self.config.num_context_frames is not None

    @property
    def transitions(self) -> tuple[str, ...]:
        """How a video can go on with another prompt. `"flush"` and `"rope_cut"` need a cache that lasts, which with
        `num_context_frames` is made anew for every block, and a transformer that `can_flush` it
        ([`CausalTransformer`])."""
        if self.config.num_context_frames is None and getattr(self.transformer, "can_flush", False):
            return TRANSITIONS
        return tuple(name for name in TRANSITIONS if name not in ("flush", "rope_cut"))

    def round_num_frames(self, num_frames: float) -> float:
        """The frames of the most whole blocks that `num_frames` has room for, with a warning if that is fewer.
        `math.inf` stays; a `ValueError` if it is no whole number, or less than a block."""
        if num_frames == math.inf:
            return num_frames
        shortest = self.frames_of_blocks(1)
        blocks = self.num_blocks(num_frames) if isinstance(num_frames, Integral) else 0
        if blocks < 1:
            raise ValueError(f"`num_frames` must be a whole number of at least {shortest}, not {num_frames!r}.")
        rounded = self.frames_of_blocks(blocks)
        if rounded != num_frames:
            n, step = self.transformer.config.num_frames_per_block, self.frames_of_blocks(2) - shortest
            warn_once(
                f"`num_frames={num_frames}` is rounded down to {rounded}: a video is whole blocks of {n} latent "
                f"frames, {shortest} frames for the first and {step} for every other."
            )
        return rounded

    def default_num_frames(self, prompt: str | list[str] | None) -> int:
        """Frames of a video for which `num_frames` is not given: those of its scenes, of the longest video in a list,
        or the pipeline's own if no prompt has scenes or durations."""
        videos = _parse(prompt)
        if not any(len(scenes) > 1 or scenes[0].seconds for scenes in videos):
            return self.config.num_frames
        return self.frames_of_blocks(max(plan_scenes(scenes, self.seconds_per_block)[1] for scenes in videos))

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Text embeddings `(B * num_videos_per_prompt, max_sequence_length, dim)`, zero beyond each prompt's end.
        Needs tokenizer and text encoder alone. A `ValueError` if a prompt is no text or the length not in 1 to 512."""
        device = device or self._execution_device
        if prompt_embeds is None:
            self._require("tokenizer", "text_encoder", instead=", or give `prompt_embeds`")
            if prompt is None:
                raise ValueError("Provide either `prompt` or `prompt_embeds`.")
            prompt = [prompt] if isinstance(prompt, str) else prompt
            length = self.config.max_sequence_length if max_sequence_length is None else max_sequence_length
            check_sequence_length(length)
            text_inputs = tokenize(self.tokenizer, prompt, length)
            mask = text_inputs.attention_mask.to(device)
            prompt_embeds = self.text_encoder(text_inputs.input_ids.to(device), mask).last_hidden_state
            prompt_embeds = prompt_embeds * mask.unsqueeze(-1)
        dtype = dtype or (self.text_encoder if self.transformer is None else self.transformer).dtype
        return prompt_embeds.to(device=device, dtype=dtype).repeat_interleave(num_videos_per_prompt, dim=0)

    def check_size(self, height: int, width: int):
        _, p_h, p_w = self.transformer.config.patch_size
        scale = self.vae.config.scale_factor_spatial
        for name, value, unit in (("height", height, scale * p_h), ("width", width, scale * p_w)):
            if not isinstance(value, Integral) or value <= 0 or value % unit:
                raise ValueError(f"`{name}` must be a multiple of {unit}, at least {unit}, not {value!r}.")

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        num_frames: int,
        prompt_embeds: torch.Tensor | list[list[EncodedScene]] | None = None,
        output_type: str = "np",
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ):
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Provide either `prompt` or `prompt_embeds`, and not both.")
        videos, cuts = _parse(prompt), None
        for scene in sum(videos, []):
            check_transition(scene.transition, self.transitions)
        if isinstance(prompt_embeds, list):
            cuts = [[scene.start for scene in scenes if scene.transition == "cut"] for scenes in prompt_embeds]
            for scene in sum(prompt_embeds, []):
                check_transition(scene.transition, self.transitions)
            prompt_embeds = torch.stack([scene.prompt_embeds for scene in sum(prompt_embeds, [])])
        if prompt_embeds is not None:
            # Another transformer may call it otherwise.
            shape = tuple(prompt_embeds.shape)
            dim = self.transformer.config.get("text_dim", shape[-1])
            if len(shape) != 3 or shape[-1] != dim or 0 in shape:
                raise ValueError(f"`prompt_embeds` must have the shape (batch, tokens, {dim}) but have {shape}.")
            if not prompt_embeds.isfinite().all():
                raise ValueError("`prompt_embeds` have NaN or infinite values.")
        self.check_size(height, width)
        config, in_cache = self.transformer.config, self.config.num_context_frames is None
        bounded = config.rope_mode == "absolute" and in_cache
        if num_frames == math.inf and not self.is_endless:
            raise ValueError(
                "`num_frames=inf` needs a model whose memory is bounded and positions are not: local_attn_size and "
                "rope_mode='relative', or num_context_frames."
            )
        n, table = config.num_frames_per_block, config.rope_max_seq_len
        if bounded and _longest_take(cuts or self._cuts(videos, num_frames), self.num_blocks(num_frames)) * n > table:
            raise ValueError(
                f"`num_frames={num_frames}` passes the model's {table} absolute positions: at most "
                f"{self.frames_of_blocks(table // n)} frames without a cut, or a model with rope_mode='relative'."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES} but is {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found "
                f"{sorted(unknown)}."
            )

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        num_frames: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        num_given: int = 0,
    ) -> torch.Tensor:
        """The initial noise `(B, C, f, h, w)`, float32, of all blocks but the first `num_given` latent frames."""
        shape = (
            batch_size,
            self.transformer.config.in_channels,
            num_latents_of(self.vae, num_frames) - num_given,
            height // self.vae.config.scale_factor_spatial,
            width // self.vae.config.scale_factor_spatial,
        )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} videos: pass one, or one a video.")
        if latents is None:
            return draw_noise(shape, generator, device, self.transformer.dtype)
        if latents.shape != shape:
            raise ValueError(f"`latents` must have the shape {shape} but have {tuple(latents.shape)}.")
        if not latents.isfinite().all():
            raise ValueError("`latents` have NaN or infinite values.")
        return latents.to(device=device, dtype=torch.float32)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        sigmas: list[float] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | list[list[EncodedScene]] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int | None = None,
        image: PipelineImageInput | None = None,
        video: list | np.ndarray | torch.Tensor | None = None,
        strength: float | None = None,
    ) -> CausalWanPipelineOutput | tuple:
        r"""
        Generate whole videos. What is left at `None` comes from the pipeline's config.

        Args:
            prompt (`str` or `list[str]`, *optional*): or pass `prompt_embeds`.
            height, width (`int`, *optional*): in pixels, multiples of the latent patch (16 for Wan).
            num_frames (`int`, *optional*):
                A whole number of blocks, 1 + 4 * (3 * blocks - 1) for blocks of 3 latent frames. Others are rounded
                down, with a warning.
            sigmas (`list[float]`, *optional*): as the pipeline's; given here, of every block.
            num_videos_per_prompt (`int`): videos for each prompt.
            generator (`torch.Generator` or a list with one for each video, *optional*):
                Source of the noise. With one for each video, a video does not depend on the batch it is made in.
                First the noise of all generated blocks is drawn, `(B, F, C, h, w)`, then block by block that of the
                steps but the last, `(B, n, C, h, w)`; float32, rounded once to the transformer's dtype. That is the
                originals' order: a seed of theirs gives their video up to rounding, where docs/generate.md says.
            latents (`torch.Tensor` of shape `(B, C, f, h, w)`, *optional*): initial noise of all generated blocks.
            prompt_embeds (`torch.Tensor` of shape `(B, L, dim)` or `list[list[EncodedScene]]`, *optional*):
                What `encode_prompt` returns; or of each video the scenes, in their order, the first from block 0 on.
            output_type (`str`), return_dict (`bool`): see [`CausalWanPipelineOutput`], which else is a tuple.
            attention_kwargs (`dict`, *optional*): `{"scale": s}` scales a LoRA.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, timestep, callback_kwargs)` after each denoising step of each block;
                `step` restarts in every block, `pipe.current_block` tells which. `latents` are the block's. It may
                return a dict with replacements.
            callback_on_step_end_tensor_inputs (`list[str]`): what `callback_kwargs` holds.
            max_sequence_length (`int`, *optional*): text tokens, at most 512; what is longer is cut, with a warning.
            image (`PIL.Image.Image`, array, tensor or list, *optional*):
                The first frame, as `video` is given, for models with blocks of one latent frame.
            video (list of images, array, tensor, or a list of them, *optional*):
                The first frames, a whole number of blocks, one video for all or one a prompt. They are resized, count
                in `num_frames`, and come back as the autoencoder reproduces them. Or their latents `(B, C, f, h, w)`.
                Arrays `(F, H, W, 3)` and tensors `(F, 3, H, W)` are floats in [0, 1] or uint8.
            strength (`float`, *optional*):
                Video to video: every block starts from `video` with this much noise, in (0, 1], instead of from noise
                alone, and all noise levels are scaled with it. `num_frames` is then the video's.

        Raises:
            ValueError: an argument is out of its range, or the pipeline lacks a component.
            FloatingPointError: a block is not finite; generation stops there.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "return_dict")}
        if num_frames == math.inf:
            raise ValueError("a video without an end is never whole: use `stream` for `num_frames=inf`.")
        pieces = list(self.stream(**arguments))
        if output_type == "pil":
            frames = [sum(video, []) for video in zip(*pieces)]
        elif output_type == "np":
            frames = np.concatenate(pieces, axis=1)
        else:
            frames = torch.cat(pieces, dim=2 if output_type == "latent" else 1)
        return CausalWanPipelineOutput(frames=frames) if return_dict else (frames,)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: float | None = None,
        sigmas: list[float] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | list[list[EncodedScene]] | None = None,
        output_type: str = "np",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int | None = None,
        image: PipelineImageInput | None = None,
        video: list | np.ndarray | torch.Tensor | None = None,
        strength: float | None = None,
    ) -> CausalWanStream:
        r"""
        As `__call__`, block by block: an iterator over the frames of each block, as soon as they exist.

        `num_frames=math.inf` goes on for ever, with models that have a window and relative positions; then every block
        draws its own noise and that of its steps, so a seed gives another video than with an end.
        [`CausalWanStream.set_prompt`] changes the prompt while it goes on.
        """
        self.check_components()
        height = self.config.height if height is None else height
        width = self.config.width if width is None else width
        self.check_size(height, width)
        _check_count("num_videos_per_prompt", num_videos_per_prompt)
        n = self.transformer.config.num_frames_per_block
        start_frames = read_start(self, image, video, strength, (height, width))
        levels, first_levels = self._noise_levels(sigmas, strength)
        num_frames = self._video_length(prompt, num_frames, start_frames)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            prompt, height, width, num_frames, prompt_embeds, output_type, callback_on_step_end_tensor_inputs
        )
        num_blocks, device = self.num_blocks(num_frames), self._execution_device
        if num_blocks is None and latents is not None:
            raise ValueError("`latents` cannot be given with `num_frames=inf`: its noise is drawn block by block.")
        call = self._calls.begin()
        encode_scenes = partial(self._encode_scenes, max_sequence_length=max_sequence_length)
        if prompt is not None:
            schedule = encode_scenes(_parse(prompt), num_blocks, num_videos_per_prompt)
        elif isinstance(prompt_embeds, list):

            def encoded(scene: EncodedScene) -> EncodedScene:
                embeds = self.encode_prompt(prompt_embeds=scene.prompt_embeds[None], device=device)
                return replace(scene, prompt_embeds=embeds[0])

            given = [list(map(encoded, scenes)) for scenes in prompt_embeds]
            schedule = [list(scenes) for scenes in given for _ in range(num_videos_per_prompt)]
        else:
            prompt_embeds = self.encode_prompt(None, num_videos_per_prompt, prompt_embeds, device=device)
            schedule = [[EncodedScene(embeds, 0)] for embeds in prompt_embeds]
        batch_size, clean = len(schedule), ()
        if start_frames is not None:
            clean = start_frames.encode(self.vae, device, batch_size, num_videos_per_prompt).split(n, dim=2)
        num_given = len(clean) if strength is None else 0
        draw = partial(self.prepare_latents, batch_size, height, width, device=device, generator=generator)
        if num_blocks is None:
            noise = (draw(self.frames_of_blocks(1)) for _ in itertools.count())
        else:
            generated = draw(num_frames, latents=latents, num_given=num_given * n).split(n, dim=2)
            noise = itertools.chain(itertools.repeat(None, num_given), generated)
        inputs = zip(itertools.chain(clean, itertools.repeat(None)), noise)
        sampling = Sampling(
            sigmas=levels,
            first_block_sigmas=first_levels,
            max_frames=num_blocks and num_blocks * n,
            decode=output_type != "latent",
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            call=call,
        )
        inbox: deque[PromptSwitch] = deque(maxlen=1)
        blocks = self._generate_blocks(
            sampling, schedule, inbox, encode_scenes, inputs, num_given, generator, output_type
        )
        running = partial(self._calls.run, call)
        transitions = self.transitions if self.text_encoder is not None else None
        return CausalWanStream(blocks, inbox, batch_size, running, transitions)

    def _video_length(self, prompt: str | list[str] | None, num_frames: float | None, start: StartFrames | None):
        """Frames of the video, whole blocks."""
        if start is not None and start.strength is not None:
            if num_frames not in (None, start.num_frames):
                raise ValueError(
                    f"with `strength` the video keeps its {start.num_frames} frames: leave out `num_frames`."
                )
            return start.num_frames
        num_frames = self.round_num_frames(self.default_num_frames(prompt) if num_frames is None else num_frames)
        if start is not None and start.num_frames >= num_frames:
            raise ValueError(
                f"`num_frames={num_frames}` leaves nothing to generate after the {start.num_frames} given frames."
            )
        return num_frames

    def _noise_levels(self, sigmas: list[float] | None, strength: float | None) -> list[list[float]]:
        """Noise levels of every block but the first, and of the first, before the scheduler's shift."""
        first = self.config.first_block_sigmas if sigmas is None else None
        levels = check_sigmas(self.config.sigmas if sigmas is None else sigmas)
        both = [levels, levels if first is None else check_sigmas(first, "first_block_sigmas")]
        if strength is None:
            return both
        # The published samplers have whole timesteps before the shift.
        steps = self.scheduler.config.num_train_timesteps
        return [[int(round(steps * strength * sigma, 6)) / steps for sigma in sigmas] for sigmas in both]

    def _cuts(self, videos: list[list[Scene]], num_frames: int) -> list[list[int]]:
        """The blocks of each video that begin with a cut."""
        plans = (plan_scenes(scenes, self.seconds_per_block, self.num_blocks(num_frames))[0] for scenes in videos)
        return [[block for block, scene in plan.items() if scene.transition == "cut"] for plan in plans]

    @property
    def seconds_per_block(self) -> float:
        """Of every block but the first."""
        return (self.frames_of_blocks(2) - self.frames_of_blocks(1)) / self.config.frame_rate

    def frames_of_blocks(self, num_blocks: int) -> int:
        """How many frames a video of so many blocks has."""
        return num_frames_of(self.vae, num_blocks * self.transformer.config.num_frames_per_block)

    def compile(self, prompt: str = "a video", *, backend: str = "inductor", **kwargs) -> float:
        r"""
        Compile the transformer's blocks, by `compile_repeated_blocks(fullgraph=True)`, and have it done: two short
        videos are made that meet every graph, so that calls and streams do not wait for the compiler, however long
        they are and whenever their prompt changes. What is loaded or fused later is compiled when it is first used.

        Args:
            prompt (`str`): of those videos. It does not change with `prompt_embeds`.
            backend (`str`): of `torch.compile`.
            kwargs: of `stream`, as the videos to come have them (`height`, `num_videos_per_prompt`, ...), but for
                `num_frames`, which does not matter.

        Returns:
            The seconds that it took.

        Raises:
            ValueError: layers that are offloaded one by one, by `enable_group_offload` or
                `enable_sequential_cpu_offload`.
        """
        if any(map(has_hooks, self.experts.values())):
            raise ValueError("layers that are offloaded one by one cannot be compiled: offload whole models, or none.")
        began = time.perf_counter()
        for expert in self.experts.values():
            expert.compile_repeated_blocks(fullgraph=True, backend=backend)
        config = self.transformer.config
        window = max(config.local_attn_size, 0) // config.num_frames_per_block
        window = max(window, config.get("memory_bank_size", 0) * config.get("memory_bank_interval", 1))
        # The first block, a cache that grows, a window that moves on, a full bank; and changes of the prompt in each.
        changes = {1: "recache", 2: "roll", window + 3: "roll", window + 4: "recache"}
        if "rope_cut" in self.transitions:
            changes[window + 5] = "rope_cut"
        if kwargs.get("prompt_embeds") is not None:
            prompt, changes = None, {}
        # Random numbers of its own: a seed gives the same video after it.
        fixed = {"num_frames": self.frames_of_blocks(window + 9), "generator": torch.Generator().manual_seed(0)}
        for due in ({}, changes):
            with self.stream(prompt, **{"output_type": "uint8"} | kwargs | fixed) as stream:
                for block, _ in enumerate(stream):
                    if block in due:
                        stream.set_prompt(prompt, due[block])
        return time.perf_counter() - began

    def num_blocks(self, num_frames: float) -> int | None:
        """Whole blocks of a video of so many frames, `None` if it has no end."""
        if num_frames == math.inf:
            return None
        return num_latents_of(self.vae, num_frames) // self.transformer.config.num_frames_per_block

    def _encode_scenes(
        self,
        videos: list[list[Scene]],
        num_blocks: int | None = None,
        num_videos_per_prompt: int = 1,
        start: int = 0,
        max_sequence_length: int | None = None,
    ) -> list[list[EncodedScene]]:
        """The scenes of every video, from block `start` on. Each text is encoded once."""
        plans = [plan_scenes(scenes, self.seconds_per_block, num_blocks)[0] for scenes in videos]
        texts = list(dict.fromkeys(scene.text for plan in plans for scene in plan.values()))
        embeds = dict(zip(texts, self.encode_prompt(texts, max_sequence_length=max_sequence_length)))
        return [
            [EncodedScene(embeds[scene.text], start + block, scene.transition) for block, scene in plan.items()]
            for plan in plans
            for _ in range(num_videos_per_prompt)
        ]

    @torch.no_grad()
    def _generate_blocks(
        self,
        sampling: Sampling,
        schedule: list[list[EncodedScene]],
        inbox: deque[PromptSwitch],
        encode_scenes: Callable[..., list[list[EncodedScene]]],
        inputs: Iterator[tuple[torch.Tensor | None, torch.Tensor | None]],
        num_given: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
    ) -> Iterator[torch.Tensor | np.ndarray | list]:
        """Yields each block. `inputs` are the clean latents and the noise that each starts from; the first `num_given`
        blocks stay clean."""
        n = self.transformer.config.num_frames_per_block
        groups = [self.block_generator_class(self, sampling, list(range(len(schedule))))]
        groups[0].prompt_embeds = torch.stack([scenes[0].prompt_embeds for scenes in schedule])
        schedule = [scenes[1:] for scenes in schedule]
        blocks = itertools.count() if sampling.max_frames is None else range(sampling.max_frames // n)
        # Also when the caller closes the stream early.
        with ExitStack() as at_end, self.progress_bar(blocks) as progress_bar:
            at_end.callback(self.maybe_free_model_hooks)
            for block in blocks:
                sampling.call.block = block
                switch = inbox.pop() if inbox else None
                if switch is not None:
                    schedule = self._switch_prompt(switch, groups, block, encode_scenes)
                groups = begin_scenes(groups, schedule, block)
                clean, noise = next(inputs)
                pieces = []
                for group in groups:
                    # All of them, as a view, unless they have parted.
                    rows = slice(None) if len(groups) == 1 else group.videos
                    latents = None if clean is None else clean[rows]
                    if block >= num_given:
                        generators = [generator[i] for i in group.videos] if isinstance(generator, list) else generator
                        latents = group.denoise(noise[rows], latents, generators)
                    pieces.append(group.finish(latents, given=block < num_given))
                if sampling.decode and block:
                    pieces = [self._hold_first(piece) for piece in pieces]
                order = [video for group in groups for video in group.videos]
                progress_bar.update()
                frames = pieces[0] if len(groups) == 1 else torch.cat(pieces)[torch.tensor(order).argsort()]
                if sampling.decode:
                    frames = self._postprocess(frames, output_type)
                # Latents are the model's memory: who changes what is yielded must not change that.
                yield frames if sampling.decode else frames.clone()
                if sampling.call.interrupt:
                    return

    def _postprocess(self, frames: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list:
        if output_type == "uint8":
            return to_uint8(frames.permute(0, 2, 3, 4, 1))
        return self.video_processor.postprocess_video(frames, output_type=output_type)

    def _hold_first(self, frames: torch.Tensor) -> torch.Tensor:
        """After a cut the first latent frame is one picture: it is held as long as four."""
        n, scale = self.transformer.config.num_frames_per_block, self.vae.config.scale_factor_temporal
        missing = n * scale - frames.shape[2]
        return torch.cat([frames[:, :, :1].expand(-1, -1, missing, -1, -1), frames], dim=2) if missing else frames

    def _switch_prompt(
        self, switch: PromptSwitch, groups: list[BlockGenerator], block: int, encode_scenes: Callable
    ) -> list[list[EncodedScene]]:
        """The scenes from `block` on that a change of the prompt leaves."""
        schedule = encode_scenes(switch.scenes, start=block)
        old = {video: embeds for group in groups for video, embeds in zip(group.videos, group.prompt_embeds)}
        for video, scenes in enumerate(schedule):
            new = EncodedScene(scenes.pop(0).prompt_embeds, block, switch.transition, switch.global_sink)
            scenes[:0] = blend_scenes(old[video], new, switch.num_blocks)
        return schedule

"""Pipelines of folders and Hub repositories, loaded whole and in silence, with LoRAs, and placed on a device."""

import hashlib
import importlib
import inspect
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator, init_empty_weights
from diffusers import AutoencoderKLWan, DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub.errors import StrictDataclassError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..distributed.sharding import left_in_file
from ..errors import CHECKED, UserError, as_user_error, close_matches
from ..files.output_folder import list_checkpoints
from ..layouts.experts import EXPERTS
from ..layouts.published_models import PUBLISHED_MODELS
from ..layouts.tensor_files import find_model, load_tensors, misfits
from ..models.attention_causal_wan import attend
from ..models.expert_pair import adapted_experts
from ..models.tiny_decoder import TinyWanDecoder
from ..models.vae_files import load_vae_file
from .config import PipelineConfig
from .pipeline_causal_wan import CausalWanPipeline
from .quantization import quantization_config


SAMPLED_VALUES = 64
QUANTIZED = "the transformer is quantised: train with its own weights, and quantise for generation."
# Settings of a pipeline that make other frames.
_FRAME_CONFIG = ("sigmas", "first_block_sigmas", "num_context_frames", "past_weight")
# A value in a config of the user's that no code expects fails wherever it is used first.
LOADING = (*CHECKED, TypeError, AttributeError, RuntimeError, StrictDataclassError)


def load_from(
    model: str, revision: str | None = None, variant: str | None = None, map_for: torch.dtype | None = None, **kwargs
) -> CausalWanPipeline:
    """The pipeline of a folder or Hub repository, without a bar of its own; `kwargs` of `from_pretrained`. A
    [`UserError`] if it is of another class, which is said before anything is downloaded, or cannot be loaded whole.

    With `map_for` the transformer is that of [`map_transformer`] for this dtype.
    """
    with no_loading_bars(), as_user_error(cannot_load(model), LOADING), no_missing_tensors():
        index = DiffusionPipeline.load_config(model, revision=revision)
        name = index["_class_name"]
        if not issubclass(getattr(diffusers, name, object), CausalWanPipeline):
            raise UserError(
                f"{model} is a {name}, not a CausalWanPipeline: `astrolabe convert` makes one of the "
                "weights of a published model."
            )
        for component in index.values():
            if isinstance(component, list) and component[0] == "diffusers" and not hasattr(diffusers, component[1]):
                raise UserError(
                    f"{model} has a {component[1]}, which nothing has registered with diffusers: name the module of "
                    "that class with --import_modules, or import it first."
                )
        if map_for:
            if not Path(model).is_dir():
                model = DiffusionPipeline.download(model, revision=revision, variant=variant)
            folder = Path(model) / "transformer"
            kwargs["transformer"] = map_transformer(folder, index["transformer"], variant, map_for)
        pipeline = DiffusionPipeline.from_pretrained(model, revision=revision, variant=variant, **kwargs)
        pipeline.check_components()
        if "text_encoder" not in kwargs:
            pipeline.check_text_encoder()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(config: PipelineConfig, device: torch.device) -> tuple[CausalWanPipeline, str]:
    """The pipeline of these settings with its LoRAs, not on the device yet, and the name of its dtype."""
    exact_on_cpu = device.type == "cpu" and not config.quantization
    dtype = config.dtype or ("float32" if exact_on_cpu else "bfloat16")
    quantized = config.quantization and quantization_config(config.quantization, device)
    pipe = load_from(
        config.model,
        config.revision,
        variant=config.variant,
        dtype=getattr(torch, dtype),
        quantization_config=quantized,
    )
    if quantized and any(expert.hf_quantizer.pre_quantized for expert in pipe.experts.values()):
        raise UserError(f"{config.model} is quantised as it is: leave out quantization.")
    if config.lora:
        load_loras(pipe, config.lora)
    if config.vae:
        load_vae(pipe, config.vae, getattr(torch, dtype))
    if config.tiny_decoder:
        load_tiny_decoder(pipe, config.tiny_decoder, getattr(torch, dtype))
    return pipe, dtype


def map_transformer(folder: Path, kind: tuple[str, str], variant: str | None, dtype: torch.dtype) -> ModelMixin:
    """The transformer in a pipeline's folder, of the module and class that the pipeline names, its weights
    [`left_in_file`] for [`shard`].

    All else is as `from_pretrained` leaves it for `dtype`: the parameters' dtypes, buffers, and the random generator's
    state, which the adapters are drawn from.

    Raises:
        ValueError, OSError: weights are missing or of another shape, or a file is no readable one.
        UserError: it is quantised.
    """
    module, name = kind
    transformer_class = getattr(importlib.import_module(module), name)
    config = transformer_class.load_config(folder)
    if "quantization_config" in config:
        raise UserError(QUANTIZED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            transformer = transformer_class.from_config(config)
    finally:
        torch.set_default_dtype(before)
    shapes = {name: weight.shape for name, weight in transformer.state_dict().items()}
    # As in `from_pretrained`, files may hold more.
    tensors = {name: value for name, value in load_tensors(find_model(folder, variant)).items() if name in shapes}
    if found := misfits(tensors, shapes):
        raise ValueError(f"the transformer of {folder} does not fit its config: {found}.")
    keep = set(transformer._keep_in_fp32_modules or ())
    weights = {
        name: left_in_file(value, dtype if keep.isdisjoint(name.split(".")) else torch.float32)
        for name, value in tensors.items()
    }
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval()


def cannot_load(model: str) -> str:
    """How an error about a model begins: where there is no such folder, with what its name may be a slip of."""
    if Path(model).exists() or "/" in model:  # a folder, or a path or Hub id, which says enough
        return f"cannot load {model}"
    near = close_matches(model, PUBLISHED_MODELS)
    return f"cannot load {model}, which is no folder{near}; `astrolabe convert` makes one of a published model"


@contextmanager
def no_missing_tensors() -> Iterator[None]:
    """Raises a `ValueError` if files of models that are loaded inside lack tensors. diffusers and transformers go on
    with random values, or none, and log it."""
    missing = []

    def take(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "newly initialized" not in text:
            return True
        # A list in Python, or a table.
        missing.extend(item or row for item, row in re.findall(r"'([\w.]+)'|^(\S+) +\|.*MISSING", text, re.M))
        return False

    with ExitStack() as stack:
        for name in ("diffusers.models.modeling_utils", "transformers.modeling_utils"):
            logging.getLogger(name).addFilter(take)
            stack.callback(logging.getLogger(name).removeFilter, take)
        yield
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing in its files: {', '.join(sorted(missing)[:3])}")


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Loading takes its time in silence: the bars would stand before an error's one line, and in every log file. Those
    of downloads stay."""
    with ExitStack() as stack:
        for library in (diffusers.utils.logging, transformers.utils.logging):
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                stack.callback(library.enable_progress_bar)
        yield


def frame_rate(model: str, revision: str | None = None) -> float:
    """Frames a second of the videos of a folder's or Hub repository's pipeline, which is not loaded for that."""
    default = inspect.signature(CausalWanPipeline).parameters["frame_rate"].default
    with as_user_error(cannot_load(model)):
        return DiffusionPipeline.load_config(model, revision=revision).get("frame_rate", default)


def load_frozen_pipeline(
    model: str,
    accelerator: Accelerator,
    revision: str | None = None,
    variant: str | None = None,
    vae_dtype: str | None = None,
    to_shard: bool = False,
    **components,
) -> CausalWanPipeline:
    """The frozen pipeline of a folder or the Hub on its device, in bfloat16 for bf16 runs; the autoencoder may be of
    another dtype. With `to_shard` the transformer's weights are left in their files. `components` that are given, or
    `None`, are not loaded."""
    dtype = frozen_dtype(accelerator)
    dtypes = {"default": dtype, "vae": getattr(torch, vae_dtype) if vae_dtype else dtype}
    pipeline = load_from(model, revision, variant, dtype if to_shard else None, dtype=dtypes, **components)
    return freeze_pipeline(pipeline, accelerator, to_shard)


def load_text_encoder(
    model: str, accelerator: Accelerator, revision: str | None = None, variant: str | None = None
) -> CausalWanPipeline:
    """The pipeline of [`load_frozen_pipeline`] with what `encode_prompt` needs alone."""
    without = dict.fromkeys(("vae", *EXPERTS))
    with no_loading_bars(), as_user_error(cannot_load(model), LOADING), no_missing_tensors():
        # DiffusionPipeline itself does not ask a class for its optional components, and would load one of these.
        pipeline_class = getattr(diffusers, DiffusionPipeline.load_config(model, revision=revision)["_class_name"])
        pipeline = pipeline_class.from_pretrained(
            model, revision=revision, variant=variant, dtype=frozen_dtype(accelerator), **without
        )
        pipeline.check_text_encoder()
    return freeze_pipeline(pipeline, accelerator)


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """Of models that are not trained."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def freeze_pipeline(
    pipeline: DiffusionPipeline, accelerator: Accelerator, to_shard: bool = False
) -> DiffusionPipeline:
    """`to_shard` leaves the transformer where it is: in shards it comes to the device."""
    pipeline.set_progress_bar_config(disable=True)
    for component in (pipeline.vae, pipeline.text_encoder, pipeline.denoiser):
        if component is not None:
            component.requires_grad_(False).eval()
    if not to_shard:
        return pipeline.to(accelerator.device)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name != "transformer":
            component.to(accelerator.device)
    return pipeline


def video_size(
    pipeline: CausalWanPipeline,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    prompt: str = "",
    what: str = "video size",
) -> dict[str, int]:
    """`height`, `width` and `num_frames` of a prompt's video, checked by the pipeline and rounded to whole blocks; its
    own where not given. An error begins with `what`."""
    size = {"height": height or pipeline.config.height, "width": width or pipeline.config.width}
    with as_user_error(what):
        size["num_frames"] = pipeline.round_num_frames(num_frames or pipeline.default_num_frames(prompt))
        pipeline.check_inputs(prompt, **size)
    return size


def find_lora(name: str) -> str:
    """What `load_lora_weights` takes for `name`: of a training run that has not finished, its last checkpoint."""
    checkpoints = list_checkpoints(name)
    return name if (Path(name) / LORA_WEIGHT_NAME_SAFE).is_file() or not checkpoints else str(checkpoints[-1])


def load_loras(pipe: CausalWanPipeline, loras: dict[str, float]):
    """Loads LoRAs and activates all of them, each with its weight."""
    names = [f"lora_{i}" for i in range(len(loras))]
    for lora, name in zip(loras, names):
        is_here = "" if Path(lora).exists() else " (nothing here has that name, so it is looked for on the Hub)"
        with as_user_error(f"cannot load the LoRA {lora}{is_here}"):
            pipe.load_lora_weights(find_lora(lora), adapter_name=name)
    pipe.set_adapters(names, list(loras.values()))


def load_vae(pipe: CausalWanPipeline, name: str, dtype: torch.dtype):
    """Puts an autoencoder in the place of the pipeline's: that of a file under its original names or, in Diffusers
    format, of a folder. A [`UserError`] if it has other latents."""
    sizes = ("z_dim", "scale_factor_temporal", "scale_factor_spatial")
    with no_loading_bars(), as_user_error(f"cannot load the autoencoder {name}", LOADING), no_missing_tensors():
        if Path(name).is_dir():
            vae = AutoencoderKLWan.from_pretrained(name, dtype=dtype)
        else:
            vae = load_vae_file(name, pipe.vae.config, dtype)
        found, wanted = (tuple(model.config[size] for size in sizes) for model in (vae, pipe.vae))
        if found != wanted:
            raise ValueError(
                f"it is of other latents: it has (channels, frames, pixels a side) {found} a latent, the pipeline's "
                f"{wanted}."
            )
    pipe.register_modules(vae=vae)


def load_tiny_decoder(pipe: CausalWanPipeline, name: str, dtype: torch.dtype):
    """Makes the pipeline decode with a published file or, in Diffusers format, a folder."""
    with no_loading_bars(), as_user_error(f"cannot load the tiny decoder {name}", LOADING), no_missing_tensors():
        load = TinyWanDecoder.from_pretrained if Path(name).is_dir() else TinyWanDecoder.from_single_file
        pipe.register_modules(tiny_decoder=load(name, dtype=dtype))
        pipe.check_components()


def weights_digest(transformer: torch.nn.Module, *sampled: torch.nn.Module) -> str:
    """Changes when the weights of the transformer do, those of loaded LoRAs included, or those of the others.

    Of these each parameter's `SAMPLED_VALUES` are looked at: training changes all, and UMT5's 11 GB take 11 s to read.
    """
    return _digest(transformer.named_parameters(), *sampled)


def base_digest(pipe: CausalWanPipeline) -> str:
    """[`weights_digest`] of all in a pipeline that makes frames, as it is without the LoRAs that are loaded."""
    parameters = pipe.denoiser.named_parameters()
    base = ((name.replace(".base_layer.", "."), value) for name, value in parameters if ".lora_" not in name)
    return _digest(base, *sampled_components(pipe))


def frame_configs(pipe: CausalWanPipeline) -> dict[str, dict[str, Any]]:
    """What the configs say of how frames are made, by component, as JSON values: models of the same weights may differ
    in it. Not sizes, which every call may have its own of."""
    configs = {name: component.config for name, component in (*pipe.experts.items(), ("scheduler", pipe.scheduler))}
    configs["pipeline"] = {name: pipe.config[name] for name in _FRAME_CONFIG}
    found = {
        component: {name: value for name, value in config.items() if not name.startswith("_")}
        for component, config in configs.items()
    }
    return json.loads(json.dumps(found, default=str))


def lora_digest(transformer: torch.nn.Module, adapter: str) -> str:
    """Changes when the weights of an adapter do, or what they are multiplied with."""
    experts = [expert for expert in adapted_experts(transformer).values() if adapter in expert.peft_config]
    scales = []
    for config in (expert.peft_config[adapter] for expert in experts):
        scales += config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern, config.use_rslora
    parameters = transformer.named_parameters()
    # By a name that does not depend on the order in which LoRAs were loaded.
    own = ((name.replace(f".{adapter}", ""), value) for name, value in parameters if f".{adapter}." in f"{name}.")
    return _digest(itertools.chain([(str(tuple(scales)), torch.zeros(()))], own))


def sampled_components(pipe: CausalWanPipeline) -> list[torch.nn.Module]:
    """Those that [`weights_digest`] looks at beside the transformer."""
    return [module for module in (pipe.vae, pipe.text_encoder, pipe.tiny_decoder) if module is not None]


def _digest(parameters: Iterable[tuple[str, torch.Tensor]], *sampled: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters:
        hashes = (str(torch.hash_tensor(tensor).item()) for tensor in plain_tensors(parameter.detach()))
        digest.update(f"{name} {' '.join(hashes)}\n".encode())
    for module in sampled:
        for name, parameter in module.named_parameters():
            values = parameter.detach().flatten()
            digest.update(f"{name} {values[:: -(-len(values) // SAMPLED_VALUES)].tolist()}\n".encode())
    return digest.hexdigest()[:16]


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Itself, or what a tensor of a class of its own holds, as quantised weights do: theirs of 8 bits as bytes."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [plain for name in names for plain in plain_tensors(getattr(tensor, name))]
    return [tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor]


def prepare_pipeline(
    pipe: CausalWanPipeline, device: torch.device, offload: str, vae_tiling: bool, attention_backend: str | None
):
    """Puts the pipeline on its device, with `offload` models or groups of layers while they are used, and chooses how
    it decodes and attends."""
    if offload != "none" and device.type == "cpu":
        raise UserError(f"offload={offload} needs a GPU: on a CPU it can only be none.")
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        decoders = ["vae", "tiny_decoder"]
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=True, exclude_modules=decoders)
    else:
        pipe.to(device)
    if vae_tiling:
        pipe.vae.enable_tiling()
    if attention_backend:
        kinds = (ValueError, RuntimeError, ImportError)
        with as_user_error(f"attention_backend {attention_backend} on {device.type}", kinds):
            for expert in pipe.experts.values():
                expert.set_attention_backend(attention_backend)
            # A backend that cannot run on this device or in this dtype only says so when it is called.
            shape = 1, 16, 1, pipe.transformer.config.attention_head_dim
            query = torch.zeros(shape, device=device, dtype=pipe.transformer.dtype)
            attend(query, query, query)

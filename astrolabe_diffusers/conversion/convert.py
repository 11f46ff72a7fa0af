"""A published checkpoint becomes a Diffusers folder, and a published LoRA a Diffusers one."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchLCMScheduler
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory

from ..files.writing import PARTIAL
from ..layouts.experts import MEMORY_TRANSFORMER, TRANSFORMER
from ..layouts.lora_modules import OriginalLora, load_original_loras
from ..layouts.published_models import PublishedModel, find_published_model
from ..layouts.wan_checkpoints import OriginalWeights, check_fits, load_original_experts
from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from .config import ConversionConfig


_SHARED = ("tokenizer", "text_encoder", "vae")
# Of a converted folder, of one expert or two; the index comes last, and a folder without one is not complete.
PIPELINE_FILES = (*_SHARED, "scheduler", TRANSFORMER, MEMORY_TRANSFORMER, CausalWanPipeline.config_name)
LORA_FILES = (LORA_WEIGHT_NAME_SAFE,)
_SHARD_BYTES = 5 * 1024**3


def convert(config: ConversionConfig) -> tuple[str, ...]:
    """
    Write a complete pipeline folder for `CausalWanPipeline.from_pretrained`; or, without a checkpoint, the LoRA as
    `pytorch_lora_weights.safetensors` for `load_lora_weights`, with its ranks and alphas.

    Tensors go from the memory-mapped checkpoint to the new files shard by shard, so a model needs no memory of its
    size. Nothing is left of a conversion that fails.

    Returns:
        What it wrote into `config.output_dir`, of `PIPELINE_FILES` or `LORA_FILES`.

    Raises:
        ValueError: the checkpoint or the LoRA is not one of this model, or the folder holds what would be overwritten.
        OSError: a file cannot be read or written.
    """
    names = LORA_FILES if config.checkpoint is None else PIPELINE_FILES
    sources = tuple(filter(None, (config.checkpoint, config.base, config.lora)))
    with _replacing(Path(config.output_dir), names, config.overwrite, sources) as folder:
        adapters = {} if config.lora is None else load_original_loras(config.lora, alpha=config.lora_alpha)
        if config.checkpoint is None:
            arguments = {}
            for name, adapter in adapters.items():
                peft_config = adapter.peft_config()
                arguments[f"{name}_lora_layers"] = adapter.state_dict()
                arguments[f"{name}_lora_adapter_metadata"] = peft_config and peft_config.to_dict()
            CausalWanPipeline.save_lora_weights(folder, **arguments)
        else:
            _write_pipeline(config, adapters, folder)
        written = tuple(name for name in names if (folder / name).exists())
    return written


def _write_pipeline(config: ConversionConfig, adapters: dict[str, OriginalLora], folder: Path):
    model = find_published_model(config.recipe)
    _check_pipeline(model)
    experts = load_original_experts(config.checkpoint, config.weights or (), model)
    base, index = _base_folder(config.base)
    with init_empty_weights():
        sizes = CausalWanTransformer3DModel.load_config(base, subfolder="transformer")
        transformer = CausalWanTransformer3DModel.from_recipe(sizes, model)
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    for original in experts.values():
        check_fits(original.tensors, shapes)
    for name, adapter in adapters.items():
        if name not in experts:
            raise ValueError(f"this LoRA is for {name}, which this checkpoint does not hold.")
        adapter.check_fits(experts[name].tensors)

    for name in _SHARED:
        # Contents only: a base may be read-only, and its files links into a cache.
        for file in filter(Path.is_file, (base / name).rglob("*")):
            copy = folder / file.relative_to(base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    FlowMatchLCMScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    for name, original in experts.items():
        transformer.save_config(folder / name)
        _write_weights(original, adapters.get(name), config.dtype and getattr(torch, config.dtype), folder / name)
    written = {name: index[name] for name in _SHARED} | {
        "_class_name": "CausalWanPipeline",
        "scheduler": ("diffusers", "FlowMatchLCMScheduler"),
        **dict.fromkeys(experts, ("diffusers", "CausalWanTransformer3DModel")),
    }
    text = json.dumps(written | model.pipeline, indent=2, sort_keys=True) + "\n"
    (folder / CausalWanPipeline.config_name).write_text(text)


def _write_weights(original: OriginalWeights, adapter: OriginalLora | None, dtype: torch.dtype | None, folder: Path):
    dtypes = {name: dtype or original.dtype(name) for name in original.tensors}

    def converted(name: str) -> torch.Tensor:
        tensor = original.value(name)
        if adapter is not None and adapter.changes(name):
            tensor = adapter.merge(name, tensor)
        return tensor.to(dtypes[name]).contiguous()

    num_bytes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in original.tensors.items()}
    save_shards(num_bytes, converted, folder)


def _check_pipeline(model: PublishedModel):
    """Raises a `ValueError` if the pipeline's settings of a recipe would only fail when the folder is loaded."""
    components, settings = CausalWanPipeline._get_signature_keys(CausalWanPipeline)
    model.check_names("pipeline", settings)
    CausalWanPipeline(**dict.fromkeys(components), **model.pipeline)


@contextmanager
def _replacing(
    output_dir: Path, names: tuple[str, ...], overwrite: bool, sources: tuple[str | Path, ...]
) -> Iterator[Path]:
    """Yields a new folder inside `output_dir`; when the block ends, what is in it of `names` moves up, in their order.
    What had one of these names goes if `overwrite`, and must be none of the `sources`. After an error nothing is left
    of the folder, and what was there is as it was."""
    there = [output_dir / name for name in names if os.path.lexists(output_dir / name)]
    if there and not overwrite:
        raise ValueError(f"{there[0]} is there already: name another output_dir, or `overwrite` it.")
    for source in (Path(source).resolve() for source in sources if there):
        if source == output_dir.resolve() or any(source.is_relative_to(old.resolve()) for old in there):
            raise ValueError(f"{source} would be overwritten by what is made of it: name another output_dir.")
    new_folders = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = output_dir / PARTIAL
    try:
        partial.mkdir()
    except FileExistsError:
        raise ValueError(
            f"{partial} is there: another conversion is writing it, or was killed; then remove it."
        ) from None
    try:
        # safetensors makes files that only their owner can read. The umask itself can only be read by setting it.
        (partial / "mode").touch()
        mode = (partial / "mode").stat().st_mode
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        for old in reversed(there):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        for name in names:
            if (partial / name).exists():
                (partial / name).rename(output_dir / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in new_folders:
            with suppress(OSError):  # not empty: it worked
                folder.rmdir()


def _base_folder(base: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder, downloaded if it is on the Hub, and its model_index.json."""
    folder = Path(base)
    if not folder.is_dir():
        try:
            # Its transformer is the one thing that is not used.
            ignored = ["transformer/*.safetensors", "transformer/*.bin"]
            folder = Path(snapshot_download(str(base), ignore_patterns=ignored))
        except Exception as error:  # the client has a class for each way to fail
            raise ValueError(f"{base} is no folder here, and the Hub did not give it: {error}") from None
    missing = [name for name in (*_SHARED, "transformer") if not any((folder / name).glob("*"))]
    if not missing:
        index = CausalWanPipeline.load_config(folder)
        missing = [f"{name} in its model_index.json" for name in _SHARED if name not in index]
    if missing:
        raise ValueError(f"{base} is no Wan pipeline in Diffusers format: it has no {', '.join(missing)}.")
    return folder, index


def save_shards(num_bytes: dict[str, int], tensor: Callable[[str], torch.Tensor], folder: Path) -> None:
    """Write tensors of these sizes into safetensors files of at most 5 GiB, with diffusers' index if several. No more
    than those of one file are in memory."""
    split = split_state_dict_into_shards_factory(
        num_bytes,
        get_storage_size=int,
        filename_pattern=SAFETENSORS_WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=_SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        safetensors.torch.save_file({name: tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

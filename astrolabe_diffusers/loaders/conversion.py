"""A published checkpoint becomes a Diffusers folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchLCMScheduler
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download

from ..models.transformer_causal_wan import CausalWanTransformer3DModel
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from .original_checkpoints import check_fits, load_tensors, select_weights, to_diffusers
from .original_lora import OriginalLora, load_original_lora
from .published_models import PublishedModel


_SHARED = ("tokenizer", "text_encoder", "vae")
_SHARD_BYTES = 5 * 1024**3


def convert_checkpoint(
    model: PublishedModel,
    checkpoint: str | Path,
    base: str | Path,
    output_dir: str | Path,
    lora: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """
    Write a complete pipeline folder for `CausalWanPipeline.from_pretrained`.

    Tensors go from the memory-mapped checkpoint to the new files shard by shard, so a model needs no memory of its
    size.

    Args:
        model: one of `PUBLISHED_MODELS`.
        checkpoint: the published `.pt` or `.safetensors` file.
        base: folder or Hub id of the Wan2.1 pipeline in Diffusers format, of the same size: text encoder, autoencoder
            and the sizes of the transformer are its.
        output_dir: the new folder.
        lora: a LoRA that is merged into the weights, in float32.
        dtype: of the new weights; by default each keeps its own.

    Raises:
        ValueError: the checkpoint or the LoRA is not one of this model; the message names tensors.
    """
    base, output_dir = _base_folder(base), Path(output_dir)
    weights = to_diffusers(select_weights(load_tensors(checkpoint), model.weights))
    with init_empty_weights():
        sizes = CausalWanTransformer3DModel.load_config(base, subfolder="transformer")
        transformer = CausalWanTransformer3DModel.from_config(sizes, **model.transformer)
    check_fits(weights, {name: tensor.shape for name, tensor in transformer.state_dict().items()})
    adapter = None if lora is None else load_original_lora(lora)
    if adapter is not None:
        adapter.check_fits(weights)

    output_dir.mkdir(parents=True, exist_ok=True)
    for name in _SHARED:
        shutil.copytree(base / name, output_dir / name, dirs_exist_ok=True)
    FlowMatchLCMScheduler(shift=5.0).save_pretrained(output_dir / "scheduler")
    transformer.save_config(output_dir / "transformer")
    save_shards(_tensors(weights, adapter, dtype), output_dir / "transformer")
    _write_index(base, output_dir, model)
    return output_dir


def convert_lora(lora: str | Path, output_dir: str | Path) -> Path:
    """Write a published LoRA as `pytorch_lora_weights.safetensors`, for `load_lora_weights`; rank and alpha
    are in it."""
    adapter = load_original_lora(lora)
    CausalWanPipeline.save_lora_weights(
        output_dir,
        transformer_lora_layers=adapter.state_dict(),
        transformer_lora_adapter_metadata=adapter.config().to_dict(),
    )
    return Path(output_dir)


def _base_folder(base: str | Path) -> Path:
    if not Path(base).is_dir():
        # Its transformer is the one thing that is not used.
        base = snapshot_download(str(base), ignore_patterns=["transformer/*.safetensors", "transformer/*.bin"])
    missing = [name for name in (*_SHARED, "transformer") if not (Path(base) / name).is_dir()]
    if missing:
        raise ValueError(f"{base} is no Wan pipeline in Diffusers format: it has no {', '.join(missing)}.")
    return Path(base)


def _tensors(
    weights: dict[str, torch.Tensor], adapter: OriginalLora | None, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in weights.items():
        target = dtype or tensor.dtype
        if adapter is not None and name.removesuffix(".weight") in adapter.modules:
            tensor = tensor.float() + adapter.delta(name.removesuffix(".weight"))
        yield name, tensor.to(target).contiguous()


def save_shards(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: str | Path, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write tensors as they come into safetensors files of at most `shard_bytes`, with diffusers' index if several.

    No more than a shard is in memory. How many there will be is known at the end only: then they get their names.
    """
    folder = Path(folder)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush():
        safetensors.torch.save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SAFETENSORS_WEIGHTS_NAME)
        return
    stem, weight_map = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors"), {}
    for i, names in enumerate(shards):
        file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_index(base: Path, output_dir: Path, model: PublishedModel) -> None:
    """`model_index.json`, last: a folder without one is not complete."""
    index = CausalWanPipeline.load_config(base)
    components = {name: index[name] for name in _SHARED}
    components["scheduler"] = ("diffusers", "FlowMatchLCMScheduler")
    components["transformer"] = ("diffusers", "CausalWanTransformer3DModel")
    written = {"_class_name": "CausalWanPipeline"} | components | model.pipeline
    (output_dir / CausalWanPipeline.config_name).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")

"""Which file of a folder or of a Hub repository is the LoRA, and the config that comes with it."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.hub_utils import _get_model_file
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..errors import close_matches
from ..files.text import parse_json, read_text
from .tensor_files import HUB_ARGUMENTS, fetch_link, load_tensors


# The names that diffusers and peft write, in the order of preference.
_NAMES = [f"{stem}{end}" for stem in ("pytorch_lora_weights", "adapter_model") for end in (".safetensors", ".bin")]
_CONFIG = "adapter_config.json"
HUB = ("subfolder", "revision", *HUB_ARGUMENTS)
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def find_lora_file(name: str | Path, weight_name: str | None = None, subfolder: str | None = None, **hub) -> Path:
    """
    The file of a LoRA, which `name` is, or which a folder or a Hub repository of that name holds, `weight_name` where
    there are several; downloaded if it is on the Hub, with peft's config beside it. `hub` are any of `HUB`.

    Raises:
        OSError: the Hub does not give it, or the name can only be a path's, and nothing is there.
        ValueError: there are several, or none.
    """
    if unknown := [argument for argument in hub if argument not in HUB]:
        raise TypeError(f"there is no argument {unknown[0]!r}{close_matches(unknown[0], HUB)}.")
    name = fetch_link(name, **hub)
    path = Path(name, subfolder or "")
    if path.is_dir():
        names = [file.name for file in path.iterdir() if file.is_file()]
        return path / (weight_name or _choose(names, path))
    if path.is_file() or isinstance(name, Path) or Path(name).suffix in _SUFFIXES:
        return path
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"there is no file or folder {name}.") from None

    def download(file: str) -> Path:
        return Path(_get_model_file(name, weights_name=file, subfolder=subfolder, **hub))

    if weight_name is None:
        start = f"{subfolder}/" if subfolder else ""
        names = [file.removeprefix(start) for file in _names_on_hub(name, **hub) if file.startswith(start)]
        weight_name = _choose([file for file in names if "/" not in file], name)
        if _CONFIG in names:
            download(_CONFIG)
    elif weight_name.startswith("adapter_model"):
        download(_CONFIG)
    return download(weight_name)


def _names_on_hub(repo: str, revision=None, token=None, cache_dir=None, local_files_only=None, **_) -> list[str]:
    """All files of a repository, or without the Hub those that are here."""
    if not (is_offline_mode() or local_files_only):
        return list_repo_files(repo, revision=revision, token=token)
    folder = Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir, local_files_only=True))
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]


def _choose(names: list[str], where: str | Path) -> str:
    for name in _NAMES:
        if name in names:
            return name
    for ends in (_SUFFIXES[:1], _SUFFIXES[1:]):
        found = sorted(name for name in names if name.endswith(ends))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{where} holds several files, {', '.join(found[:5])}: say which with `weight_name`.")
    raise ValueError(f"{where} holds no LoRA: no .safetensors, .bin, .pt or .pth.")


def read_lora_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file holds, as [`load_tensors`] reads it, and peft's config: of its header, as diffusers writes it, or of
    the `adapter_config.json` beside it; empty if there is none, a `ValueError` if it is not readable."""
    tensors = load_tensors(path)
    text, source = None, path
    with suppress(SafetensorError):  # another kind of file has no header
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    if text is None:
        source = path.parent / _CONFIG
        text = read_text(source) if source.is_file() else "{}"
    config = parse_json(text, f"the config of the LoRA in {source}")
    if not isinstance(config, dict):
        raise ValueError(f"the config of the LoRA in {source} is no dict.")
    return tensors, {name.removeprefix("transformer."): value for name, value in config.items()}

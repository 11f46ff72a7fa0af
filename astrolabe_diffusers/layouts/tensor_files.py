"""Tensors by name out of the kinds of files that people publish."""

import math
import mmap
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant, _get_model_file
from safetensors import safe_open

from ..files.text import parse_json, read_json


_LINK = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/]+)/(?:(?:blob|resolve)/(?P<revision>[^/]+)/)?"
    r"(?P<file>[^?#]+)(?:[?#].*)?"
)
# What of a download a user may say.
HUB_ARGUMENTS = ("force_download", "cache_dir", "proxies", "local_files_only", "token")
_INDEX = ".index.json"
# With the name of a variant, or without.
_IS_INDEX = re.compile(r".*\.index(\.[^.]+)?\.json")
_FOLDER_FILES = (SAFETENSORS_WEIGHTS_NAME, "model.safetensors", WEIGHTS_NAME, "pytorch_model.bin")

# What is saved under the name of a checkpoint and is none, by its beginning in lower case.
_NO_TENSORS = {
    b"gguf": "a GGUF file, which is not supported: take the .safetensors or .pt file of the model",
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for: run `git lfs pull`",
    b"<": "a web page, not a checkpoint: the download has gone wrong, or needs a login",
    b"{": "a JSON text, not a checkpoint: the download may have gone wrong",
}

_SAFETENSORS_DTYPES = {
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{"BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}


def load_tensors(path: str | Path, map_files: bool = True) -> dict[str, Any]:
    """
    What a checkpoint holds: tensors by name, or dicts of them by name. It is a safetensors or torch file, told by its
    contents, the index of a sharded checkpoint (`*.index.json`), or a folder with an index or one checkpoint.

    With `map_files` tensors are read when they are used, from a memory map; files of the old format of torch (before
    1.6) are always read whole.

    Raises:
        ValueError: it is no checkpoint, or one whose loading would run code.
    """
    tensors: dict[str, Any] = {}
    for file in find_weights(Path(path), _FOLDER_FILES):
        held = _load_file(file, map_files)
        if twice := tensors.keys() & held.keys():
            raise ValueError(f"two files of {path} hold {min(twice)}.")
        tensors |= held
    return tensors


def select_weights(checkpoint: dict[str, Any], keys: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """The tensors of a training checkpoint: of the first of these entries that it has, or its own. What lies beside
    them and is none is left out."""
    entry = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), checkpoint)
    tensors = {name: value for name, value in entry.items() if isinstance(value, torch.Tensor)}
    if checkpoint and entry is checkpoint and not tensors:
        raise ValueError(f"this checkpoint holds {', '.join(checkpoint)}, and none of {', '.join(keys)}.")
    return tensors


def misfits(weights: dict[str, torch.Tensor], shapes: dict[str, torch.Size]) -> str:
    """In words, which of `weights` are missing, unexpected or of another shape than `shapes`; empty if all fit."""
    other = [name for name, shape in shapes.items() if name in weights and weights[name].shape != shape]
    problems = {
        "missing": [name for name in shapes if name not in weights],
        "unexpected": [name for name in weights if name not in shapes],
        "of another shape": [f"{name} {tuple(weights[name].shape)} for {tuple(shapes[name])}" for name in other],
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    )


def fetch_link(source: str | Path, revision: str | None = None, **hub) -> str | Path:
    """The path of the file that a link to the Hub means, downloaded; anything else is a path already. Links are as a
    browser shows them (`.../blob/main/...`) or downloads (`.../resolve/main/...`); `revision` goes before theirs.

    Raises:
        ValueError: a link to something else.
        OSError: the Hub does not give it.
    """
    text = str(source)
    if Path(text).exists() or not re.match(r"https?://|huggingface\.co/|hf\.co/", text):
        return source
    link = _LINK.fullmatch(text)
    if link is None:
        raise ValueError(f"{text} is no link to a file on the Hub: https://huggingface.co/OWNER/NAME/blob/main/FILE.")
    return _get_model_file(link["repo"], weights_name=link["file"], revision=revision or link["revision"], **hub)


def find_weights(path: Path, names: tuple[str, ...]) -> list[Path]:
    """The weight files: `path` if it is one, or in that folder the shards of an index, or the first of `names`."""
    if _IS_INDEX.fullmatch(path.name):
        return _index_files(path)
    if not path.is_dir():
        return [path]
    if indices := sorted(path.glob(f"*{_INDEX}"), key=lambda index: (".safetensors" not in index.name, index.name)):
        return _index_files(indices[0])
    for name in names:
        if (path / name).is_file():
            return [path / name]
    raise ValueError(f"{path} holds no weights: there is no {', no '.join(names)}.")


def find_model(folder: Path, variant: str | None = None) -> Path:
    """The file or index with the weights of a model that diffusers has saved, of a `variant` if there is one: what
    `from_pretrained` of a pipeline takes. A `ValueError` if there is none."""
    for kind in dict.fromkeys((variant, None)):
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
            if (path := folder / _add_variant(name, kind)).is_file():
                return path
    raise ValueError(f"{folder} holds no weights: there is no {SAFETENSORS_WEIGHTS_NAME}.")


def _index_files(index: Path) -> list[Path]:
    if not index.is_file():
        raise FileNotFoundError(f"no such file: {index}")
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
        elsewhere = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is no index of weight files: it has no weight_map by name.") from None
    if elsewhere:
        raise ValueError(f"{index} names {elsewhere[0]}, which is no file beside it.")
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise ValueError(f"{index.parent} lacks {', '.join(missing)}, which its {index.name} names.")
    return [index.parent / shard for shard in shards]


def _load_file(path: Path, map_file: bool) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with open(path, "rb") as file:
        head = file.read(64)
    # JSON behind eight bytes with its length, of which the last are zero.
    is_safetensors = head[5:9] == b"\0\0\0{"
    for beginning, words in _NO_TENSORS.items():
        if not is_safetensors and head.lstrip().lower().startswith(beginning):
            raise ValueError(f"{path} is {words}.")
    try:
        if is_safetensors or path.suffix == ".safetensors":
            held = _map_safetensors(path, map_file)
        else:
            is_zip = head.startswith(b"PK")  # other files of torch cannot be mapped
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=map_file and is_zip)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        words = f"{found[1]} beside tensors" if found else "what are no tensors"
        raise ValueError(f"{path} holds {words}: loading it would run code from the file, which is refused.") from None
    except Exception as error:  # there is a class for each way to be damaged
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(f"{path} is no readable checkpoint: {reason}") from None
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise ValueError(f"{path} holds a {type(held).__name__}, not tensors by name.")
    return held


def _map_safetensors(path: Path, map_file: bool) -> dict[str, torch.Tensor]:
    """The tensors of a file on a read-only map. That of `safetensors` is writable, and for such a map Linux wants as
    much memory as the file is long: one of 28 GB would not load on a machine of 24."""
    with safe_open(path, framework="np"):
        pass  # checks the header against the length of the file
    with open(path, "rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = parse_json(file.read(header_size), "its header")
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if map_file else path.read_bytes()
    header.pop("__metadata__", None)
    tensors = {}
    with warnings.catch_warnings():
        # Nobody writes to them.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        for name, info in header.items():
            if info["dtype"] not in _SAFETENSORS_DTYPES:
                raise ValueError(f"{name} is of dtype {info['dtype']}, which is not supported.")
            dtype, count = _SAFETENSORS_DTYPES[info["dtype"]], math.prod(info["shape"])
            begin = 8 + header_size + info["data_offsets"][0]
            if count:
                tensors[name] = torch.frombuffer(buffer, dtype=dtype, count=count, offset=begin).view(info["shape"])
            else:  # which torch makes of no buffer
                tensors[name] = torch.empty(info["shape"], dtype=dtype)
    return tensors

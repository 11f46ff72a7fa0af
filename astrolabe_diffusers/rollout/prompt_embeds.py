"""Text embeddings on the disk, so that a run finds those of earlier runs and needs no text encoder."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from uuid import uuid4

import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..distributed.agreement import leave_if_called_off
from ..errors import UserError
from ..files.writing import PARTIAL, to_disk, writing


# Of the files. What changes them, or how prompts are encoded, raises it.
FORMAT = 1
# Folders of a pipeline whose files say what a prompt's embeddings are.
COMPONENTS = ("text_encoder", "tokenizer")


def encoder_digest(model: str, dtype: torch.dtype, revision: str | None = None, variant: str | None = None) -> str:
    """Another one for every other text encoder, tokenizer or dtype: of all bytes of their files in a pipeline's folder
    or Hub repository, of the pipeline's class and length, and of the version of transformers."""
    folder = model if Path(model).is_dir() else DiffusionPipeline.download(model, revision=revision, variant=variant)
    config = DiffusionPipeline.load_config(folder)
    identity = {
        "format": FORMAT,
        "transformers": transformers.__version__,
        "dtype": str(dtype),
        "variant": variant,
        "pipeline": config["_class_name"],
        "max_sequence_length": config.get("max_sequence_length"),
    }
    for file in sorted(file for name in COMPONENTS for file in (Path(folder) / name).rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            identity[file.relative_to(folder).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


class StoredPromptEmbeds:
    """
    Embeddings of single prompts, each a file of its own in a folder that several runs and processes may use at once.

    A file gets its name when it is whole and on the disk. Without the zeros beyond the prompt's end it is small: a
    prompt of UMT5 takes 8 kB a token in bfloat16.

    Args:
        folder: with a folder in it for each `digest`, an [`encoder_digest`].
    """

    def __init__(self, folder: str | Path, digest: str):
        self.folder = Path(folder) / digest[:32]

    def path(self, prompt: str) -> Path:
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"

    def find(self, prompt: str) -> torch.Tensor | None:
        """`(1, L, D)` on the CPU; `None` if there is no file, or not what [`~StoredPromptEmbeds.write`] wrote."""
        try:
            with safe_open(self.path(prompt), "pt") as file:
                embeds, metadata = file.get_tensor("prompt_embeds"), file.metadata()
            if metadata["sha256"] != _sha256(embeds):
                return None
            return torch.cat([embeds, embeds.new_zeros(int(metadata["length"]) - len(embeds), embeds.shape[1])])[None]
        except (OSError, SafetensorError, KeyError, TypeError):
            return None

    def read(self, prompt: str) -> torch.Tensor:
        """As [`~StoredPromptEmbeds.find`], of a prompt that is there; else a [`UserError`]."""
        embeds = self.find(prompt)
        if embeds is None:
            raise UserError(f"prompt_embeds_dir: {self.path(prompt)}, of {prompt[:80]!r}, is missing or damaged.")
        return embeds

    def check(self, prompts: Iterable[str]):
        """A [`UserError`] if this process does not see what others wrote of these."""
        if not all(self.path(prompt).is_file() for prompt in prompts):
            raise UserError(
                f"prompt_embeds_dir {self.folder.parent}: a process does not see the files of the others; it must be "
                "a folder that all processes share."
            )

    def write(self, prompt: str, embeds: torch.Tensor):
        """`embeds` `(1, L, D)`; a [`UserError`] if they cannot be written."""
        path, length = self.path(prompt), embeds.shape[1]
        rows = embeds[0].any(1).nonzero()
        number = int(rows[-1]) + 1 if len(rows) else 0  # until the last one that is not zero
        embeds = embeds[0, :number].cpu().contiguous()
        # Not `save_file`, whose files only their owner can read.
        data = save({"prompt_embeds": embeds}, {"sha256": _sha256(embeds), "length": str(length)})
        # Of this process alone: another one may be writing the same prompt.
        partial = path.with_name(f"{path.stem[:16]}-{uuid4().hex}{PARTIAL}")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(data)
                to_disk(partial)
                partial.replace(path)
                to_disk(path.parent)
            finally:
                partial.unlink(missing_ok=True)

    def complete(self, prompts: Sequence[str], load_encoder: Callable[[], Callable[[str], torch.Tensor]]):
        """Writes embeddings of those `prompts` that have none. Only then there is a call of `load_encoder`, for what
        makes `(1, L, D)` of a prompt. Long, so for [`raise_together`] blocks."""
        encode = None
        for prompt in dict.fromkeys(prompts):
            leave_if_called_off()
            if self.find(prompt) is None:
                encode = encode or load_encoder()
                self.write(prompt, encode(prompt))


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest()

"""Prompt files, and which prompts, samples and batches make up an epoch."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, as_user_error
from ..files.text import parse_json, read_lines
from ..pipelines.scene_prompt import check_text


if TYPE_CHECKING:
    from .config import VideoConfig

logger = logging.getLogger(__name__)

# Of the files in a prompt folder, after the split's name.
ENDINGS = (".txt", ".jsonl", "_metadata.jsonl")
# Where a dataset has its prompts if nobody says.
COLUMNS = ("prompt", "text")


@dataclass(frozen=True)
class Prompt:
    """A prompt and whatever else its line of a JSONL file says."""

    text: str
    metadata: dict[str, Any] | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a `.txt` file, one a line, or a `.jsonl` file, objects with a `prompt`. Empty lines do not count."""
    path = Path(path)
    with as_user_error("prompts"):
        lines = read_lines(path)
    prompts = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and path.suffix != ".jsonl":
            prompts.append(Prompt(line))
        elif line:
            try:
                metadata = parse_json(line, path)
                prompts.append(Prompt(metadata.pop("prompt"), metadata))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f'{path}, line {number}: not a JSON object with a "prompt".') from error
    if not prompts:
        raise UserError(f"the prompt file {path} is empty.")
    return prompts


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from.

    Attributes:
        name: a file, a folder with a file a split, or a dataset of the library `datasets`, id or folder.
        data_dir: folder inside the dataset's repository.
        column: of the dataset; its other columns are the metadata. Empty rows do not count, as empty lines of a file.
    """

    name: str
    data_dir: str | None = None
    column: str | None = None

    @classmethod
    def of(cls, config: "VideoConfig") -> "PromptSource":
        """The prompts that settings name, or those that lie beside the model."""
        path = Path(config.model) / "prompts"
        if config.prompts is None and not path.is_dir():
            raise UserError(f"there is no folder {path}: check the model's name, or give prompts, a file or a folder.")
        name = str(path) if config.prompts is None else config.prompts
        return cls(name, config.prompts_data_dir, config.prompt_column)

    def read(self, split: str) -> list[Prompt]:
        """The prompts of a split; those of a file, which is all of them. A [`UserError`] if there are
        none."""
        path = Path(self.name)
        files = [path] if path.is_file() else [path / f"{split}{ending}" for ending in ENDINGS]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            prompts = self._read_dataset(split)
        elif file.suffix in (".txt", ".jsonl"):
            prompts = read_prompts(file)
        else:
            raise UserError(f"the prompt file {file} must be a .txt or a .jsonl file.")
        return _checked(prompts, f" of {self.name}")

    def _read_dataset(self, split: str) -> list[Prompt]:
        # Imported here: it costs a second, and most runs have a file.
        from datasets import load_dataset

        with as_user_error(f"{self.name} is no prompt file, has no {split}.txt, and cannot be loaded as a dataset"):
            dataset = load_dataset(self.name, data_dir=self.data_dir, split=split)
        columns = (self.column,) if self.column else COLUMNS
        column = next((column for column in columns if column in dataset.column_names), None)
        if column is None:
            names = " or ".join(map(repr, columns))
            raise UserError(f"{self.name} has no column {names}; its columns: {', '.join(dataset.column_names)}.")
        return [Prompt(row.pop(column), row) for row in dataset if str(row[column]).strip()]


def _checked(prompts: list[Prompt], of: str = "") -> list[Prompt]:
    for index, prompt in enumerate(prompts):
        with as_user_error(f"prompt {index}{of}"):
            check_text(prompt.text)
    return prompts


def as_prompts(items: Iterable[str | dict[str, Any] | Prompt]) -> list[Prompt]:
    """Prompts of a list of texts, a list of dicts with a `prompt`, or a `datasets.Dataset`; a [`UserError`]
    if there are none, or something else is among them."""
    prompts = []
    for index, item in enumerate(items):
        if isinstance(item, dict):
            rest = dict(item)
            column = next((column for column in COLUMNS if column in rest), None)
            item = Prompt(rest.pop(column), rest) if column else item
        prompt = Prompt(item) if isinstance(item, str) else item
        if not isinstance(prompt, Prompt):
            raise UserError(f"prompt {index} must be a text or a dict with a `prompt`, not {item!r:.80}.")
        prompts.append(prompt)
    if not prompts:
        raise UserError("there are no prompts.")
    return _checked(prompts)


def train_and_eval_prompts(
    source: PromptSource, num_eval_prompts: int, train_split: str = "train", eval_split: str = "test"
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of a source. One without a second split, a single file for example, gives its
    held-out prompts from the first; see [`hold_out`]."""
    own_split = not Path(source.name).is_file() and eval_split != train_split
    prompts = source.read(train_split)
    return hold_out(prompts, source.read(eval_split) if own_split else None, num_eval_prompts, source.name)


def hold_out(
    prompts: list[Prompt], held_out: list[Prompt] | None, num_eval_prompts: int, name: str
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, the latter evenly spaced.

    They are chosen from `held_out`, or from those of training if it is `None`. No text is in both: what is held out is
    left out of the training prompts, wherever it stands there. `name` is that of their source, for errors.
    """
    own_source = held_out is not None
    if not own_source:
        distinct: dict[str, Prompt] = {}
        for prompt in prompts:
            distinct.setdefault(_text_key(prompt), prompt)
        held_out = list(distinct.values())
        if len(held_out) <= num_eval_prompts:
            raise UserError(
                f"{name} has {len(held_out)} different prompts, but num_eval_prompts={num_eval_prompts} of "
                "them are to be held out from training; lower it, or use a folder with train.txt and test.txt."
            )
    held_out = spread(held_out, num_eval_prompts)
    texts = {_text_key(prompt) for prompt in held_out}
    train = [prompt for prompt in prompts if _text_key(prompt) not in texts]
    if not train:
        raise UserError(f"{name}: all training prompts are held out too, so that none is left to train on.")
    if own_source and len(train) < len(prompts):
        logger.warning("%d training prompts are left out: they are held out.", len(prompts) - len(train))
    return train, held_out


def _text_key(prompt: Prompt) -> str:
    """Equal for texts that differ in white space and capitals alone."""
    return " ".join(prompt.text.split()).casefold()


def spread(items: Sequence, number: int) -> list:
    """`number` items, or all if there are fewer, evenly spaced: a sorted file is covered from end to end."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]

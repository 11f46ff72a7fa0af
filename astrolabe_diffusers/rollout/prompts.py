"""Prompt files, and which prompts, samples and batches make up an epoch."""

import logging
from collections.abc import Iterable, Mapping, Sequence
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

    @property
    def has_splits(self) -> bool:
        return not Path(self.name).is_file()

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
        return _checked(prompts, self.name)

    def _read_dataset(self, split: str) -> list[Prompt]:
        # Imported here: it costs a second, and most runs have a file.
        from datasets import load_dataset

        with as_user_error(f"{self.name} is no prompt file, has no {split}.txt, and cannot be loaded as a dataset"):
            dataset = load_dataset(self.name, data_dir=self.data_dir, split=split)
        return _dataset_prompts(dataset, self.name, self.column)


@dataclass(frozen=True)
class GivenPrompts:
    """Prompts that are objects in Python, read as those of a [`PromptSource`].

    Attributes:
        prompts: texts, dicts with a `prompt`, or a `datasets.Dataset`; or a `datasets.DatasetDict`, or another
            mapping of such by split.
        name: what errors call them.
        column: as of a [`PromptSource`], of dicts too.
    """

    prompts: Iterable[str | dict[str, Any] | Prompt] | Mapping[str, Iterable]
    name: str
    column: str | None = None

    @property
    def has_splits(self) -> bool:
        return isinstance(self.prompts, Mapping)

    def read(self, split: str) -> list[Prompt]:
        """The prompts of a split; all of them where there are none. A [`UserError`] if there are no prompts, or
        something else is among them."""
        items = self.prompts
        if self.has_splits:
            if split not in items:
                known = ", ".join(map(str, items))
                raise UserError(
                    f"{self.name} has no split {split!r}; its splits: {known} (train_split and eval_split say which "
                    "to take)."
                )
            items = items[split]
        # Passed through, these give characters and names of columns.
        if isinstance(items, str) or hasattr(items, "columns"):
            raise UserError(
                f"{self.name} must be a list of prompts or a datasets.Dataset, not a {type(items).__name__}."
            )
        if getattr(items, "column_names", None):
            prompts = _dataset_prompts(items, self.name, self.column)
        else:
            with as_user_error(self.name, (TypeError,)):
                items = iter(items)
            prompts = [self._prompt(index, item) for index, item in enumerate(items)]
        return _checked(prompts, self.name)

    def _prompt(self, index: int, item: str | dict[str, Any] | Prompt) -> Prompt:
        if isinstance(item, dict):
            rest = dict(item)
            column = _find_column(rest, f"prompt {index} of {self.name}", self.column)
            return Prompt(rest.pop(column), rest)
        if not isinstance(item, str | Prompt):
            raise UserError(
                f"prompt {index} of {self.name} must be a text or a dict with a `prompt`, not {item!r:.80}."
            )
        return Prompt(item) if isinstance(item, str) else item


def _dataset_prompts(dataset: Iterable[dict[str, Any]], name: str, column: str | None) -> list[Prompt]:
    column = _find_column(dataset.column_names, name, column)
    return [Prompt(row.pop(column), row) for row in dataset if str(row[column]).strip()]


def _find_column(names: Iterable[str], what: str, column: str | None) -> str:
    columns = (column,) if column else COLUMNS
    found = next((column for column in columns if column in names), None)
    if found is None:
        wanted, known = " or ".join(map(repr, columns)), ", ".join(map(str, names))
        raise UserError(f"{what} has no column {wanted}; its columns: {known} (prompt_column says which to take).")
    return found


def _checked(prompts: list[Prompt], name: str) -> list[Prompt]:
    if not prompts:
        raise UserError(f"{name} has no prompts.")
    for index, prompt in enumerate(prompts):
        with as_user_error(f"prompt {index} of {name}"):
            check_text(prompt.text)
    return prompts


def train_and_eval_prompts(
    source: PromptSource | GivenPrompts, num_eval_prompts: int, train_split: str = "train", eval_split: str = "test"
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of a source. One without a second split, a single file for example, gives its
    held-out prompts from the first; see [`hold_out`]."""
    own_split = source.has_splits and eval_split != train_split
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

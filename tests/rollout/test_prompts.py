import json
from collections import Counter
from pathlib import Path

import pandas
import pytest
from datasets import Dataset, DatasetDict

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.prompts import (
    GivenPrompts,
    Prompt,
    PromptSource,
    read_prompts,
    spread,
    train_and_eval_prompts,
)
from astrolabe_diffusers.rollout.samples import epoch_samples, eval_samples, process_batches
from astrolabe_diffusers.rollout.seeds import stable_seed


PROMPTS = [Prompt(f"prompt {i}") for i in range(5)]


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def texts(prompts):
    return [prompt.text for prompt in prompts]


def test_text_files_of_a_folder(tmp_path):
    (tmp_path / "train.txt").write_text("one\n\n  two \nthree\n")
    (tmp_path / "test.txt").write_text("\n".join(f"held out {i}" for i in range(10)))
    train, test = train_and_eval_prompts(PromptSource(str(tmp_path)), 3)
    assert texts(train) == ["one", "two", "three"]
    assert texts(test) == ["held out 0", "held out 3", "held out 6"]


@pytest.mark.parametrize("ending", [".jsonl", "_metadata.jsonl"])
def test_jsonl_keeps_the_metadata(tmp_path, ending):
    """In the layouts of published prompt sets."""
    for split in ("train", "test"):
        line = json.dumps({"prompt": f"a {split} cat", "color": "red"})
        (tmp_path / f"{split}{ending}").write_text(line + "\n")
    train, test = train_and_eval_prompts(PromptSource(str(tmp_path)), 3)
    assert train == [Prompt("a train cat", {"color": "red"})] and test == [Prompt("a test cat", {"color": "red"})]
    assert PromptSource(str(tmp_path / f"test{ending}")).read("any") == test


def test_single_file_is_split_without_overlap(tmp_path):
    path = tmp_path / "all.txt"
    path.write_text("\n".join(f"p{i}" for i in range(10)))
    train, test = train_and_eval_prompts(PromptSource(str(path)), 4)
    assert len(test) == 4 and {p.text for p in train} | {p.text for p in test} == {f"p{i}" for i in range(10)}
    assert len(train) == 6


def test_dataset(dataset_cache):
    """A folder of embedded prompts is a text dataset of three splits with one column, called `text`."""
    folder = Path(TINY_SHAPES) / "prompts" / "two_objects"
    expected = texts(read_prompts(folder / "test.txt"))
    source = PromptSource(TINY_SHAPES, data_dir="prompts/two_objects")
    assert texts(source.read("test")) == expected
    assert texts(PromptSource(str(folder)).read("test[:3]")) == expected[:3]
    train, test = train_and_eval_prompts(source, 5, "train[:20]", "test")
    assert texts(train) == texts(read_prompts(folder / "train.txt"))[:20]
    assert texts(test) == texts(spread(read_prompts(folder / "test.txt"), 5))
    # One split: what is held out is taken from it.
    train, test = train_and_eval_prompts(source, 5, "test", "test")
    assert len(test) == 5 and sorted(texts(train) + texts(test)) == sorted(expected)


def test_other_columns_are_metadata(dataset_cache, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("caption,color\na cat,red\na dog,blue\n")
    prompts = PromptSource(str(tmp_path / "data"), column="caption").read("train")
    assert prompts == [Prompt("a cat", {"color": "red"}), Prompt("a dog", {"color": "blue"})]
    with pytest.raises(UserError, match="no column 'prompt' or 'text'; its columns: caption, color"):
        PromptSource(str(tmp_path / "data")).read("train")


def test_empty_rows_of_a_dataset_do_not_count(dataset_cache, tmp_path):
    """As those of a file: here the folder of a dataset's repository has the same file."""
    (tmp_path / "vidprom").mkdir()
    (tmp_path / "vidprom" / "train.txt").write_text("a cat\n\n  \na dog\n")
    prompts = PromptSource(str(tmp_path), data_dir="vidprom").read("train")
    assert texts(prompts) == ["a cat", "a dog"] == texts(PromptSource(str(tmp_path / "vidprom")).read("train"))


def test_wrong_column_and_split(dataset_cache):
    with pytest.raises(UserError, match="no column 'prompt'; its columns: text"):
        PromptSource(TINY_SHAPES, "prompts/two_objects", "prompt").read("test")
    with pytest.raises(UserError, match="Should be one of .'train', 'validation', 'test'"):
        PromptSource(TINY_SHAPES, "prompts/two_objects").read("tset")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "no prompt file, has no train.txt, and cannot be loaded as a dataset"),
        ({"prompts/train.txt": "a"}, "has no test.txt, and cannot be loaded as a dataset: Unknown split"),
        ({"prompts/train.txt": " \n", "prompts/test.txt": "a"}, "train.txt is empty"),
        ({"prompts/train.jsonl": '{"text": "a"}', "prompts/test.txt": "a"}, "train.jsonl, line 1"),
        ({"prompts/train.jsonl": '{"prompt": "a"}\nnonsense', "prompts/test.txt": "a"}, "train.jsonl, line 2"),
        ({"prompts/train.jsonl": '{"prompt": "a"}\n{"prompt": 5}'}, "prompt 1 of .* 5 is no text"),
    ],
)
def test_bad_folders(dataset_cache, tmp_path, content, words):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        train_and_eval_prompts(PromptSource(str(tmp_path / "prompts")), 2)


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_lines_are_those_of_the_file_whatever_wrote_it(tmp_path, ending):
    wanted = ["a red circle\u2028moves left", "a blue\x85square"]
    lines = wanted if ending == "txt" else [json.dumps({"prompt": text}, ensure_ascii=False) for text in wanted]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / f"prompts.{ending}").write_bytes("\r\n".join(lines).encode(encoding))
        assert texts(read_prompts(tmp_path / f"prompts.{ending}")) == wanted


def test_file_in_another_encoding(tmp_path):
    (tmp_path / "p.txt").write_bytes("a cafe\na café".encode("latin-1"))
    with pytest.raises(UserError, match="p.txt is no text in UTF-8: line 2 has the byte 0xe9") as error:
        read_prompts(tmp_path / "p.txt")
    assert "\n" not in str(error.value)


def test_no_held_out_text_is_trained_on(tmp_path, caplog):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n" * 6 + "A  blue square\na blue square\n" * 3 + "a green cross\n")
    train, held_out = train_and_eval_prompts(PromptSource(str(path)), 2)
    assert texts(held_out) == ["a red circle", "A  blue square"] and texts(train) == ["a green cross"]

    (tmp_path / "train.txt").write_text("a red circle\nb\nc\n")
    (tmp_path / "test.txt").write_text("A red circle\nd\n")
    assert not caplog.records
    train, held_out = train_and_eval_prompts(PromptSource(str(tmp_path)), 2)
    assert texts(train) == ["b", "c"] and texts(held_out) == ["A red circle", "d"]
    assert caplog.messages == ["1 training prompts are left out: they are held out."]
    (tmp_path / "train.txt").write_text("d\n")
    with pytest.raises(UserError, match="all training prompts are held out"):
        train_and_eval_prompts(PromptSource(str(tmp_path)), 2)


def test_what_is_given_in_python():
    rows = [{"prompt": "a", "text": "b", "caption": "c"}, {"prompt": "d", "text": "e", "caption": "f"}]
    expected = [Prompt("a", {"text": "b", "caption": "c"}), Prompt("d", {"text": "e", "caption": "f"})]
    for given in (rows, iter(rows), Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset(), expected):
        assert GivenPrompts(given, "train_prompts").read("any") == expected
    for given in (rows, Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        assert texts(GivenPrompts(given, "train_prompts", "caption").read("any")) == ["c", "f"]
    # A text has no column, and is the prompt.
    assert texts(GivenPrompts(["a", "b"], "train_prompts", "caption").read("any")) == ["a", "b"]
    # Empty rows of a dataset do not count, wherever it is from.
    assert texts(GivenPrompts(Dataset.from_dict({"text": ["a", " ", "b"]}), "train_prompts").read("any")) == ["a", "b"]


def test_splits_that_are_given():
    train, test = Dataset.from_dict({"text": ["a", "b", "c"]}), Dataset.from_dict({"text": ["d", "e"]})
    for given in (DatasetDict(train=train, test=test), {"train": ["a", "b", "c"], "test": [{"prompt": "d"}, "e"]}):
        source = GivenPrompts(given, "train_prompts")
        assert [texts(split) for split in train_and_eval_prompts(source, 1)] == [["a", "b", "c"], ["d"]]
        # One split: what is held out is taken from it.
        prompts, held_out = train_and_eval_prompts(source, 1, "train", "train")
        assert texts(held_out) == ["a"] and texts(prompts) == ["b", "c"]
        with pytest.raises(UserError, match="train_prompts has no split 'validation'; its splits: train, test"):
            train_and_eval_prompts(source, 1, "train", "validation")


NO_COLUMN = "has no column 'prompt' or 'text'; its columns: caption .prompt_column says which"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "train_prompts has no prompts"),
        (Dataset.from_dict({"text": [" "]}), "train_prompts has no prompts"),
        (["a", 5], "prompt 1 of train_prompts must be a text or a dict with a `prompt`, not 5"),
        ([{"prompt": 5}], "prompt 0 of train_prompts: .* 5 is no text"),
        ([{"caption": "a"}], f"prompt 0 of train_prompts {NO_COLUMN}"),
        (Dataset.from_dict({"caption": ["a"]}), f"train_prompts {NO_COLUMN}"),
        (pandas.DataFrame({"prompt": ["a"], "text": ["b"]}), "must be a list of prompts or .* not a DataFrame"),
        ({"train": "a red circle"}, "must be a list of prompts or .* not a str"),
        ({"prompt": "a red circle"}, "has no split 'train'; its splits: prompt"),
        (5, "train_prompts: 'int' object is not iterable"),
    ],
)  # fmt: skip
def test_what_is_given_and_cannot_be(given, words):
    with pytest.raises(UserError, match=words) as error:
        GivenPrompts(given, "train_prompts").read("train")
    assert "\n" not in str(error.value)


def test_single_file_too_short_or_of_unknown_kind(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nb")
    with pytest.raises(UserError, match="has 2 different prompts, but num_eval_prompts=2"):
        train_and_eval_prompts(PromptSource(str(tmp_path / "p.txt")), 2)
    (tmp_path / "p.csv").write_text("a\nb")
    with pytest.raises(UserError, match="must be a .txt or a .jsonl"):
        train_and_eval_prompts(PromptSource(str(tmp_path / "p.csv")), 1)


def test_spread_covers_and_never_repeats():
    assert spread(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    assert spread("abc", 9) == ["a", "b", "c"]


def test_epochs_pass_through_all_prompts_evenly_and_reproducibly():
    samples = [s for epoch in range(5) for s in epoch_samples(PROMPTS, 3, 2, epoch, seed=1)]
    assert set(Counter(s.prompt.text for s in samples).values()) == {6}  # 15 groups of 2 over 5 prompts
    assert len({s.key for s in samples}) == len(samples) == 30
    assert samples[6:12] == epoch_samples(PROMPTS, 3, 2, 1, seed=1)
    assert [s.prompt for s in samples[:6]] != [s.prompt for s in epoch_samples(PROMPTS, 3, 2, 0, seed=2)]
    for epoch in range(5):
        for group in range(3):
            members = samples[(epoch * 3 + group) * 2 :][:2]
            assert {m.group for m in members} == {group} and len({m.prompt for m in members}) == 1


def test_prompt_twice_in_an_epoch_makes_different_samples():
    samples = epoch_samples(PROMPTS[:1], 3, 2, 0, seed=1)
    assert len({s.key for s in samples}) == 6 and {s.group for s in samples} == {0, 1, 2}


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(num_processes):
    items = list(range(32))
    batch_size = 8 // num_processes
    parts = [process_batches(items, batch_size, rank, num_processes) for rank in range(num_processes)]
    assert [[i for part in parts for i in part[b]] for b in range(4)] == [items[i : i + 8] for i in range(0, 32, 8)]


def test_uneven_evaluation_is_complete():
    items = list(range(13))
    parts = [process_batches(items, 4, rank, 3) for rank in range(3)]
    assert sorted(i for part in parts for batch in part for i in batch) == items


def test_eval_samples_take_every_prompt_before_the_next_seed():
    samples = eval_samples(PROMPTS, 2)
    assert [s.prompt for s in samples] == PROMPTS * 2
    assert len({s.key for s in samples}) == 10


def test_stable_seed_is_stable():
    # The number must never change: it decides what a seed in a configuration means.
    assert stable_seed("sample", 42, 0, 1, 2) == 4776087824508481470
    assert stable_seed("a", 1) != stable_seed("a", 2)

import json

import pytest
import torch

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.generation.jobs import Job, batches, load_prompts, make_jobs
from astrolabe_diffusers.training.errors import UserError
from astrolabe_diffusers.training.prompts import Prompt


@pytest.fixture
def dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_text_and_jsonl_files(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    assert load_prompts(str(tmp_path / "p.txt"), "", "") == [Prompt("a cat"), Prompt("a dog")]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a cat", "color": "red"}) + "\n")
    assert load_prompts(str(tmp_path / "p.jsonl"), "", "") == [Prompt("a cat", {"color": "red"})]


def test_dataset(dataset_cache):
    """The embedded prompts are a text dataset of two splits with one column."""
    folder = f"{TINY_SHAPES}/prompts"
    expected = load_prompts(f"{folder}/test.txt", "", "")
    assert [p.text for p in load_prompts(folder, "text", "test")] == [p.text for p in expected]
    assert [p.text for p in load_prompts(folder, "text", "test[:3]")] == [p.text for p in expected[:3]]


def test_other_columns_are_metadata(dataset_cache, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("caption,color\na cat,red\na dog,blue\n")
    prompts = load_prompts(str(tmp_path / "data"), "caption", "train")
    assert prompts == [Prompt("a cat", {"color": "red"}), Prompt("a dog", {"color": "blue"})]


@pytest.mark.parametrize(
    ("column", "split", "words"),
    [
        ("prompt", "test", "no column 'prompt'; its columns: text"),
        ("text", "tset", "Should be one of .'train', 'test'"),
    ],
)
def test_wrong_column_and_split(dataset_cache, column, split, words):
    with pytest.raises(UserError, match=words):
        load_prompts(f"{TINY_SHAPES}/prompts", column, split)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.csv", "a", "must be a .txt or a .jsonl file"),
        ("p.txt", "\n", "is empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 5}', "prompt 1 of .* is 5 and no text"),
        ("p.jsonl", '{"text": "a"}', "line 1"),
    ],
)
def test_bad_files(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        load_prompts(str(tmp_path / name), "prompt", "train")


def test_missing_file(dataset_cache, tmp_path):
    with pytest.raises(UserError, match="nowhere.txt is no file, and cannot be loaded as a dataset"):
        load_prompts(str(tmp_path / "nowhere.txt"), "prompt", "train")


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("A cat, surfing!", "a-cat-surfing"),
        ("../..\\x\0y", "x-y"),
        ("一只猫", "一只猫"),
        ("...", ""),
        ("word " * 50, "word-word-word-word-word-word-word-word"),
    ],
)
def test_file_names(prompt, slug):
    assert Job(Prompt(prompt), 3, 1, 9).file == f"00003-1-{slug}.mp4"


def test_jobs_have_names_and_random_numbers_of_their_own():
    jobs = make_jobs([Prompt("a cat"), Prompt("a cat"), Prompt("a dog")], [21, 9, 21], 4)
    assert [(job.prompt_index, job.video_number) for job in jobs] == [(i, k) for i in range(3) for k in range(4)]
    assert [job.num_frames for job in jobs] == [21] * 4 + [9] * 4 + [21] * 4
    noises = {torch.randn(1, generator=job.generator(seed)).item() for job in jobs for seed in (0, 1)}
    assert len({job.file for job in jobs}) == 12 and len(noises) == 24


def test_batches_hold_jobs_of_equal_length():
    jobs = [Job(Prompt("a"), i, 0, frames) for i, frames in enumerate((21, 9, 21, 21, 9, 33, 21))]
    assert [[job.prompt_index for job in batch] for batch in batches(jobs, 3)] == [[1, 4], [0, 2, 3], [6], [5]]
    assert list(batches([], 3)) == []

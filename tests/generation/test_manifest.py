import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.generation.manifest import Manifest, VideoJob, batches, describe, make_jobs
from astrolabe_diffusers.rollout.prompts import Prompt


SETTINGS = {"seed": 0, "lora": {"a": 0.5}, "sigmas": [1.0, 0.5], "dtype": "float32"}


@pytest.fixture
def jobs():
    return make_jobs([Prompt(text) for text in ("a cat", "a dog", "a bird")], [9, 9, 9], 1)


@pytest.fixture
def folder(tmp_path, jobs):
    """Three complete videos."""
    manifest = Manifest(tmp_path / "videos")
    manifest.folder.mkdir()
    assert manifest.start(jobs, SETTINGS, ()) == jobs
    for job in reversed(jobs):
        (manifest.folder / job.file).write_bytes(b"video")
        manifest.append({**describe(job), **SETTINGS, "file": job.file, "bytes": 5, "scores": {"sharpness": 0.5}})
    return manifest.folder


def pending(folder, jobs, settings=SETTINGS, rewards=(), reward_options=None):
    return [job.prompt_index for job in Manifest(folder).start(jobs, settings, rewards, reward_options)]


def test_complete_videos_are_not_pending(folder, jobs):
    assert pending(folder, jobs) == []
    assert list(Manifest(folder).read()) == [job.file for job in jobs]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lora": {"a": 0.6}}, {"lora": {}}, {"sigmas": None}, {"dtype": "bfloat16"}, {"new": 1}]
)
def test_other_settings_make_everything_again(folder, jobs, change):
    assert pending(folder, jobs, SETTINGS | change) == [0, 1, 2]
    # Nothing of the old settings is left to be mixed with the new.
    assert list(folder.glob("*.mp4")) == [] and Manifest(folder).read() == {}


def test_another_prompt_is_made_and_the_old_one_stays(folder, jobs):
    jobs[1] = make_jobs([Prompt(""), Prompt("a horse")], [9, 9], 1)[1]
    assert pending(folder, jobs) == [1]
    assert len(Manifest(folder).read()) == 3


def test_deleted_and_truncated_files(folder, jobs):
    (folder / jobs[0].file).unlink()
    (folder / jobs[2].file).write_bytes(b"vid")
    assert pending(folder, jobs) == [0, 2]
    assert [path.name for path in folder.glob("*.mp4")] == [jobs[1].file]


def test_files_of_others_are_set_aside(folder, jobs, capsys):
    """Of the names of jobs, but not the manifest's: without an entry, or not as long as the entry says."""
    (folder / "manifest.jsonl").write_text((folder / "manifest.jsonl").read_text().splitlines()[-1])  # the first job's
    for job in jobs:
        (folder / job.file).write_bytes(b"mine, " + job.file.encode())
    (folder / f"{jobs[1].file}.set_aside").write_bytes(b"an earlier one")
    for name in ("holiday.mp4", "holiday.mp4.partial"):
        (folder / name).write_bytes(b"mine too")
    assert pending(folder, jobs) == [0, 1, 2]
    names = [f"{jobs[0].file}.set_aside", f"{jobs[1].file}.set_aside-2", f"{jobs[2].file}.set_aside"]
    for name, job in zip(names, jobs):
        assert (folder / name).read_bytes() == b"mine, " + job.file.encode()
    assert (folder / f"{jobs[1].file}.set_aside").read_bytes() == b"an earlier one"
    assert {path.name for path in folder.glob("holiday*")} == {"holiday.mp4", "holiday.mp4.partial"}
    assert f"{jobs[0].file}, {jobs[1].file}, {jobs[2].file}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../secret"},
        {"file": "/etc/passwd"},
        {"file": ".."},
        {"file": 3},
        {"file": None},
        {"bytes": "many"},
        {"prompt": ["a", "b"]},
        {"prompt_index": None},
        {"scores": [1]},
        {"scores": {"sharpness": "high"}},
    ],
)
def test_entries_that_are_none(folder, jobs, change):
    """As of other tools, or of somebody who wants a file elsewhere to be read or removed: nothing is touched."""
    (folder.parent / "secret").write_text("secret")
    manifest = folder / "manifest.jsonl"
    text = manifest.read_text() + json.dumps(json.loads(manifest.read_text().splitlines()[0]) | change) + "\n"
    manifest.write_text(text)
    with pytest.raises(UserError, match="manifest.jsonl, line 4, is no entry of a video in this folder") as error:
        pending(folder, jobs)
    assert "\n" not in str(error.value) and manifest.read_text() == text
    assert (folder.parent / "secret").exists() and len(list(folder.glob("*.mp4"))) == 3


@pytest.mark.parametrize("line", ["[1, 2]", "7", "null", '"file"'])
def test_lines_of_other_json(folder, jobs, line):
    (folder / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1, is no entry"):
        pending(folder, jobs)


@pytest.mark.parametrize("line", ["[" * 100_000, "\0\0\0", "\udcff"])
def test_lines_that_are_torn_or_broken(folder, jobs, line):
    with (folder / "manifest.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line)
    assert pending(folder, jobs) == []


def test_lines_of_another_tool(tmp_path):
    """With a mark, and with a separator in a text, which ends a line in Python and not in files."""
    (tmp_path / "a.mp4").touch()
    line = json.dumps({"file": "a.mp4", "prompt": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "manifest.jsonl").write_text(line + "\n", encoding="utf-8-sig")
    assert Manifest(tmp_path).read(["file", "prompt"])["a.mp4"]["prompt"] == "one\u2028two"


def test_torn_line_and_left_overs_of_a_killed_run(folder, jobs):
    path = folder / "manifest.jsonl"
    path.write_text(path.read_text()[:-20])  # the last line is that of the first job
    (folder / f"{jobs[0].file}.partial").write_bytes(b"v")
    assert pending(folder, jobs) == [0]
    assert list(folder.glob("*.partial")) == []
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_missing_scores_are_made(folder, jobs):
    assert pending(folder, jobs, rewards=["sharpness"]) == []
    assert pending(folder, jobs, rewards=["sharpness", "flicker"]) == [0, 1, 2]


def test_scores_with_other_options_are_made(folder, jobs):
    """One of a folder of before says nothing of its options, and had none as far as is known."""
    with_options = {"rewards": ["sharpness"], "reward_options": {"sharpness": {"frames": "stride:2"}}}
    entry = Manifest(folder).read()[jobs[1].file]
    Manifest(folder).append(entry | {"reward_options": with_options["reward_options"]})
    assert pending(folder, jobs) == []  # nobody asks for scores
    assert pending(folder, jobs, rewards=["sharpness"], reward_options={}) == [1]
    assert pending(folder, jobs, **with_options) == [0, 1, 2]


def test_a_part_of_a_score_that_is_no_number(folder, jobs):
    """Is null, which every reader of JSON takes, and no reason to make the video again."""
    entry = Manifest(folder).read()[jobs[0].file]
    entry["scores"]["sharpness/part"] = math.nan
    Manifest(folder).append(entry)
    assert pending(folder, jobs, rewards=["sharpness"]) == []
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert entries[0]["scores"] == {"sharpness": 0.5, "sharpness/part": None}


def test_lines_of_many_writers_stay_whole(tmp_path):
    def write(writer):
        for i in range(50):
            Manifest(tmp_path).append({"file": f"{writer}-{i}", "prompt": "x" * 10_000})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len({line["file"] for line in lines}) == len(lines) == 400


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
    assert VideoJob(Prompt(prompt), 3, 1, 9).file == f"00003-1-{slug}.mp4"


def test_jobs_have_names_and_random_numbers_of_their_own():
    jobs = make_jobs([Prompt("a cat"), Prompt("a cat"), Prompt("a dog")], [21, 9, 21], 4)
    assert [(job.prompt_index, job.video_number) for job in jobs] == [(i, k) for i in range(3) for k in range(4)]
    assert [job.num_frames for job in jobs] == [21] * 4 + [9] * 4 + [21] * 4
    noises = {torch.randn(1, generator=job.generator(seed)).item() for job in jobs for seed in (0, 1)}
    assert len({job.file for job in jobs}) == 12 and len(noises) == 24


def test_batches_hold_jobs_of_equal_length():
    jobs = [VideoJob(Prompt("a"), i, 0, frames) for i, frames in enumerate((21, 9, 21, 21, 9, 33, 21))]
    assert [[job.prompt_index for job in batch] for batch in batches(jobs, 3)] == [[1, 4], [0, 2, 3], [6], [5]]
    assert list(batches([], 3)) == []


def test_more_jobs_than_a_folder_can_hold():
    with pytest.raises(UserError, match="1 prompts x num_videos_per_prompt=1000000000 are more than 1000000 videos"):
        make_jobs([Prompt("a")], [9], 10**9)

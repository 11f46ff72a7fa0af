import pytest
import torch

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.generation.jobs import VideoJob, batches, make_jobs
from astrolabe_diffusers.rollout.prompts import Prompt


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

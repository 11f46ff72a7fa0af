"""Small runs of the trainer's parts on the random tiny pipeline."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file

from astrolabe_diffusers.files.output_folder import list_checkpoints
from astrolabe_diffusers.rewards import RewardSet
from astrolabe_diffusers.rollout.prompts import Prompt
from astrolabe_diffusers.rollout.samples import Sample
from astrolabe_diffusers.rollout.scoring import ScoringThread
from astrolabe_diffusers.training.nft import NFTConfig
from astrolabe_diffusers.training.nft.trainer import NFTBatch
from astrolabe_diffusers.training.policies import OLD, add_policies, policy_parameters
from tests.tiny_pipeline import tiny_pipeline


BRIGHTNESS = "tests.training.rewards:brightness"
SIZE = {"height": 32, "width": 32, "num_frames": 21}
# What `tiny_arguments` leaves out, for it costs as much as the training.
ALL_REPORTS = {
    "eval_steps": 1,
    "eval_seeds": 2,
    "num_eval_videos": 2,
    "checkpointing_steps": 1,
    "report_to": "tensorboard",
}


def policy_pipeline(rank: int = 4, randomize: bool = True, target_modules=(), **overrides):
    """The tiny pipeline of two blocks (6 latent frames) with both adapters, which differ unless `randomize` is off."""
    pipe = tiny_pipeline(**{**SIZE, **overrides})
    torch.manual_seed(0)
    add_policies(pipe.transformer, rank=rank, lora_alpha=2 * rank, target_modules=target_modules)
    if randomize:
        randomize_adapters(pipe.transformer)
    return pipe


def randomize_adapters(transformer):
    """B starts at zero, where all policies are equal and A has no gradient: move the adapters away from there."""
    generator = torch.Generator().manual_seed(1)
    for adapter, scale in (("default", 0.15), (OLD, 0.1)):
        for parameter in policy_parameters(transformer, adapter):
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def make_samples(number: int, group_size: int = 2) -> list[Sample]:
    prompts = ["a red circle moves left on a black background", "a green cross moves up on a white background"]
    return [
        Sample(Prompt(prompts[i // group_size % 2]), i // group_size, (7, 0, i // group_size, i % group_size))
        for i in range(number)
    ]


def noised_batch(pipe, batch_size: int = 2, frames: int = 6, seed: int = 0) -> NFTBatch:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, pipe.transformer.config.in_channels, frames, 4, 4)
    clean, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    sigma = torch.tensor([1.0, 0.9375, 0.625, 0.8333])[torch.arange(batch_size) % 4]
    view = sigma.view(-1, 1, 1, 1, 1)
    return NFTBatch(
        clean=clean,
        noisy=(1 - view) * clean + view * noise,
        sigma=sigma,
        timestep=1000 * sigma,
        prompt_embeds=torch.randn(batch_size, 16, 32, generator=generator),
        optimality=torch.rand(batch_size, generator=generator),
        weight=torch.ones(batch_size),
        kl_weight=torch.ones(batch_size),
        pipeline=pipe,
    )


def rows(batch: NFTBatch, part: slice) -> NFTBatch:
    """Some of the samples of a batch."""
    values = vars(batch)
    return NFTBatch(**{n: v[part] if isinstance(v, torch.Tensor) else v for n, v in values.items()})


def config(**values) -> NFTConfig:
    """With all blocks in a pass, as for batches of one video."""
    defaults = {"rewards": {BRIGHTNESS: 1.0}, "beta": 0.7, "kl_weight": 0.3, "blocks_per_pass": 7}
    return NFTConfig(**defaults | values)


def reward_worker(pipe, rewards=BRIGHTNESS, watched=None, **options) -> ScoringThread:
    watched = RewardSet({watched: 1.0}) if watched else None
    return ScoringThread(pipe.vae, RewardSet({rewards: 1.0}), watched, **options)


def tiny_settings(model_folder, output_dir, **values) -> dict:
    """Settings of a run of two steps that takes seconds: evaluated, on one block, and saved at its end, without
    videos."""
    defaults = {
        "model": model_folder,
        "output_dir": output_dir,
        "rewards": BRIGHTNESS,
        "eval_rewards": "tests.training.rewards:contrast",
        "height": 16,
        "width": 32,
        "num_frames": 21,
        "eval_num_frames": 9,
        "train_batch_size": 4,
        "batches_per_epoch": 1,
        "samples_per_prompt": 4,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "rank": 4,
        "lora_alpha": 8,
        "eval_steps": 2,
        "num_eval_prompts": 2,
        "eval_seeds": 1,
        "num_eval_videos": 0,
        "checkpointing_steps": 2,
        "report_to": "none",
        "mixed_precision": "no",
    }
    return defaults | values


def tiny_arguments(model_folder, output_dir, **values) -> list[str]:
    """The same as a command line."""
    settings = tiny_settings(model_folder, output_dir, **values)
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def numbers_of_run(folder: Path) -> dict:
    """All that a finished run has computed: weights, metrics without times, evaluations, the trainer's last state."""
    newest = list_checkpoints(folder)[-1]
    files = [folder / "pytorch_lora_weights.safetensors", *newest.glob("*.safetensors")]
    adapters = {
        str(file.relative_to(folder)): {name: weight.tolist() for name, weight in load_file(file).items()}
        for file in files
    }
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    state = json.loads((newest / "trainer_state.json").read_text())
    for record in (*metrics, state):
        for name in [name for name in record if "second" in name or name == "peak_memory_gb"]:
            del record[name]
    return {**adapters, "metrics": metrics, "evaluations": evaluations, "state": state}


def threads_left(before: set[threading.Thread]) -> set[str]:
    """Names of threads that are there since `before`, once those that are ending have had a moment for it."""
    for thread in set(threading.enumerate()) - before:
        if thread.name != "tqdm_monitor":
            thread.join(2)
    return {thread.name for thread in set(threading.enumerate()) - before}


@contextlib.contextmanager
def full_disk(free: int = 0):
    """Inside, no file can grow beyond `free` bytes, in this process and those that it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def creation_mask(mask: int):
    """Inside, new files lack the permissions `mask`."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)

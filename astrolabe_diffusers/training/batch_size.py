"""What `train_batch_size` `auto` stands for: the largest batch that fits the device."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..distributed.agreement import raise_together
from ..distributed.sharding import is_sharded
from ..errors import UserError
from ..files.text import read_text
from ..rollout.samples import Sample, SampleScene, VideoBatch, epoch_samples, held_out_texts
from .config import AUTO, OnlineConfig
from .down_sampling import trained_part
from .policies import many_passes, policy_parameters, use_policy


if TYPE_CHECKING:
    from .trainer import OnlineTrainer


def says_when_memory_is_full(device: torch.device) -> bool:
    """A CPU's memory goes on on the disk, and then the system ends the process."""
    return device.type != "cpu"


def check_auto(config: OnlineConfig, accelerator: Accelerator):
    """A [`UserError`] where `auto` is asked for and cannot be found."""
    if config.train_batch_size != AUTO:
        return
    if not says_when_memory_is_full(accelerator.device):
        raise UserError(
            "train_batch_size=auto needs a GPU: a CPU does not say when its memory is full; give a number."
        )
    if is_sharded():
        raise UserError(
            "train_batch_size=auto is not for a sharded model (FSDP): a process without memory would leave the others "
            "waiting; give a number."
        )


def set_batch_size(trainer: "OnlineTrainer", checkpoint: Path | None) -> str:
    """Puts a number in the place of `auto`, the same in every process, which all call it. That of the `checkpoint` the
    run goes on from, if it has one; else the largest that fits every process. Returns a line that says so."""
    config = trainer.config
    sizes = config.batch_sizes()
    number = _written(checkpoint) if checkpoint else None
    if number in sizes:
        origin = f"as {checkpoint.name} has it"
    else:
        with raise_together(), _as_it_was(trainer):
            number = _largest(trainer, sizes)
        number = min(gather_object([number]))
        origin = f"the largest of {', '.join(map(str, reversed(sizes)))} that fits"
    config.set_batch_size(number)
    trainer.held_out.batch_size = number
    return (
        f"train_batch_size auto: {number}, {origin}; {config.batches_per_epoch} batches an epoch, "
        f"{config.gradient_accumulation_steps} a step on each device"
    )


def _written(checkpoint: Path) -> int | None:
    return yaml.safe_load(read_text(checkpoint / "config.yaml"))["train_batch_size"]


@contextmanager
def _as_it_was(trainer: "OnlineTrainer") -> Iterator[None]:
    """Inside, the trainer is used as in training; afterwards random numbers, gradients and what checkpoints hold are
    as before. The transformer is not DDP's, whose passes wait for other processes, and not compiled yet."""
    device, model, training = trainer.accelerator.device, trainer.model, trainer.transformer.training
    state = copy.deepcopy({name: item.state_dict() for name, item in trainer.stateful.items()})
    # What AdamW takes with its first step.
    reserved = [torch.empty_like(p) for p in policy_parameters(trainer.transformer) for _ in range(2)]
    trainer.model = trainer.transformer
    devices = [] if device.type == "cpu" else [device]  # a CPU's random numbers are kept anyway
    with torch.random.fork_rng(devices, device_type=device.type):
        yield
    del reserved
    trainer.model = model
    trainer.transformer.train(training)
    trainer.optimizer.zero_grad()
    for name, item in trainer.stateful.items():
        item.load_state_dict(state[name])
    if device.type == "cuda":  # the run's peak is its own
        torch.cuda.reset_peak_memory_stats(device)


def _largest(trainer: "OnlineTrainer", sizes: list[int]) -> int:
    """The first of these sizes, which fall, that fits this process."""
    smaller = iter([*sizes[1:], 0])

    @find_executable_batch_size(starting_batch_size=sizes[0], reduce_batch_size_fn=lambda: next(smaller))
    def fits(size: int) -> int:
        # What failed before may still be scored, and be held by its error.
        trainer.rewards.wait()
        clear_device_cache(garbage_collection=True)
        with _out_of_memory_as_it_is():
            _try(trainer, size, epoch)
        return size

    try:
        with _out_of_memory_as_it_is():
            one = _sample(trainer, 1)[0]
        # All videos of an epoch are there at once; as long as it is auto, batches are videos.
        videos = _samples(trainer, trainer.config.batches_per_epoch)
        epoch = one.map(videos, lambda x: x.repeat(len(videos), *[1] * (x.ndim - 1)))
        return fits()
    except RuntimeError as error:
        if not should_reduce_batch_size(error) and "No executable batch size" not in str(error):
            raise
        raise UserError(
            "train_batch_size=auto: not even a batch of one video fits; gradient_checkpointing, fewer blocks_per_pass "
            "or smaller videos take less memory."
        ) from error


@contextmanager
def _out_of_memory_as_it_is() -> Iterator[None]:
    """Of rewards it is told in a line."""
    try:
        yield
    except UserError as error:
        raise error.__cause__ if should_reduce_batch_size(error.__cause__) else error


def _try(trainer: "OnlineTrainer", size: int, epoch: VideoBatch):
    """The largest passes of a run with batches of `size` videos: two batches of a step, which fail soonest, two of a
    rollout, of which one is scored while the other is sampled, and one of an evaluation. All videos of the epoch, with
    the scores of one, are given."""
    config = trainer.config
    config.set_batch_size(size)
    batch = epoch.map(epoch.samples[:size], lambda x: x[:size])
    batch, values = trained_part(batch, *_values(trainer, epoch), config)
    trainer.transformer.train()
    with many_passes(trainer.transformer):
        # From the second on there are gradients.
        for _ in range(min(2, config.gradient_accumulation_steps)):
            count = config.gradient_accumulation_steps * len(batch.samples)
            trainer.accumulate_gradients(batch, values, count, synchronize=False)
    del batch, values
    _sample(trainer, size)
    held_out = trainer.held_out.samples[:size]
    with use_policy(trainer.transformer, config.judged_policy), many_passes(trainer.transformer):
        for batch in trainer.rollouts.generate([held_out], trainer.held_out.size, watched=True):
            batch.scores.result()


def _samples(trainer: "OnlineTrainer", size: int) -> list[Sample]:
    switch, prompt, scenes = trainer.windows.largest.switch, trainer.eval_prompts[0], ()
    if switch is not None:
        text = held_out_texts([prompt], trainer.config.switch_prompts)[0]
        scenes = SampleScene(text), SampleScene(text, switch)
    return [Sample(prompt, 0, ("trial", 0, k), scenes) for k in range(size)]


def _sample(trainer: "OnlineTrainer", size: int) -> list[VideoBatch]:
    """Two scored batches of the longest videos that are trained."""
    past = trainer.windows.largest
    with trainer.sampling(), many_passes(trainer.transformer):
        batches = list(trainer.generate([_samples(trainer, size)] * min(2, trainer.config.batches_per_epoch), past))
        for batch in batches:
            batch.scores.result()
    return batches


def _values(trainer: "OnlineTrainer", batch: VideoBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Advantages, and what the update needs, of the first batch of an epoch, were its scores those of one video, but
    for a little."""
    config = trainer.config
    samples = epoch_samples(trainer.prompts, trainer.num_groups, config.samples_per_prompt, 0, config.seed)
    spread = torch.arange(len(samples)) / len(samples)
    scores = {name: score.nan_to_num() + spread for name, score in batch.scores.result().values.items()}
    advantages = trainer.advantages(scores, samples)
    values = trainer.sample_values(scores, advantages)
    return trainer.split(advantages.values)[0], {name: trainer.split(column)[0] for name, column in values.items()}

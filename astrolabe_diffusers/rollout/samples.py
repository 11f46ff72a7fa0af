"""Which prompts, samples and batches make up an epoch."""

import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch

from ..distributed.agreement import is_first_process
from ..errors import UserError, as_user_error
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from ..pipelines.scene_prompt import escape_scenes, has_scene_marks, parse_scenes, plan_scenes
from .config import SwitchConfig
from .past import Past, Switch
from .prompts import Prompt
from .seeds import seeded_generator


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleScene:
    """A part of a video with one text, from a switch on, the first one's being at its beginning."""

    text: str
    switch: Switch = Switch()


@dataclass(frozen=True)
class Sample:
    """One video to make. `key` seeds all its random numbers; samples of one `group` share the prompt.

    Without `scenes` all of the video has the prompt's text.
    """

    prompt: Prompt
    group: int
    key: tuple[int | str, ...]
    scenes: tuple[SampleScene, ...] = ()

    @property
    def texts(self) -> list[str]:
        """Of its scenes, in their order."""
        return [scene.text for scene in self.scenes] or [self.prompt.text]

    @property
    def cuts(self) -> tuple[int, ...]:
        """The latent frames before which all is forgotten."""
        return tuple(scene.switch.frame for scene in self.scenes if scene.switch.transition == "cut")


def epoch_samples(
    prompts: Sequence[Prompt],
    num_groups: int,
    group_size: int,
    epoch: int,
    seed: int,
    switch: Switch | None = None,
    switch_prompts: str = "pairs",
) -> list[Sample]:
    """All samples of an epoch, group after group; the same list whatever the number of processes.

    The prompts are passed through again and again, each time in a new order, `num_groups` an epoch. With a `switch`
    each goes on from another one of them ("pairs"), or is two of its scenes that follow each other ("scenes").
    """
    samples = []
    for group in range(num_groups):
        cycle, position = divmod(epoch * num_groups + group, len(prompts))
        if group == 0 or position == 0:
            order = _order(prompts, cycle, seed)
        prompt, scenes = prompts[order[position]], ()
        if switch is not None:
            prompt, texts = switch_texts(prompt, prompts, switch_prompts, seed, epoch, group)
            first = seeded_generator("scene", seed, epoch, group)
            first = int(torch.randint(len(texts) - 1, (), generator=first))
            scenes = SampleScene(texts[first]), SampleScene(texts[first + 1], switch)
        samples += [Sample(prompt, group, (seed, epoch, group, k), scenes) for k in range(group_size)]
    return samples


def epoch_prompts(prompts: Sequence[Prompt], num_groups: int, num_epochs: int, seed: int) -> list[Prompt]:
    """The prompts of the first `num_epochs` of [`epoch_samples`], each once."""
    return [prompts[i] for i in _order(prompts, 0, seed)[: num_groups * num_epochs]]


def switch_texts(
    prompt: Prompt, prompts: Sequence[Prompt], switch_prompts: str, *key: int | str
) -> tuple[Prompt, list[str]]:
    """A prompt with scenes and the texts of these: its own, or its text after another one of `prompts`, of which it is
    not the only one, drawn by the `key`."""
    if switch_prompts == "scenes":
        return prompt, [scene.text for scene in parse_scenes(prompt.text)]
    generator, old = seeded_generator("pair", *key), prompt.text
    while old == prompt.text:
        old = prompts[torch.randint(len(prompts), (), generator=generator)].text
    return replace(prompt, text=f"{escape_scenes(old)} | {escape_scenes(prompt.text)}"), [old, prompt.text]


def held_out_texts(prompts: Sequence[Prompt], switch_prompts: str) -> list[str]:
    """Those of the scenes of held-out prompts, whatever the transitions."""
    pairs = switch_prompts == "pairs"
    return [text for prompt in prompts for text in ([prompt.text] if pairs else switch_texts(prompt, (), "scenes")[1])]


def check_switch_prompts(prompts: Sequence[Prompt], switch_prompts: str, kind: str):
    """A [`UserError`] if one of these has no two scenes, or there is no second one; `kind` says whose they are."""
    if switch_prompts == "pairs":
        if len({prompt.text for prompt in prompts}) == 1:
            raise UserError(f"transitions go from a prompt to another one, and there is only one {kind} prompt.")
        return
    for index, prompt in enumerate(prompts):
        with as_user_error(f"{kind} prompt {index}"):
            if len(parse_scenes(prompt.text)) == 1:
                raise ValueError(f"{prompt.text[:80]!r} has one scene: write `a | b`, or set switch_prompts=pairs.")


def warn_of_scenes(prompts: Sequence[Prompt], config: SwitchConfig):
    """Says so, in one line, if the pipeline would make scenes of one of these, and these settings make none."""
    if config.transitions and config.switch_prompts == "scenes":
        return
    found = next((prompt.text for prompt in prompts if has_scene_marks(prompt.text)), None)
    if found is not None and is_first_process():
        logger.warning(
            "prompts such as %.80r are one text here, with their marks of scenes in it: scenes are made with "
            "--transitions and --switch_prompts scenes.",
            found,
        )


def _order(prompts: Sequence[Prompt], cycle: int, seed: int) -> list[int]:
    return torch.randperm(len(prompts), generator=seeded_generator("prompts", seed, cycle)).tolist()


def eval_samples(prompts: Sequence[Prompt], num_seeds: int) -> list[Sample]:
    """The held-out videos: every prompt with the first seed, then with the second ...; the same in every run."""
    return [Sample(prompt, i, ("held-out", i, s)) for s in range(num_seeds) for i, prompt in enumerate(prompts)]


def eval_switches(
    samples: Sequence[Sample], config: SwitchConfig, pipeline: CausalWanPipeline, num_frames: int
) -> list[Sample]:
    """Those of [`eval_samples`], with the settings' first transition, then with the second ...

    A pair changes its prompt with the middle block, scenes when the prompt says. A [`UserError`] if a video ends
    before its second scene.
    """
    block_frames = pipeline.transformer.config.num_frames_per_block
    num_blocks, seconds_per_block = pipeline.num_blocks(num_frames), pipeline.seconds_per_block
    prompts, switched = list({sample.group: sample.prompt for sample in samples}.values()), []
    for transition in config.transitions:
        blocks = config.transition_blocks if transition == "roll" else 1
        for sample in samples:
            prompt, texts = switch_texts(sample.prompt, prompts, config.switch_prompts, "held-out", sample.group)
            starts = [0, num_blocks // 2]
            if config.switch_prompts == "scenes":
                starts = list(plan_scenes(parse_scenes(prompt.text), seconds_per_block)[0])
            starts = [start for start in starts if start < num_blocks]
            if len(starts) == 1 or num_blocks == 1:
                raise UserError(
                    f"held-out videos of {num_blocks} blocks end before the second scene of {prompt.text[:80]!r}."
                )
            scenes = [SampleScene(texts[0])]
            for text, start in zip(texts[1:], starts[1:]):
                switch = Switch(start * block_frames, transition, blocks, config.recache_sink)
                scenes.append(SampleScene(text, switch))
            key = (sample.key[0], transition, *sample.key[1:])
            switched.append(replace(sample, prompt=prompt, key=key, scenes=tuple(scenes)))
    return switched


def process_batches(items: Sequence, batch_size: int, process_index: int, num_processes: int) -> list[Sequence]:
    """This process's part of every global batch, a global batch being `num_processes * batch_size` items in order.

    Any run of whole global batches thus holds the same samples whatever the number of processes.
    """
    stride = num_processes * batch_size
    starts = range(process_index * batch_size, len(items), stride)
    return [items[start : start + batch_size] for start in starts]


class Trajectory:
    """How the blocks of a batch of videos came about from their noise `(B, C, f, h, w)`, for algorithms that train the
    steps of the sampler."""

    def __init__(self, noise: torch.Tensor, block_frames: int):
        # Of each block the `(B, C, n, h, w)` before its first step, after it, ... and the clean ones at last.
        self.latents = [[block] for block in noise.split(block_frames, dim=2)]
        # Of each block those of its steps, 0 to 1000, numbers on the latents' device.
        self.timesteps: list[list[torch.Tensor]] = []

    def on_step_end(self, pipeline, step: int, timestep: torch.Tensor, arguments: dict[str, torch.Tensor]) -> dict:
        """The pipeline's `callback_on_step_end`."""
        if step == 0:
            self.timesteps.append([])
        self.timesteps[-1].append(timestep)
        self.latents[len(self.timesteps) - 1].append(arguments["latents"])
        return {}


@dataclass
class VideoBatch:
    """Sampled videos: `latents` `(B, C, f, h, w)` float32, `prompt_embeds` `(B, L, D)`, a future of [`Scores`].

    Of the latents those after `past` are scored and trained. `trajectory` is there if it was to be kept. Where the
    past has a switch, `old_prompt_embeds`, as many, are those before it. `pipeline` has made the videos.
    """

    samples: Sequence[Sample]
    prompt_embeds: torch.Tensor
    latents: torch.Tensor
    scores: Future = field(repr=False)
    past: Past = Past()
    trajectory: Trajectory | None = field(default=None, repr=False)
    old_prompt_embeds: torch.Tensor | None = None
    pipeline: object | None = field(default=None, repr=False)

    def map(self, samples: Sequence[Sample], function: Callable[[torch.Tensor], torch.Tensor]) -> "VideoBatch":
        """The batch of these samples, with what `function` makes of each tensor, whose rows are the videos."""
        trajectory = copy.copy(self.trajectory)
        if trajectory is not None:
            trajectory.latents = [[function(latents) for latents in block] for block in trajectory.latents]
        names = ("prompt_embeds", "old_prompt_embeds", "latents")
        tensors = {name: function(getattr(self, name)) for name in names if getattr(self, name) is not None}
        return replace(self, samples=samples, trajectory=trajectory, **tensors)

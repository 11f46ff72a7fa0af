"""The active policy on held-out prompts, always with the same seeds."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..distributed.agreement import raise_together
from ..distributed.sharding import between_passes, is_sharded, together
from ..errors import as_user_error
from ..pipelines.scene_prompt import check_transition
from ..reporting.comparison import Evaluation
from ..reporting.videos import save_video
from ..rewards.frames import to_uint8
from ..rollout.config import SwitchConfig
from ..rollout.prompts import Prompt
from ..rollout.samples import Sample, check_switch_prompts, eval_samples, eval_switches, process_batches
from ..rollout.sampling import Rollout, Sampler
from ..rollout.scoring import decode_samples, gather_scores


def make_samples(
    prompts: Sequence[Prompt], seeds: int, config: SwitchConfig, pipeline: object, size: dict[str, int]
) -> list[Sample]:
    """Those of held-out prompts, `seeds` videos of this size for each and for each of the settings' transitions."""
    samples = eval_samples(prompts, seeds)
    if not config.transitions:
        return samples
    check_switch_prompts(prompts, config.switch_prompts, "held-out")
    with as_user_error("transitions"):
        for transition in config.transitions:
            check_transition(transition, pipeline.transitions)
    return eval_switches(samples, config, pipeline, size["num_frames"])


@dataclass
class HeldOut:
    """Held-out videos and how they are made; their batches are split over the processes."""

    rollout: Rollout
    samples: Sequence[Sample]
    size: dict[str, int]  # height, width and num_frames
    batch_size: int  # on each process
    num_videos: int = 0  # the first of them, that are kept to be looked at
    by_block: bool = False  # whether the blocks after a switch of the prompt are scored one by one too

    @property
    def shown(self) -> Sequence[Sample]:
        """Those whose videos are kept."""
        return self.samples[: self.num_videos]

    def batches(self) -> list[Sequence[Sample]]:
        """This process's part."""
        state = PartialState()
        split = partial(process_batches, batch_size=self.batch_size, num_processes=state.num_processes)
        if not is_sharded():
            return split(self.samples, process_index=state.process_index)
        # Every process takes part in every forward pass, and a switch of the prompt has passes of its own: what is
        # made at the same time has the same ones. A process with a batch less makes a video once more.
        groups, batches = {}, []
        for sample in self.samples:
            groups.setdefault(tuple(scene.switch for scene in sample.scenes), []).append(sample)
        for group in groups.values():
            mine = split(group, process_index=state.process_index)
            batches += mine + [group[:1]] * (len(split(group, process_index=0)) - len(mine))
        return batches

    def evaluate(
        self,
        step: int | None = None,
        video_dir: Path | None = None,
        on_batch: Callable[[int, int], object] = lambda done, total: None,
    ) -> tuple[Evaluation, dict[int, torch.Tensor]]:
        """Generate and score them with the active policy; every process calls it. Kept videos are written to
        `video_dir`; `on_batch` is called after each batch, with the number of them so far and in all.

        Returns:
            The evaluation, and by index those kept videos `(F, 3, H, W)` in [0, 1] that were made in this process.
        """
        batches = self.batches()
        keep = {sample.key: i for i, sample in enumerate(self.shown)}
        generated = []
        with together():
            for batch in self.rollout.generate(batches, self.size, watched=True, keep=keep, by_block=self.by_block):
                generated.append(batch)
                with between_passes():
                    on_batch(len(generated), len(batches))
        scores, _ = gather_scores(generated, self.samples)
        kept = {keep[key]: video for batch in generated for key, video in batch.scores.result().videos.items()}
        # Of a video that several have made the first one writes the file.
        before = gather_object([[*kept]])[: PartialState().process_index]
        with raise_together():
            for index in kept.keys() - itertools.chain(*before):
                save_video(kept[index], video_dir / f"{index:03d}.mp4", self.rollout.pipeline.config.frame_rate)
        return Evaluation(step, {name: column.tolist() for name, column in scores.items()}), kept

    def generate_columns(self, policies: dict[str, AbstractContextManager]) -> dict[str, list[torch.Tensor]]:
        """The kept videos `(F, 3, H, W)` in [0, 1] under several policies, each the context in which the pipeline has
        it, by their headings."""
        columns, sampler = {}, Sampler(self.rollout.pipeline, self.size)
        for name, policy in policies.items():
            with policy:
                columns[name] = []
                for batch in process_batches(self.shown, self.batch_size, process_index=0, num_processes=1):
                    latents, _ = sampler(self.rollout.encode(batch), batch)
                    columns[name] += decode_samples(self.rollout.pipeline.vae, latents, batch).cpu()
        return columns


def gather_videos(videos: dict[int, torch.Tensor], is_main_process: bool) -> list[torch.Tensor]:
    """The videos of all processes in the order of their indices, with eight bits, for the main process; none else."""
    gathered = gather_object([{index: to_uint8(video) for index, video in videos.items()}])
    if not is_main_process:
        return []
    everything = {index: video for part in gathered for index, video in part.items()}
    return [everything[index] / 255 for index in sorted(everything)]

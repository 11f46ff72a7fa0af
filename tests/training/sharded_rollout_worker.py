"""One process of two that hold a model in shards, so that each waits for the other in every pass; started by torchrun.

It evaluates held-out videos that switch their prompts and makes some with shared pasts. Then one process alone has a
signal, a reward that fails, and at last an error in its passes, which it has to end with.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError, exit_code
from astrolabe_diffusers.evaluation import held_out
from astrolabe_diffusers.rollout.samples import Sample, epoch_samples
from astrolabe_diffusers.rollout.scoring import gather_scores
from astrolabe_diffusers.training import NFTTrainer


fails = False


def brightness(videos, prompts, metadata):
    if fails:
        raise ZeroDivisionError("a reward of one process")
    return videos.mean(dim=(1, 2, 3, 4))


def make_trainer(argv: list[str]) -> NFTTrainer:
    trainer = NFTTrainer(config=parse_args(argv), reward_funcs=[brightness])
    trainer.start()
    return trainer


def train_samples(trainer: NFTTrainer) -> list[Sample]:
    """Two groups of three: after two batches of one video a process has a past that the other has not."""
    return epoch_samples(trainer.prompts, 2, 3, 0, 0, trainer.windows.past(0).switch, "scenes")


def rollout_scores(trainer: NFTTrainer) -> list[float]:
    samples = train_samples(trainer)
    return gather_scores(trainer.rollout(samples), samples)[0]["reward"].tolist()


def outcome(function) -> list[str]:
    """Type and message of what comes out of it."""
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


def main(folder: Path, argv: list[str]):
    global fails
    trainer = make_trainer(argv)
    is_second, written = trainer.accelerator.process_index == 1, []
    save_video = held_out.save_video

    def note_and_save(video: torch.Tensor, path: Path, frame_rate: int):
        written.append(path.name)
        save_video(video, path, frame_rate)

    held_out.save_video = note_and_save
    evaluation, videos = trainer.held_out.evaluate(video_dir=folder / "videos")
    report = {"scores": evaluation.scores, "kept": sorted(videos), "written": written}

    report["rollout"] = rollout_scores(trainer)
    with trainer.interruption:
        if is_second:
            os.kill(os.getpid(), signal.SIGTERM)
        report["signal"] = outcome(lambda: trainer.rollout(train_samples(trainer)))

    fails = is_second
    report["reward"] = outcome(trainer.held_out.evaluate)
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(report))

    fails = False
    if is_second:

        def fail(texts):
            raise UserError("a text of one process")

        trainer.rollouts.encoder = fail
    trainer.accelerator.wait_for_everyone()
    # As if it were the first error: those before have been told to all.
    torch.distributed.distributed_c10d._get_default_store().delete_key("astrolabe/called_off")
    trainer.accelerator.wait_for_everyone()
    sys.exit(exit_code(trainer.held_out.evaluate))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""A run: jobs are spread over the processes, and each process streams its batches to files."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from tqdm.auto import tqdm

from ..distributed.accelerator import accelerate_settings
from ..distributed.agreement import Resources, raise_together
from ..errors import UserError, as_user_error
from ..files.output_folder import RunFolder
from ..files.video import VideoWriter
from ..files.writing import writing
from ..pipelines.block_generation import NOISE_LAYOUT
from ..pipelines.loading import (
    frame_rate,
    load_pipeline,
    prepare_pipeline,
    sampled_components,
    video_size,
    weights_digest,
)
from ..pipelines.pipeline_causal_wan import CausalWanPipeline
from ..pipelines.scene_prompt import escape_scenes
from ..rewards.frames import to_uint8
from ..rollout.prompts import Prompt, PromptSource
from ..rollout.scoring import ScoringThread
from ..shareable import shareable_value
from .config import GenerationConfig
from .manifest import Manifest, VideoJob, batches, describe, make_jobs


def generate_videos(config: GenerationConfig):
    """
    Makes the videos of a run that its output folder does not have yet. Every process of `accelerate launch` calls it.

    The folder then holds `<prompt index>-<video number>-<slug>.mp4` files, each of them whole, and their
    [`Manifest`]. A video depends on its prompt, its two numbers and the settings, but not on the number of processes
    or the batch it is made in.

    Raises:
        UserError: a mistake in the settings, or a video that could not be written or scored. The other processes have
            then made their videos, and the same call makes the rest.
    """
    accelerator = make_accelerator()
    with Resources() as resources:
        manifest = Manifest(Path(config.output_dir))
        with raise_together():
            if accelerator.is_main_process:
                resources.enter_context(RunFolder(config.output_dir, "generation"))
        prompts = PromptSource.of(config).read(config.split) if config.prompts else [Prompt(config.prompt)]
        rewards = None
        if config.rewards:
            fps = config.fps or frame_rate(config.model, config.revision)
            rewards = resources.enter_context(config.make_rewards(config.rewards, fps, accelerator.process_index))
        pipe, dtype = load_pipeline(config, accelerator.device)
        settings = video_settings(config, pipe, dtype)
        lengths = []
        for index, prompt in enumerate(prompts):
            # What the pipeline would refuse is refused before the first video is made.
            text, size = pipeline_prompt(prompt, settings), (config.height, config.width, config.num_frames)
            lengths.append(video_size(pipe, *size, text, f"prompt {index}")["num_frames"])
        jobs = make_jobs(prompts, lengths, config.num_videos_per_prompt)
        prepare_pipeline(pipe, accelerator.device, config.offload, config.vae_tiling, config.attention_backend)

        reward_options = shareable_value(config.reward_options)
        worker = pending = None
        if rewards:
            worker = resources.enter_context(ScoringThread(pipe.vae, rewards, timeout=config.reward_timeout))
        with raise_together(), as_user_error(f"output_dir {config.output_dir}"):
            if accelerator.is_main_process:
                pending = manifest.start(jobs, settings, config.rewards, reward_options)
        if accelerator.is_main_process:
            print(
                f"{config.model}: {settings['height']}x{settings['width']} pixels, {settings['fps']} frames/s, "
                f"{dtype}; processes: {accelerator.num_processes} on {accelerator.device.type}; "
                f"videos to make: {len(pending)} of {len(jobs)}"
            )
        (pending,) = broadcast_object_list([pending])
        if config.compile and pending:
            seconds = pipe.compile(num_videos_per_prompt=config.batch_size, **stream_settings(settings))
            if accelerator.is_main_process:
                print(f"compiled in {seconds:.0f} s")
        started = time.perf_counter()
        error = None
        try:
            run_jobs(pipe, pending, settings, manifest, worker, reward_options, config.batch_size, accelerator)
        except UserError as failure:
            error = str(failure)
        errors = [error for error in gather_object([error]) if error]
        if accelerator.is_main_process:
            report(manifest, jobs, pending, config.rewards, time.perf_counter() - started)
        accelerator.end_training()
        if errors:
            raise UserError(errors[0])


def make_accelerator() -> Accelerator:
    # A process that has finished waits for the slowest one.
    with accelerate_settings():
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
        started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise UserError(
            f"{started} processes were started, but accelerate sees {accelerator.num_processes}: on a CPU set "
            "ACCELERATE_USE_CPU=true."
        )
    return accelerator


def video_settings(config: GenerationConfig, pipe: CausalWanPipeline, dtype: str) -> dict[str, Any]:
    """All that determines a video beside its job, as JSON values."""
    same = ("seed", "revision", "variant", "lora_scale", "max_sequence_length")
    same += ("vae_tiling", "attention_backend", "plain_prompts")
    # Not `None` without one: the videos in a folder of before have no such entry, and are still what they were.
    lossy = {name: shareable_value(getattr(config, name)) for name in ("quantization", "vae", "tiny_decoder")}
    lossy = {name: value for name, value in lossy.items() if value}
    return {name: getattr(config, name) for name in same} | lossy | {
        "noise_layout": NOISE_LAYOUT,
        "height": config.height or pipe.config.height,
        "width": config.width or pipe.config.width,
        "fps": config.fps or pipe.config.frame_rate,
        "model": shareable_value(config.model),
        "lora": shareable_value(config.lora),
        # A folder's name says nothing of what is in it.
        "weights": weights_digest(pipe.denoiser, *sampled_components(pipe)),
        "sigmas": config.sigmas or None,
        "dtype": dtype,
    }


def pipeline_prompt(prompt: Prompt, settings: dict[str, Any]) -> str:
    return escape_scenes(prompt.text) if settings["plain_prompts"] else prompt.text


def stream_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `stream` that all videos share."""
    same = {name: settings[name] for name in ("height", "width", "sigmas", "max_sequence_length")}
    return same | {"attention_kwargs": {"scale": settings["lora_scale"]}}


def run_jobs(
    pipe: CausalWanPipeline,
    pending: list[VideoJob],
    settings: dict[str, Any],
    manifest: Manifest,
    worker: ScoringThread | None,
    reward_options: dict[str, dict[str, Any]],
    batch_size: int,
    accelerator: Accelerator,
):
    """This process's part of the jobs."""
    with (
        accelerator.split_between_processes(pending) as jobs,
        tqdm(
            total=sum(job.num_frames for job in jobs),
            desc=f"process 1 of {accelerator.num_processes}",
            unit="frame",
            # None: no bar in a log file, where it would be noise.
            disable=None if accelerator.is_main_process else True,
        ) as progress,
        interrupt_between_blocks() as check_interrupt,
    ):
        for batch in batches(jobs, batch_size):
            kept = []

            def on_block(frames: torch.Tensor):
                check_interrupt()
                progress.update(frames.shape[0] * frames.shape[1])
                if worker:
                    kept.append(frames)

            started = time.perf_counter()
            stream_to_files(pipe, batch, settings, manifest.folder, on_block)
            seconds = (time.perf_counter() - started) / len(batch)
            # Of a sample it asks the prompt, which a job has too.
            scores = worker.score(torch.cat(kept, dim=1), batch) if worker else {}
            for i, job in enumerate(batch):
                entry = {
                    **describe(job),
                    **settings,
                    "file": job.file,
                    "bytes": (manifest.folder / job.file).stat().st_size,
                    "seconds": seconds,
                    "frames_per_second": job.num_frames / seconds,
                }
                if worker:
                    entry["scores"] = {name: values[i].item() for name, values in scores.items() if name != "reward"}
                    entry["reward_options"] = reward_options
                manifest.append(entry)


@contextmanager
def interrupt_between_blocks() -> Iterator[Callable[[], None]]:
    """Ctrl-C inside raises `KeyboardInterrupt` only where what this yields is called. Main thread only.

    Raised anywhere, it may hit the start of an encoder, whose file would stay, or of its process, where it gets lost.
    """
    interrupts = []

    def check():
        if interrupts:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, lambda *signal_and_frame: interrupts.append(signal_and_frame))
    try:
        yield check
    except UserError:
        check()  # Ctrl-C reaches ffmpeg too, which then fails
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def stream_to_files(
    pipe: CausalWanPipeline,
    batch: list[VideoJob],
    settings: dict[str, Any],
    folder: Path,
    on_block: Callable[[torch.Tensor], None],
):
    """Writes the videos of a batch block by block. `on_block` gets the frames `(B, F, 3, H, W)` in [0, 1], float32."""
    stream = pipe.stream(
        [pipeline_prompt(job.prompt, settings) for job in batch],
        num_frames=batch[0].num_frames,
        generator=[job.generator(settings["seed"]) for job in batch],
        output_type="pt",
        **stream_settings(settings),
    )
    form = settings["height"], settings["width"], settings["fps"]
    with as_user_error(batch[0].file, (FloatingPointError,)), writing(f"to {folder}"), ExitStack() as stack:
        writers = []
        for frames in stream:
            # Not before there are frames: an encoder that gets none complains.
            writers = writers or [stack.enter_context(VideoWriter(folder / job.file, *form)) for job in batch]
            frames = frames.float()
            pixels = to_uint8(frames).permute(0, 1, 3, 4, 2).cpu().numpy()
            for writer, video in zip(writers, pixels):
                writer.write(video)
            on_block(frames)


def report(
    manifest: Manifest, jobs: list[VideoJob], pending: list[VideoJob], rewards: dict[str, float], seconds: float
):
    """Puts the manifest in order and prints what the run has made."""
    entries = manifest.read()
    manifest.replace(entries.values())
    made = [job for job in pending if job.file in entries]
    frames = sum(job.num_frames for job in made)
    print(
        f"videos made: {len(made)}, skipped: {len(jobs) - len(pending)}; {seconds:.1f} s, "
        f"{frames / seconds:.1f} frames/s; {manifest.path}"
    )
    others = len(entries) - sum(job.file in entries for job in jobs)
    if others:
        print(f"other videos in this folder, of other prompts: {others}")
    scores = [entries[job.file]["scores"] for job in jobs if job.file in entries] if rewards else []
    if scores:
        means = {name: sum(score[name] for score in scores) / len(scores) for name in rewards}
        total = sum(weight * means[name] for name, weight in rewards.items())
        print(", ".join(f"{name} {mean:.4f}" for name, mean in (means | {"reward": total}).items()))

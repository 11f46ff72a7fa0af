"""LoRAs beside their base model: scores, differences, and videos to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..distributed.accelerator import accelerate_settings, check_precision
from ..distributed.agreement import Resources, raise_together
from ..errors import as_user_error
from ..files.output_folder import RunFolder
from ..files.writing import replacing
from ..generation.loading import load_loras
from ..pipelines.loading import frame_rate, load_frozen_pipeline, video_size
from ..reporting.charts import draw_means
from ..reporting.comparison import Evaluation, comparison_rows
from ..reporting.machine import versions
from ..reporting.tables import change_text, markdown_table
from ..reporting.videos import write_columns
from ..rewards import RewardSet
from ..rollout.prompts import PromptSource, prompt_path, spread
from ..rollout.samples import eval_samples, process_batches
from ..rollout.sampling import Rollout
from ..rollout.scoring import ScoringThread
from ..shareable import shareable, shareable_value
from .config import BASE, LoraEvaluationConfig
from .held_out import evaluate, generate_columns


@contextmanager
def use_lora(pipeline: DiffusionPipeline, lora: str | None, weight: float = 1.0) -> Iterator[None]:
    """The pipeline with this LoRA alone, or with none; afterwards it is as it was before.

    Raises:
        UserError: there is no such LoRA, or it is another model's.
    """
    if lora is None:
        yield
        return
    load_loras(pipeline, {lora: weight})
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def evaluate_loras(config: LoraEvaluationConfig) -> dict[str, Any]:
    """
    Generate the same videos, from the seeds of the trainer's held-out videos, with the base model and with each LoRA,
    score them, and write into `config.output_dir`:

    - `results.json`: what is returned.
    - `table.md`, `scores.png`: means, and differences from the base with their 95 % intervals.
    - `side_by_side.mp4`, `side_by_side.png`, `videos/COLUMN/`: the first `num_videos` videos.

    Every process calls it; the numbers do not depend on how many there are.

    Returns:
        In every process, `settings`, `versions`, `videos` (prompt and seed of each), and by name for each of the
        `columns` its `lora` and `weight`, its `scores` (by reward or part, one a video), their `mean`, and their
        `change` from the base: the mean of the paired differences, and `half_width_95`, half its interval.

    Raises:
        UserError: a mistake in the settings, or a reward that cannot score a video.
    """
    with accelerate_settings():
        accelerator = Accelerator(mixed_precision=config.mixed_precision)
    check_precision(accelerator)
    with Resources() as resources:
        results = _evaluate_loras(config, accelerator, resources)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def _evaluate_loras(config: LoraEvaluationConfig, accelerator: Accelerator, resources: Resources) -> dict[str, Any]:
    """`resources` are let go of afterwards, whatever happens."""
    output_dir = Path(config.output_dir)
    with raise_together():
        if accelerator.is_main_process:
            folder = open_evaluation_folder(config.output_dir, list(config.columns), config.overwrite)
            resources.callback(folder.close)
    source = PromptSource(prompt_path(config.model, config.prompts), config.prompts_data_dir, config.prompt_column)
    prompts = spread(source.read(config.eval_split), config.num_prompts)
    samples = eval_samples(prompts, config.seeds)
    with as_user_error("rewards"):
        rewards = RewardSet(
            dict.fromkeys(config.rewards, 1.0),
            config.reward_options,
            config.reward_placement,
            config.reward_timeout,
            frame_rate(config.model),
            accelerator.process_index,
        )
    resources.callback(rewards.close)
    pipeline = load_frozen_pipeline(config.model, accelerator)
    # The trainer's precision: in bf16 it generates under autocast.
    accelerator.prepare_model(pipeline.transformer, evaluation_mode=True)
    size = video_size(pipeline, config.height, config.width, config.num_frames)
    for lora in config.columns.values():
        with use_lora(pipeline, *lora):  # one that does not fit is found now, not after the base's videos
            pass
    if accelerator.is_main_process:
        folder.begin()
        processes = accelerator.num_processes
        print(
            f"{config.model}: {len(samples)} videos ({len(prompts)} prompts x {config.seeds} seeds) of "
            f"{size['num_frames']} frames of {size['height']}x{size['width']}, for {', '.join(config.columns)}\n"
            f"{processes} process{'es' if processes > 1 else ''} on {accelerator.device.type}, mixed precision "
            f"{accelerator.mixed_precision}; output in {output_dir}",
            flush=True,
        )
    rollout = Rollout(pipeline, ScoringThread(pipeline.vae, rewards, timeout=config.reward_timeout))
    resources.callback(rollout.scoring.close)
    batches = process_batches(samples, config.batch_size, accelerator.process_index, accelerator.num_processes)
    progress = tqdm(
        total=len(config.columns) * len(batches),
        desc="batches",
        # None: no bar in a log file.
        disable=None if accelerator.is_main_process else True,
    )
    evaluations = {}
    for name, lora in config.columns.items():
        with use_lora(pipeline, *lora):
            evaluation, _ = evaluate(
                rollout,
                samples,
                size,
                config.batch_size,
                step=None,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
                video_dir=output_dir / "videos" / name,
                num_videos=config.num_videos,
                on_batch=lambda done, total: progress.update(),
            )
        # Every reward with its parts. The weighted sum, which training maximises, is left out: all weights are one.
        scores = {
            score: values
            for reward in config.rewards
            for score, values in evaluation.scores.items()
            if score.split("/")[0] == reward
        }
        evaluations[name] = Evaluation(None, scores)
        if accelerator.is_main_process:
            tqdm.write(f"{name}: " + ", ".join(f"{r} {evaluations[name].mean(r):.4f}" for r in config.rewards))
    progress.close()

    results = {
        "settings": {**shareable(config), **size, "mixed_precision": accelerator.mixed_precision},
        "versions": versions(),
        "videos": [{"prompt": sample.prompt.text, "seed": sample.key[-1]} for sample in samples],
        "columns": {
            name: {"lora": shareable_value(lora), "weight": weight, **column(evaluations[BASE], evaluations[name])}
            for name, (lora, weight) in config.columns.items()
        },
    }
    if accelerator.is_main_process:
        files = write_results(results, output_dir)
        if shown := samples[: config.num_videos]:
            loras = {name: use_lora(pipeline, *lora) for name, lora in config.columns.items()}
            videos = generate_columns(rollout, loras, shown, size, config.batch_size)
            prompts = [sample.prompt.text for sample in shown]
            files += write_columns(videos, prompts, output_dir / "side_by_side", pipeline.config.frame_rate)
        print(f"\n{column_table(results['columns'])}\n", *files, sep="\n")
    return results


def column(base: Evaluation, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """`scores`, `mean` and `change` of a column, as [`evaluate_loras`] returns them."""
    return {
        "scores": evaluation.scores,
        "mean": {score: evaluation.mean(score) for score in evaluation.scores},
        "change": {
            score: {"change": change, "half_width_95": half}
            for score, _, _, change, half in comparison_rows(base, evaluation)
        },
    }


def write_results(results: dict[str, Any], output_dir: Path) -> list[Path]:
    """Writes what [`evaluate_loras`] returns as numbers, table and chart; returns the paths."""
    files = [output_dir / name for name in ("results.json", "table.md", "scores.png")]
    with replacing(files[0]) as partial:
        partial.write_text(json.dumps(results, indent=2))
    with replacing(files[1]) as partial:
        partial.write_text(column_table(results["columns"]) + "\n")
    with replacing(files[2]) as partial:
        draw_columns(results["columns"], partial)
    return files


def column_table(columns: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the `columns` that [`evaluate_loras`] returns: a row a score, and behind every LoRA its change
    from the base."""
    (base_name, base), *loras = columns.items()
    rows = [["", base_name, *(heading for name, _ in loras for heading in (name, "change (95 % interval)"))]]
    for score, mean in base["mean"].items():
        cells = [score, f"{mean:.4f}"]
        for _, column in loras:
            change = column["change"][score]
            cells += [f"{column['mean'][score]:.4f}", change_text(change["change"], change["half_width_95"])]
        rows.append(cells)
    return markdown_table(rows)


def draw_columns(columns: dict[str, dict[str, Any]], path: Path):
    """Chart of the `columns` that [`evaluate_loras`] returns.

    The intervals are the table's, of the paired differences: one that meets the base's line shows no clear change.
    """
    means = {
        score: [(column["mean"][score], column["change"][score]["half_width_95"]) for column in columns.values()]
        for score in columns[BASE]["mean"]
    }
    draw_means(means, list(columns), path, title="means, with the 95 % interval of the change from base")


def open_evaluation_folder(path: str, columns: list[str], overwrite: bool) -> RunFolder:
    """Locks the folder of an evaluation with these columns. One that an evaluation has written is written over.

    Raises:
        UserError: a run is writing to it, or it has files of others that would be written over without `overwrite`.
    """
    files = ("results.json", "table.md", "scores.png", "side_by_side.mp4", "side_by_side.png", "side_by_side.gif")
    folder = RunFolder(path, "evaluation", (*files, *(f"videos/{name}/*.mp4" for name in columns)))
    try:
        if not (overwrite or folder.has_begun() or _is_older_evaluation(folder.path / "results.json")):
            folder.refuse_files_of_others("--overwrite true")
    except BaseException:
        folder.close()
        raise
    return folder


def _is_older_evaluation(results: Path) -> bool:
    try:
        return {"settings", "versions", "videos", "columns"} <= json.loads(results.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False

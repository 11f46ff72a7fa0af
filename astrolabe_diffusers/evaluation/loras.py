"""LoRAs beside their base model: scores, differences, and videos to look at."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..distributed.accelerator import accelerate_settings, check_precision
from ..distributed.agreement import Resources, raise_together
from ..files.output_folder import RunFolder, is_result
from ..files.text import to_json
from ..files.writing import replacing
from ..pipelines.loading import frame_rate, load_frozen_pipeline, load_loras, video_size
from ..reporting.charts import draw_means
from ..reporting.comparison import Evaluation, change_text, paired_difference
from ..reporting.machine import versions
from ..reporting.markdown import markdown_table
from ..reporting.videos import write_columns
from ..rollout.prompts import PromptSource, spread
from ..rollout.recipe import apply_recipe
from ..rollout.samples import Sample, warn_of_scenes
from ..rollout.sampling import Rollout
from ..rollout.scoring import ScoringThread
from ..shareable import shareable, shareable_value
from .config import BASE, LoraEvaluationConfig
from .held_out import HeldOut, make_samples
from .switches import PREFIX, after_switch, draw_switches, switch_table


@contextmanager
def use_lora(pipeline: DiffusionPipeline, lora: str | None, weight: float = 1.0) -> Iterator[None]:
    """The pipeline with this LoRA alone, or with none; afterwards it is as it was before."""
    if lora is not None:
        load_loras(pipeline, {lora: weight})
    try:
        yield
    finally:
        if lora is not None:
            pipeline.unload_lora_weights()


def evaluate_loras(config: LoraEvaluationConfig) -> dict[str, Any]:
    """
    Generate the same videos, from the seeds of the trainer's held-out videos, with the base model and with each LoRA,
    score them, and write into `config.output_dir`:

    - `results.json`: what is returned, with null for a NaN.
    - `table.md`, `scores.png`: means, and differences from the base with their 95 % intervals.
    - `after_switch.png` with `transitions`: the scores of each block after the switch, which are in the table too.
    - `side_by_side.mp4`, `side_by_side.png`, `videos/COLUMN/`: the first `num_videos` videos.

    Every process calls it; the numbers do not depend on how many there are.

    Returns:
        In every process, `settings`, `versions`, `videos` (prompt and seed of each), and by name for each of the
        `columns` its `lora` and `weight`, its `scores` (by reward or part, one a video), their `mean`, and their
        `change` from the base: the mean of the paired differences, and `half_width_95`, half its interval, NaN of a
        single video; with `transitions` also [`after_switch`].
    """
    with accelerate_settings():
        # The videos that are shown are made by one process, and the others wait.
        group = InitProcessGroupKwargs(timeout=timedelta(days=7))
        accelerator = Accelerator(mixed_precision=config.mixed_precision, kwargs_handlers=[group])
    check_precision(accelerator)
    is_main = accelerator.is_main_process
    with Resources() as resources:
        with raise_together():
            if is_main:
                opened = open_evaluation_folder(config.output_dir, list(config.columns), config.overwrite)
                folder = resources.enter_context(opened)
        held_out = load_held_out(config, accelerator, resources)
        if is_main:
            folder.begin()
            number, size, processes = len(held_out.samples), held_out.size, accelerator.num_processes
            prompts = len({sample.group for sample in held_out.samples})
            ways = f" x {len(config.transitions)} transitions" if config.transitions else ""
            print(
                f"{config.model}: {number} videos ({prompts} prompts x {config.seeds} seeds{ways}) of "
                f"{size['num_frames']} frames of {size['height']}x{size['width']}, for {', '.join(config.columns)}\n"
                f"{processes} process{'es' if processes > 1 else ''} on {accelerator.device.type}, mixed precision "
                f"{accelerator.mixed_precision}; output in {config.output_dir}",
                flush=True,
            )
        evaluations = evaluate_columns(config, held_out, is_main)
        results = {
            "settings": {**shareable(config), **held_out.size, "mixed_precision": accelerator.mixed_precision},
            "versions": versions(),
            "videos": [video(sample) for sample in held_out.samples],
            "columns": {
                name: {"lora": shareable_value(lora), "weight": weight, **column(evaluations[BASE], evaluations[name])}
                for name, (lora, weight) in config.columns.items()
            },
        }
        if config.transitions:
            for name, values in results["columns"].items():
                values["after_switch"] = after_switch(held_out.samples, evaluations[BASE], evaluations[name])
        if is_main:
            files = write_results(results, Path(config.output_dir))
            if held_out.shown:
                pipeline, path = held_out.rollout.pipeline, Path(config.output_dir) / "side_by_side"
                loras = {name: use_lora(pipeline, *lora) for name, lora in config.columns.items()}
                prompts = [sample.prompt.text for sample in held_out.shown]
                files += write_columns(held_out.generate_columns(loras), prompts, path, pipeline.config.frame_rate)
            print(f"\n{tables(results['columns'])}\n", *files, sep="\n")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def load_held_out(config: LoraEvaluationConfig, accelerator: Accelerator, resources: Resources) -> HeldOut:
    """The held-out videos of an evaluation, whose LoRAs all fit; `resources` lets go of what they need."""
    prompts = spread(PromptSource.of(config).read(config.eval_split), config.num_prompts)
    warn_of_scenes(prompts, config)
    weights = dict.fromkeys(config.rewards, 1.0)
    rewards = resources.enter_context(
        config.make_rewards(weights, frame_rate(config.model, config.revision), accelerator.process_index)
    )
    pipeline = load_frozen_pipeline(
        config.model, accelerator, config.revision, config.variant, config.vae_dtype
    )
    apply_recipe(pipeline, config)
    # The trainer's precision: in bf16 it generates under autocast.
    accelerator.prepare_model(pipeline.denoiser, evaluation_mode=True)
    size = video_size(pipeline, config.height, config.width, config.num_frames)
    for lora in config.columns.values():
        with use_lora(pipeline, *lora):  # one that does not fit is found now, not after the base's videos
            pass
    scoring = resources.enter_context(ScoringThread(pipeline.vae, rewards, timeout=config.reward_timeout))
    return HeldOut(
        Rollout(pipeline, scoring),
        make_samples(prompts, config.seeds, config, pipeline, size),
        size,
        config.batch_size,
        config.num_videos,
        by_block=bool(config.transitions),
    )


def evaluate_columns(config: LoraEvaluationConfig, held_out: HeldOut, is_main: bool) -> dict[str, Evaluation]:
    """The evaluation of each column, by its name; the main process says its means."""
    evaluations = {}
    # None: no bar in a log file.
    disable = None if is_main else True
    with tqdm(total=len(config.columns) * len(held_out.batches()), desc="batches", disable=disable) as progress:
        for name, lora in config.columns.items():
            with use_lora(held_out.rollout.pipeline, *lora):
                video_dir = Path(config.output_dir) / "videos" / name
                evaluation, _ = held_out.evaluate(video_dir=video_dir, on_batch=lambda *_: progress.update())
            # Every reward with its parts, without the weighted sum that training maximises: all weights are one.
            scores = {
                score: values
                for reward in config.rewards
                for score, values in evaluation.scores.items()
                if score.split("/")[0] in (reward, PREFIX)
            }
            evaluations[name] = Evaluation(None, scores)
            if is_main:
                means = (f"{reward} {evaluations[name].mean(reward):.4f}" for reward in config.rewards)
                tqdm.write(f"{name}: {', '.join(means)}")
    return evaluations


@contextmanager
def open_evaluation_folder(path: str, columns: list[str], overwrite: bool) -> Iterator[RunFolder]:
    """As a context, the locked folder of an evaluation with these columns. Files of others that it would write over
    are refused without `overwrite`."""
    files = ("results.json", "table.md", "scores.png", "after_switch.png")
    files += ("side_by_side.mp4", "side_by_side.png", "side_by_side.gif")
    files = (*files, *(f"videos/{name}/*.mp4" for name in columns))
    with RunFolder(path, "evaluation", files) as folder:
        ours = is_result(folder.path / "results.json", "settings", "versions", "videos", "columns")
        if not (overwrite or folder.has_begun() or ours):
            folder.refuse_files_of_others("--overwrite true")
        yield folder


def column(base: Evaluation, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """`scores`, `mean` and `change` of a column, as [`evaluate_loras`] returns them."""
    scores = {score: values for score, values in evaluation.scores.items() if not score.startswith(f"{PREFIX}/")}
    return {
        "scores": scores,
        "mean": {score: evaluation.mean(score) for score in scores},
        "change": {score: paired_difference(base.scores[score], scores[score]) for score in scores},
    }


def video(sample: Sample) -> dict[str, Any]:
    """What `results.json` says of a video."""
    scenes = {"transition": sample.scenes[1].switch.transition, "scenes": sample.texts} if sample.scenes else {}
    return {"prompt": sample.prompt.text, "seed": sample.key[-1], **scenes}


def tables(columns: dict[str, dict[str, Any]]) -> str:
    """[`column_table`], and after switches of the prompt [`switch_table`]."""
    switches = [switch_table(columns)] if "after_switch" in columns[BASE] else []
    return "\n\n".join([column_table(columns), *switches])


def write_results(results: dict[str, Any], output_dir: Path) -> list[Path]:
    """Writes what [`evaluate_loras`] returns as numbers, table and chart; returns the paths."""
    files, columns = [output_dir / name for name in ("results.json", "table.md", "scores.png")], results["columns"]
    with replacing(files[0]) as partial:
        partial.write_text(to_json(results, indent=2))
    with replacing(files[1]) as partial:
        partial.write_text(tables(columns) + "\n")
    # The intervals are the table's, of the paired differences: one that meets the base's line shows no clear change.
    means = {
        score: [(column["mean"][score], column["change"][score]["half_width_95"]) for column in columns.values()]
        for score in columns[BASE]["mean"]
    }
    with replacing(files[2]) as partial:
        draw_means(means, list(columns), partial, title="means, with the 95 % interval of the change from base")
    if "after_switch" in columns[BASE]:
        files.append(output_dir / "after_switch.png")
        draw_switches(columns, files[-1])
    return files


def column_table(columns: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the `columns` that [`evaluate_loras`] returns: a row a score, and behind every LoRA its change
    from the base."""
    (base_name, base), *loras = columns.items()
    rows = [["", base_name, *(heading for name, _ in loras for heading in (name, "change (95 % interval)"))]]
    for score, mean in base["mean"].items():
        cells = [score, f"{mean:.4f}"]
        for _, column in loras:
            cells += [f"{column['mean'][score]:.4f}", change_text(column["change"][score])]
        rows.append(cells)
    return markdown_table(rows)

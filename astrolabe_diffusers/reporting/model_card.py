"""The model card of a run: what was trained on what, what came of it, and how to load it."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import TINY_SHAPES
from ..config import Config
from ..files.writing import replacing
from ..shareable import shareable, shareable_name
from .comparison import change_text
from .markdown import code, code_block, escape, escape_line, markdown_table, plain_line, python_text
from .report import duration


TEMPLATE = Path(__file__).with_suffix(".md")
TAGS = ["text-to-video", "diffusers", "lora", "reinforcement-learning", "astrolabe"]
PAPERS = {"https://arxiv.org/abs/2603.17051": "Astrolabe"}  # names of papers; the others' are their addresses
# What says nothing about the adapter, or is no one else's business.
LEFT_OUT = ("output_dir", "overwrite_output_dir", "logging_dir", "resume_from_checkpoint", "report_to", "push_to_hub")


def write_card(config: Config, results: dict[str, Any], prompts: Sequence[str], repo_id: str | None = None) -> Path:
    """Writes the card of a finished run as `README.md` into its folder; no path of this machine is in it.

    Args:
        config: the settings of any algorithm, whose class says its name, `algorithm`, and the address of its `paper`.
        results: what a run writes to results.json.
        prompts: those of the videos in `eval_videos/step-N/`, in their order.
        repo_id: where the adapter will be; by default it is loaded from a folder of the run's name.
    """
    name = repo_id or config.hub_model_id or Path(config.output_dir).resolve().name
    title = name.split("/")[-1]
    card = ModelCard.from_template(
        card_data(config, results, prompts, title),
        TEMPLATE,
        config=config,
        results=results,
        prompts=prompts,
        name=name,
        title=title,
        model=shareable_name(config.model),
        embedded=config.model == TINY_SHAPES,
        paper=PAPERS.get(config.paper) or (config.paper or "").removeprefix("https://"),
        init_lora=config.init_lora and shareable_name(config.init_lora),
        findings=findings(results["scores"], config.rewards),
        table=score_table(results["scores"], config.rewards),
        settings=yaml.safe_dump(shareable_settings(config), sort_keys=False, allow_unicode=True),
        # With these the template escapes what users have written, which is put into it as it is.
        **{function.__name__: function for function in (code, code_block, duration, escape, escape_line, python_text)},
    )
    path = Path(config.output_dir) / "README.md"
    with replacing(path) as partial:
        card.save(partial)
    return path


def card_data(config: Config, results: dict[str, Any], prompts: Sequence[str], name: str) -> ModelCardData:
    """What the Hub, which refuses a folder as the base model, reads of a card."""
    return ModelCardData(
        base_model=config.hub_base_model or (None if Path(config.model).exists() else config.model),
        library_name="diffusers",
        license=config.hub_license,
        pipeline_tag="text-to-video",
        tags=TAGS,
        widget=[
            {"text": plain_line(prompt), "output": {"url": f"{video_folder(results)}/{i:03d}.mp4"}}
            for i, prompt in enumerate(prompts)
        ],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-to-video",
                dataset_type="held-out-prompts",
                dataset_name=f"{results['num_videos']} held-out videos",
                metric_type=reward,
                metric_name=f"{reward} ({score['before']:.4f} before training)",
                metric_value=round(score["after"], 6),
            )
            for reward, score in results["scores"].items()
            if math.isfinite(score["after"])
        ],
    )


def score_table(scores: dict[str, dict[str, float]], rewards: dict[str, float]) -> str:
    rows = [["", "weight", "before", "after", "change (95 % interval)"]]
    for name, score in scores.items():
        weight = f"{rewards[name]:g}" if name in rewards else ""
        rows.append([name, weight, f"{score['before']:.4f}", f"{score['after']:.4f}", change_text(score)])
    return markdown_table(rows)


def video_folder(results: dict[str, Any]) -> str:
    return f"eval_videos/step-{results['steps']}"


def findings(scores: dict[str, dict[str, float]], rewards: dict[str, float]) -> list[str]:
    """What the changes of the scores, as results.json has them, amount to, in sentences: also where nothing rose, or
    something fell. `rewards` are the weights of those that were trained on."""

    def direction(name: str) -> int | None:
        """1 if the score went up, beyond its interval and as far as the table shows, -1 if down, else 0. `None` if it
        has no interval: less than two videos were scored."""
        change, half = round(scores[name]["change"], 4), scores[name]["half_width_95"]
        return None if math.isnan(half) else (change > half) - (change < -half)

    def changes(names: list[str]) -> str:
        return ", ".join(f"{escape(name)} {change_text(scores[name])}" for name in names)

    total = {
        1: "The reward it was trained on rose on prompts that were held out: {}.",
        0: "**The reward it was trained on did not clearly change on prompts that were held out**: {}.",
        -1: "**The reward it was trained on fell on prompts that were held out**: {}.",
        None: "**Too few held-out videos were scored to say whether the reward it was trained on changed**: {}.",
    }
    lines = [total[direction("reward")].format(changes(["reward"]))]
    against = [name for name, weight in rewards.items() if weight and (direction(name) or 0) * weight < 0]
    if against and len(rewards) > 1:
        lines.append(f"**Moved against their weight**: {changes(against)}.")
    watched = [name for name in scores if name != "reward" and not rewards.get(name)]
    fell = [name for name in watched if direction(name) == -1]
    if fell:
        lines.append(f"**Fell while only watched**: {changes(fell)}.")
    elif any(direction(name) is None for name in watched):
        lines.append("Too few videos were scored to say whether a score that was only watched fell.")
    elif watched:
        lines.append("Of the scores that were only watched, none clearly fell.")
    else:
        lines.append("No other score was watched: what the change was bought with, this run cannot tell.")
    return lines


def shareable_settings(config: Config) -> dict[str, Any]:
    """The settings that are not the defaults, with the names of local files and folders in place of their paths."""
    defaults = asdict(type(config)())
    return {
        name: value
        for name, value in shareable(config).items()
        if getattr(config, name) != defaults[name] and name not in LEFT_OUT
    }

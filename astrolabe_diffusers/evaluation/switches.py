"""How videos follow a prompt that changed: their scores block by block after the switch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.writing import replacing
from ..reporting.charts import draw_intervals
from ..reporting.comparison import Evaluation, change_text, mean_interval, mean_text, paired_difference
from ..reporting.markdown import markdown_table
from ..rollout.samples import Sample


# As `ScoringThread.submit` names them.
PREFIX = "after_switch"
PROMPTS = ("new", "old")


def after_switch(samples: Sequence[Sample], base: Evaluation, evaluation: Evaluation) -> dict[str, Any]:
    """
    By transition, reward and prompt, `"new"` or `"old"`, one entry for each block after the switch.

    Each has its number, `block`, from 1; the `scores`, one a video of this transition, NaN where it has no such block;
    their `mean` with `half_width_95`; and the `change` from the base, a [`paired_difference`].
    """
    result: dict[str, Any] = {}
    for transition in dict.fromkeys(sample.scenes[1].switch.transition for sample in samples):
        rows = [row for row, sample in enumerate(samples) if sample.scenes[1].switch.transition == transition]
        rewards = result.setdefault(transition, {})
        for score in evaluation.scores:
            if not score.startswith(f"{PREFIX}/"):
                continue
            _, which, number, name = score.split("/", 3)
            before, after = ([column.scores[score][row] for row in rows] for column in (base, evaluation))
            entry = {"block": int(number), "scores": after, **mean_interval(after)}
            entry["change"] = paired_difference(before, after)
            rewards.setdefault(name, {}).setdefault(which, []).append(entry)
        for prompts in rewards.values():
            for entries in prompts.values():
                entries.sort(key=lambda entry: entry["block"])
    return result


def switch_table(columns: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the columns' [`after_switch`]: a row for each transition, reward, prompt and block."""
    (base_name, base), *loras = columns.items()
    heading = ["transition", "score", "prompt", "block", f"{base_name} (95 % interval)"]
    rows = [heading + [text for name, _ in loras for text in (name, "change (95 % interval)")]]
    for transition, rewards in base["after_switch"].items():
        for reward, prompts in rewards.items():
            for which, entries in prompts.items():
                for i, entry in enumerate(entries):
                    cells = [transition, reward, which, str(entry["block"]), mean_text(entry)]
                    for _, column in loras:
                        other = column["after_switch"][transition][reward][which][i]
                        cells += [f"{other['mean']:.4f}", change_text(other["change"])]
                    rows.append(cells)
    return markdown_table(rows)


def draw_switches(columns: dict[str, dict[str, Any]], path: Path):
    """A chart for each transition and reward: means with their intervals over the blocks after the switch."""
    charts: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for name, column in columns.items():
        for transition, rewards in column["after_switch"].items():
            for reward, prompts in rewards.items():
                chart = charts.setdefault(f"{transition}: {reward}", {})
                for which, entries in prompts.items():
                    points = [(entry["block"], entry["mean"], entry["half_width_95"]) for entry in entries]
                    chart[f"{name}, {which} prompt"] = points
    with replacing(path) as partial:
        draw_intervals(charts, partial, "scores after the switch, with 95 % intervals", "block after the switch")

"""What an evaluation writes: numbers, table and chart, a column a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files.writing import replacing
from ..reporting.charts import draw_means
from ..reporting.comparison import Evaluation, change_text, comparison_rows
from ..reporting.markdown import markdown_table
from .config import BASE


def is_result(path: Path, *names: str) -> bool:
    """Whether there is a JSON file with values of these names, as an earlier call of ours has written it."""
    try:
        return set(names) <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


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

"""The tables of docs/published_models.md, from the recipes."""

import re

from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS

from .pages import section


PAGE = "docs/published_models.md"


def rows(heading):
    """Name -> the cells after it."""
    lines = [line for line in section(PAGE, heading).splitlines() if line.startswith("| `") and "`--" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): rest for name, *rest in cells}


def settings_of(model):
    transformer, pipeline = model.transformer, model.pipeline
    steps = len(pipeline.get("sigmas", [1.0, 0.75, 0.5, 0.25]))
    first = len(pipeline["first_block_sigmas"]) if "first_block_sigmas" in pipeline else steps
    window = pipeline.get("num_context_frames", transformer.get("local_attn_size", "all"))
    positions = transformer.get("rope_mode", "absolute")
    if "rope_window" in transformer:
        positions += f", {transformer['rope_window']}"
    frames = str(transformer.get("num_frames_per_block", 3))
    base = model.size if model.experts == 1 else f"{model.experts} x {model.size}"
    return [base, frames, f"{first}, {steps}", f"{window} / {transformer.get('sink_size', 0)}", positions]


def test_what_each_is():
    expected = {name: settings_of(model) for name, model in PUBLISHED_MODELS.items()}
    assert rows("## The models") == expected


def test_where_each_is():
    found = rows("## Where they are, and their licences")
    assert found.keys() == PUBLISHED_MODELS.keys()
    for name, (source, entries, licence, *_) in found.items():
        model = PUBLISHED_MODELS[name]
        repo = re.match(r"\[(\S+)\]\(https://huggingface.co/(\S+)\): ", source)
        assert repo[1] == repo[2] == model.source.split(", ")[0]
        assert re.findall("`([^`]+)`", source) == model.source.split(", ")[1].split(" and ")
        assert tuple(re.findall("`([^`]+)`", entries)) == model.weights
        assert licence

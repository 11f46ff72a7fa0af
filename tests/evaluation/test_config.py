"""Which LoRA is which column."""

import pytest

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.evaluation.config import LoraEvaluationConfig


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({}, {}),
        ({"lora": "runs/a"}, {"a": ("runs/a", 1.0)}),
        ({"lora": "runs/a=0.5,b"}, {"a": ("runs/a", 0.5), "b": ("b", 1.0)}),
        ({"lora": "half=runs/a"}, {"half": ("runs/a", 1.0)}),  # as before --column
        ({"lora": "half=runs/a=0.5"}, {"half": ("runs/a", 0.5)}),
        ({"column": "half=runs/a=0.5,full=runs/a"}, {"half": ("runs/a", 0.5), "full": ("runs/a", 1.0)}),
        ({"lora": "runs/a", "column": "less=runs/a=-1"}, {"a": ("runs/a", 1.0), "less": ("runs/a", -1.0)}),
    ],
)
def test_columns(settings, columns):
    assert LoraEvaluationConfig(**settings).columns == {"base": (None, 1.0)} | columns


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora": "a/run,b/run"}, "'run' is there already; .* --column NAME=b/run"),
        ({"lora": "a,a=0.5"}, "'a' is there already"),
        ({"column": "base=a"}, "'base' is there already"),
        ({"column": "half"}, "NAME=PATH or NAME=PATH=WEIGHT, not 'half'"),
        ({"column": "a/b=c"}, "'a/b' cannot name a column"),
        ({"column": "=c"}, "'' cannot name a column"),
    ],
)
def test_mistakes(settings, words):
    with pytest.raises(UserError, match=words):
        LoraEvaluationConfig(**settings)

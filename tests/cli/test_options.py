"""Flags of fields, and that one flag means the same in every command."""

from dataclasses import dataclass, fields
from typing import get_type_hints

import pytest

from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.cli.options import parse_fields
from astrolabe_diffusers.cli.serve import ServerConfig
from astrolabe_diffusers.config import Config, name_and_weight, option
from astrolabe_diffusers.conversion.config import ConversionConfig
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.evaluation.config import LoraEvaluationConfig, ScoreConfig
from astrolabe_diffusers.generation.config import GenerationConfig
from astrolabe_diffusers.training.awm import AWMConfig
from astrolabe_diffusers.training.cm_grpo import CMGRPOConfig
from astrolabe_diffusers.training.nft import NFTConfig


@dataclass
class Example(Config):
    aliases = {"old_parts": "parts"}

    parts: list[float] = option([], "numbers")
    weights: dict[str, float] = option({}, "weights", many=True)
    one: dict[str, float] = option({}, "weights")


def parse(*arguments):
    return Example(**parse_fields(ArgumentParser(), Example, list(arguments)))


def test_lists():
    for arguments in ("--parts 1 0.5", "--parts 1,0.5", "--parts 1 --parts 0.5", "--old_parts 1 --parts 0.5"):
        assert parse(*arguments.split()).parts == [1.0, 0.5], arguments


def test_weights():
    assert parse("--weights", "a=0.5", "b", "--weights", "c=-1,lr=0.1=2").weights == {
        "a": 0.5,
        "b": 1.0,
        "c": -1.0,
        "lr=0.1": 2.0,
    }
    with pytest.raises(UserError, match="weights: a is given twice"):
        parse("--weights", "a=1", "--weights", "a=2")
    with pytest.raises(UserError, match="each weight a finite number, not 'a=x'"):
        parse("--weights", "a=x")
    with pytest.raises(UserError, match="--one is given twice"):
        parse("--one", "a", "--one", "b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a", 1.0)),
        ("a=0.5", ("a", 0.5)),
        ("a=b", ("a=b", 1.0)),
        ("a=b=-2", ("a=b", -2.0)),
        ("a=nan", ("a=nan", 1)),
    ],
)
def test_name_and_weight(text, expected):
    assert name_and_weight(text) == expected


ALGORITHMS = (NFTConfig, AWMConfig, CMGRPOConfig)
COMMANDS = (*ALGORITHMS, GenerationConfig, LoraEvaluationConfig, ScoreConfig, ServerConfig, ConversionConfig)
# Where nothing is summed up, rewards have no weights; a LoRA may be a column, or a published file with any alpha.
DIFFERENT = {"rewards", "lora", "lora_alpha"}


def test_a_flag_has_one_meaning():
    kinds = {}
    for config_class in COMMANDS:
        hints = get_type_hints(config_class)
        for f in fields(config_class):
            hint = hints[f.name]
            name = hint.__name__ if isinstance(hint, type) else str(hint)
            kinds.setdefault(f.name, set()).add(name.removesuffix(" | None"))
    assert {name for name, found in kinds.items() if len(found) > 1} <= DIFFERENT
    # An older name of one command is no present name of another one's other field.
    for config_class in COMMANDS:
        names = {f.name for f in fields(config_class)}
        assert config_class.aliases.keys().isdisjoint(names) and set(config_class.aliases.values()) <= names


@pytest.mark.parametrize(
    ("config_class", "old", "new"),
    [
        (GenerationConfig, "reward", "rewards"),
        (GenerationConfig, "data_dir", "prompts_data_dir"),
        (GenerationConfig, "column", "prompt_column"),
        (ScoreConfig, "reward", "rewards"),
        (ServerConfig, "reward", "rewards"),
        (ConversionConfig, "model", "recipe"),
        (NFTConfig, "pretrained_model_name_or_path", "model"),
    ],
)
def test_older_flags(config_class, old, new):
    values = [parse_fields(ArgumentParser(), config_class, [f"--{name}", "x"]) for name in (old, new)]
    assert values == [{new: "x"}] * 2

"""Whose settings `--algorithm` chooses."""

import json

import pytest
import yaml

from astrolabe_diffusers.cli.main import main
from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.training.awm import AWMConfig
from astrolabe_diffusers.training.config import OnlineConfig
from astrolabe_diffusers.training.nft import NFTConfig
from tests.training.helpers import tiny_arguments


OWN = "tests.training.step_policy_gradient:StepPolicyGradient"


@pytest.mark.parametrize(
    ("algorithm", "config_class"), [(None, NFTConfig), ("nft", NFTConfig), ("awm", AWMConfig), (OWN, OnlineConfig)]
)
def test_flags_are_the_fields_of_the_algorithms_settings(algorithm, config_class, tmp_path, capsys):
    flags = [] if algorithm is None else ["--algorithm", algorithm]
    assert type(parse_args([*flags, "--rank", "4"])) is config_class
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"algorithm": algorithm or "nft", "rank": 3}))
    config = parse_args(["--config", str(tmp_path / "run.yaml")])
    assert type(config) is config_class and config.rank == 3
    with pytest.raises(SystemExit):
        parse_args([*flags, "--help"])
    assert ("--old_policy_decay_max" in capsys.readouterr().out) == (config_class is NFTConfig)


def test_the_command_line_goes_before_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("algorithm: awm\nkl_weight: 0.5\n")
    config = parse_args(["--config", str(tmp_path / "run.yaml"), "--algorithm", "nft", "--beta", "0.5"])
    assert type(config) is NFTConfig and config.kl_weight == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--algorithm", "amw"], "unknown algorithm 'amw' .did you mean awm"),
        (["--algorithm", "awm", "--beta", "1"], "unknown argument --beta"),
        (["--algorithm", "awm", "--algorithm", "nft"], "--algorithm is given twice"),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(UserError, match=words):
        parse_args(arguments)


def test_settings_of_another_algorithm_are_left_out_and_named(tmp_path, capsys):
    config = parse_args(["--algorithm", "awm", "--config", "tiny_shapes"])
    assert type(config) is AWMConfig and config.rank == parse_args(["--config", "tiny_shapes"]).rank
    assert "--config tiny_shapes: awm has no old_policy_decay_max, which nft has\n" in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text("algorithm: awm\nbeta: 1\n")
    with pytest.raises(UserError, match="unknown field beta"):
        parse_args(["--config", str(tmp_path / "run.yaml")])
    assert parse_args(["--config", str(tmp_path / "run.yaml"), "--algorithm", "nft"]).beta == 1


def test_older_names_of_fields(tmp_path):
    (tmp_path / "old.yaml").write_text("pretrained_model_name_or_path: a\nshared_prefix: false\n")
    assert parse_args(["--config", str(tmp_path / "old.yaml")]).model == "a"
    assert parse_args(["--pretrained_model_name_or_path", "b"]).model == "b"
    with pytest.raises(UserError, match="--model is given twice|--pretrained_model_name_or_path is given twice"):
        parse_args(["--pretrained_model_name_or_path", "b", "--model", "a"])
    (tmp_path / "old.yaml").write_text("pretrained_model_name_or_path: a\nmodel: b\n")
    with pytest.raises(UserError, match="pretrained_model_name_or_path is an older name of model, and both are given"):
        parse_args(["--config", str(tmp_path / "old.yaml")])


def test_settings_of_a_run_name_its_algorithm(model_folder, tmp_path):  # noqa: F811
    """So that `--config` of them repeats it, and not an NFT run of these settings."""
    settings = tiny_arguments(model_folder, tmp_path, max_train_steps=1, num_eval_videos=0, report_to="none")
    assert main(["train", "--algorithm", "awm", *settings]) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["algorithm"] == "awm"
    assert type(parse_args(["--config", str(tmp_path / "config.yaml")])) is AWMConfig
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 1

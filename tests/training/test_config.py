import dataclasses

import pytest
import yaml

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.evaluation.config import LoraEvaluationConfig, ScoreConfig
from astrolabe_diffusers.training.nft import NFTConfig
from astrolabe_diffusers.training.published_runs import RECIPES


@pytest.fixture
def configs(tmp_path, monkeypatch):
    monkeypatch.setattr("astrolabe_diffusers.cli.train.RECIPES", tmp_path)
    (tmp_path / "small.yaml").write_text("rank: 16\nlearning_rate: 3e-4\nrewards: {sharpness: 2, flicker: 0.5}\n")
    return tmp_path


def test_defaults_are_the_published_settings():
    config = NFTConfig()
    assert config.model == TINY_SHAPES
    published = dict(
        beta=1.0, kl_weight=1e-4, adv_clip_max=5.0, rank=256, lora_alpha=256, learning_rate=1e-5, max_grad_norm=1.0
    )
    assert {name: getattr(config, name) for name in published} == published
    assert config.steps_per_epoch == 1


def test_command_line_goes_before_file_goes_before_default(configs):
    config = parse_args(["--config", "small", "--rank", "8"])
    assert (config.rank, config.learning_rate, config.beta) == (8, 3e-4, 1.0)
    assert config.rewards == {"sharpness": 2.0, "flicker": 0.5}


def test_config_by_path(configs):
    assert parse_args(["--config", str(configs / "small.yaml")]).rank == 16


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--gradient_checkpointing"], "gradient_checkpointing", "full"),
        (["--gradient_checkpointing", "true"], "gradient_checkpointing", "full"),
        (["--gradient_checkpointing", "false"], "gradient_checkpointing", "none"),
        (["--gradient_checkpointing", "selective"], "gradient_checkpointing", "selective"),
        (["--rewards", "sharpness"], "rewards", {"sharpness": 1.0}),
        (["--rewards", "sharpness=2,flicker=0.5"], "rewards", {"sharpness": 2.0, "flicker": 0.5}),
        (["--rewards", "{sharpness: 2}"], "rewards", {"sharpness": 2.0}),
        (["--rewards", "my.module:Reward=3"], "rewards", {"my.module:Reward": 3.0}),
        (["--eval_rewards", "sharpness,flicker"], "eval_rewards", ["sharpness", "flicker"]),
        (["--eval_rewards", "sharpness", "--eval_rewards", "flicker"], "eval_rewards", ["sharpness", "flicker"]),
        (["--eval_rewards", ""], "eval_rewards", []),
        (["--mixed_precision", "none"], "mixed_precision", None),
        (["--num_frames", "33"], "num_frames", 33),
        (["--max_train_steps", "7"], "num_train_epochs", 7),
    ],
)
def test_values_get_the_type_of_their_field(arguments, field, value):
    assert getattr(parse_args(arguments), field) == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "--learning_rate"]),
        (["--config", "nothing"], ["nothing", "small"]),
        (["--rank", "many"], ["rank", "whole number", "many"]),
        (["--rank", "0"], ["rank", "at least 1"]),
        (["--advantage_std", "both"], ["global, group, none", "both"]),
        (["--rewards", ""], ["rewards", "at least one"]),
        (["--rewards", "sharpness=high"], ["rewards", "name=weight"]),
        (["--gradient_checkpointing", "maybe"], ["none, selective, full"]),
        (["--batches_per_epoch", "6", "--gradient_accumulation_steps", "4"], ["1, 2, 3 or 6"]),
        (
            ["--batches_per_epoch", "4", "--gradient_accumulation_steps", "2", "--max_train_steps", "7"],
            ["max_train_steps=7", "6 or 8"],
        ),
        (["--rank", "4", "--rank", "8"], ["--rank is given twice"]),
        (["--rewards", "sharpness", "--rewards", "flicker"], ["--rewards is given twice"]),
        (["--gradient_checkpointing", "--gradient_checkpointing", "false"], ["given twice"]),
        (["--config", "small", "--config", "small"], ["--config is given twice"]),
        (["--rewards", "flicker=1,sharpness=1,flicker=2"], ["rewards: flicker is given twice"]),
        (["--rewards", "{flicker: 1, flicker: 2}"], ["rewards", "flicker is given twice"]),
        (["--reward_placement", "flicker=cpu,flicker=process"], ["reward_placement: flicker is given twice"]),
        (["--reward_options", "flicker.a=1,flicker.a=2"], ["reward_options: flicker.a is given twice"]),
        (["--rewards", "{flicker: "], ["rewards is no valid YAML"]),
        (["--rewards", "{" + "[" * 3000], ["rewards is no valid YAML"]),
        (["--reward_options", "flicker.a=[1"], ["reward_options: the value of flicker.a is no valid YAML"]),
        (["--samples_per_prompt", "1"], ["samples_per_prompt", "at least 2"]),
        (["--rewards", "sharpness=0"], ["weight 0"]),
        (["--rewards", "sharpness=nan"], ["rewards", "name=weight"]),
        (["--collapse_factor", "0.5"], ["collapse_factor", "more than 1"]),
    ],
)
def test_mistakes_end_in_one_line_that_names_the_choices(arguments, words, configs):
    with pytest.raises(UserError) as error:
        parse_args(arguments)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


# Of each of these numbers, the values at which a run cannot work, and one just inside the bound.
@pytest.mark.parametrize(
    ("field", "outside", "inside"),
    [
        ("learning_rate", ["0", "-1", "nan", "inf"], "1e-9"),
        ("beta", ["0", "-0.1"], "0.01"),
        ("adv_clip_max", ["0", "-1"], "0.1"),
        ("adam_beta1", ["1", "1.5", "-0.1"], "0"),
        ("adam_beta2", ["1"], "0.5"),
        ("adam_epsilon", ["0", "-1"], "1e-12"),
        ("adam_weight_decay", ["-1"], "0"),
        ("max_grad_norm", ["0", "-1"], "0.1"),
        ("lora_alpha", ["0", "-4"], "1"),
        ("lora_dropout", ["1", "-0.1"], "0.5"),
        ("ema_decay", ["1", "-1"], "0"),
        ("old_policy_decay_rate", ["-1"], "0"),
        ("old_policy_decay_max", ["5", "-0.1"], "1"),
        ("risk_ratio", ["7", "-0.1"], "1"),
        ("seed", ["-1", str(2**70)], str(2**32 - 1)),
    ],
)
def test_numbers_out_of_bounds(field, outside, inside):
    for value in outside:
        with pytest.raises(UserError, match=f"^{field} must be [^\n]*$"):
            parse_args([f"--{field}", value])
    assert getattr(parse_args([f"--{field}", inside]), field) == float(inside)


def test_what_is_trained_on_is_not_scored_again_to_be_watched():
    config = parse_args(["--rewards", "sharpness", "--eval_rewards", "flicker,sharpness"])
    assert config.eval_rewards == ["flicker"]


def test_a_list_may_be_given_in_pieces(configs):
    assert parse_args(["--eval_rewards", "flicker", "--eval_rewards", "sharpness"]).eval_rewards[1] == "sharpness"


def test_a_key_that_stands_twice_in_a_file(configs):
    (configs / "twice.yaml").write_text("rank: 4\nrewards: {sharpness: 1}\nrank: 8\n")
    with pytest.raises(UserError, match="twice.yaml .*rank is given twice.*line 1"):
        parse_args(["--config", "twice"])
    (configs / "twice.yaml").write_text("rewards: {sharpness: 1, flicker: 1, sharpness: 2}\n")
    with pytest.raises(UserError, match="sharpness is given twice"):
        parse_args(["--config", "twice"])


def test_file_that_is_no_text(configs):
    (configs / "binary.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="binary.yaml is no text") as error:
        parse_args(["--config", "binary"])
    assert "\n" not in str(error.value)


def test_help_shows_what_is_declared_and_not_what_follows_from_it(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--help"])
    lines = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "goes before num_train_epochs --gradient_accumulation_steps" in lines  # and no [100]
    assert "length of the run in epochs [100]" in lines


def test_an_epoch_has_a_size_that_a_machine_can_hold():
    with pytest.raises(UserError, match="samples an epoch are more than 1000000"):
        NFTConfig(train_batch_size=10**12, samples_per_prompt=2).groups_per_epoch(1)


def test_unknown_key_of_a_file_suggests_the_right_one(configs):
    (configs / "typo.yaml").write_text("learnin_rate: 1\nzzz: 2\n")
    with pytest.raises(UserError, match="learnin_rate.*did you mean learning_rate.*zzz"):
        parse_args(["--config", "typo"])


def test_file_that_is_no_yaml(configs):
    (configs / "bad.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match="bad.yaml is no valid YAML") as error:
        parse_args(["--config", "bad"])
    assert "\n" not in str(error.value)


def test_groups_must_be_whole():
    config = NFTConfig(train_batch_size=3, batches_per_epoch=4, samples_per_prompt=8)
    assert config.groups_per_epoch(2) == 3
    with pytest.raises(UserError, match="12 samples.*samples_per_prompt can be 2, 3, 4, 6 or 12"):
        config.groups_per_epoch(1)


def test_saved_config_repeats_the_run(tmp_path):
    config = NFTConfig(rank=3, rewards={"sharpness": 1.0}, eval_rewards=["flicker"])
    config.save(tmp_path / "config.yaml")
    assert parse_args(["--config", str(tmp_path / "config.yaml")]) == config


def test_numbers_of_a_saved_config_follow_what_is_changed(tmp_path):
    path = tmp_path / "config.yaml"
    NFTConfig(batches_per_epoch=2, num_train_epochs=8).save(path)
    longer, larger = (
        parse_args(["--config", str(path), *change])
        for change in (["--num_train_epochs", "50"], ["--batches_per_epoch", "8"])
    )
    assert (longer.num_train_epochs, longer.max_train_steps, longer.gradient_accumulation_steps) == (50, 50, 2)
    assert (larger.num_train_epochs, larger.max_train_steps, larger.gradient_accumulation_steps) == (8, 8, 8)


def test_a_token_is_no_setting(configs):
    """Of the command line or of a file of 0.1.0."""
    (configs / "old.yaml").write_text("hub_token: hf_planted\n")
    for arguments in (["--hub_token", "hf_planted"], ["--hub_token=hf_planted"], ["--config", "old"]):
        with pytest.raises(UserError, match="HF_TOKEN or `hf auth login`") as error:
            parse_args(arguments)
        assert "hf_planted" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TypeError):
        NFTConfig(hub_token="hf_planted")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--reward_placement", "sharpness=http://me:planted@host:80"], "reward_placement.sharpness is an address"),
        (["--reward_placement", "sharpness=process|https://planted@host"], "reward_placement.sharpness is an address"),
        (["--reward_options", "r.base_url=http://me:planted@host/v1"], "reward_options.r.base_url is an address"),
        (["--reward_options", "r.base_url=http://host/v1?x=1&api_key=planted"], "reward_options.r.base_url is an"),
        (["--reward_options", "r.api_key=planted"], "reward_options.r.api_key is named like a secret"),
        (["--reward_options", "r.hf_token=planted"], "reward_options.r.hf_token is named like a secret"),
        (["--reward_options", "r.password=planted"], "reward_options.r.password is named like a secret"),
        (["--reward_options", "r.client={secret: planted}"], "reward_options.r.client.secret is named like a secret"),
        (["--prompts", "https://me:planted@host/prompts"], "prompts is an address"),
        (["--init_lora", "s3://key:planted@bucket"], "init_lora is an address"),
    ],
)
def test_settings_hold_no_secrets(arguments, name):
    with pytest.raises(UserError, match=name) as error:
        parse_args(arguments)
    assert "planted" not in str(error.value) and "\n" not in str(error.value)
    for config_class in (LoraEvaluationConfig, ScoreConfig):
        if arguments[0] in ("--reward_placement", "--reward_options"):
            with pytest.raises(UserError, match=name):
                config_class(**{arguments[0][2:]: arguments[1]})


@pytest.mark.parametrize(
    "options", ["r.api_key_variable=MY_KEY", "r.max_tokens=7", "r.prompt_key=caption", "r.base_url=http://host:80/v1"]
)
def test_what_only_looks_like_a_secret(options):
    assert parse_args(["--reward_options", options]).reward_options["r"]


def test_every_field_has_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(NFTConfig))


def test_shipped_recipes_are_valid():
    for path in RECIPES.glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        parse_args(["--config", path.stem]).groups_per_epoch(1)

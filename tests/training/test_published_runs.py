"""Every published name and its settings, against a table written by hand, and the page that tells of them."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.rollout.past import make_windows
from astrolabe_diffusers.training.build import check_experts, set_recipe
from astrolabe_diffusers.training.forward_process import compilation
from astrolabe_diffusers.training.forward_process.noising import training_sigmas
from astrolabe_diffusers.training.forward_process.predictors import check_context
from astrolabe_diffusers.training.nft import NFTConfig
from astrolabe_diffusers.training.published_runs import (
    PUBLISHED,
    find_published_run,
    published_names,
    recommended_names,
)
from tests.tiny_pipeline import tiny_pipeline


PAGE = (Path(__file__).parents[2] / "docs" / "published_runs.md").read_text()
HPSV3, MQ, TA = "video_hpsv3_local", "videoalign_mq_score", "videoalign_ta_score"
VQ, BOTH = {HPSV3: 1.0}, {HPSV3: 1.0, MQ: 1.0}
SIZES = {8: (3, 24, 16), 16: (2, 16, 8), 24: (4, 24, 12), 48: (4, 24, 6)}
KREA_SIZES = {8: (1, 8, 8), 16: (1, 16, 16), 24: (1, 24, 24), 48: (1, 16, 16)}
LORA = {"init_lora": "longlive-lora"}
RISK = {"risk_ratio": 0.1, "risk_ratio_rate": 0.1, "risk_ratio_min": 0.02, "risk_ratio_max": 0.2}
RISK |= {"risk_buffer_size": 20, "risk_rule": "released", "kl_average": "batch"}
RESET = {"reference_reset_kl": 0.15, "reference_reset_epochs": 15, "reference_reset_kl_step": 0.01}
RESET |= {"reference_reset_kl_min": 0.1, "reference_reset_kl_max": 0.05, "reference_reset_early_epochs": 5}
GARDO = {"selective_kl": True, "primary_reward": HPSV3, **RISK, **RESET}
STREAM = {**LORA, "num_frames": 957, "eval_num_frames": 237, "window_size": 21, "sample_frames": 240}
STREAM |= {"window_selection": "choices", "window_choices": [21], "context": "clean"}

# name: processes, rewards, epochs between evaluations, and what else differs from lr 1e-5, KL 1e-4, 81 frames.
RUNS = {
    "longlive_video_hpsv3": (8, VQ, 10, {}),
    "longlive_video_hpsv3_16gpu": (16, VQ, 10, {}),
    "longlive_video_hpsv3_24gpu": (24, VQ, 10, {}),
    "longlive_video_hpsv3_48gpu": (48, VQ, 30, {}),
    "longlive_video_hpsv3_gardo": (8, BOTH, 10, GARDO),
    "longlive_video_hpsv3_gardo_24gpu": (24, BOTH, 10, GARDO),
    "longlive_video_hpsv3_gardo_48gpu": (48, BOTH, 30, GARDO),
    "longlive_video_hpsv3_streaming_with_lora_init": (8, VQ, 30, STREAM),
    "longlive_video_hpsv3_with_lora_init": (8, VQ, 10, LORA),
    "longlive_video_hpsv3_with_lora_init_16gpu": (16, VQ, 10, LORA),
    "longlive_video_hpsv3_with_lora_init_24gpu": (24, VQ, 10, LORA),
    "longlive_video_hpsv3_with_lora_init_48gpu": (48, VQ, 30, LORA),
    "longlive_video_long": (8, VQ, 10, {"num_frames": 237}),
    "longlive_video_mq": (8, {MQ: 1.0}, 20, {}),
    "longlive_video_mq_16gpu": (16, {MQ: 1.0}, 20, {}),
    "longlive_video_multi_reward": (8, BOTH, 10, {}),
    "longlive_video_multi_reward_16gpu": (16, BOTH, 10, {}),
    "longlive_video_multi_reward_24gpu": (24, BOTH, 10, {}),
    "longlive_video_multi_reward_48gpu": (48, BOTH, 30, {}),
    "longlive_video_multireward_48gpu": (48, BOTH, 30, {}),
    "longlive_video_multi_reward_with_lora_init": (8, BOTH, 10, LORA),
    "self_forcing_video_hpsv3": (8, VQ, 10, {}),
    "self_forcing_video_hpsv3_16gpu": (16, VQ, 30, {"kl_weight": 1e-3}),
    "self_forcing_video_hpsv3_24gpu": (24, VQ, 30, {"kl_weight": 1e-3}),
    "self_forcing_video_hpsv3_48gpu": (48, VQ, 10, {}),
    "self_forcing_video_multi_reward": (8, BOTH, 10, {}),
    "self_forcing_video_multi_reward_16gpu": (16, BOTH, 30, {"kl_weight": 1e-3}),
    "self_forcing_video_multi_reward_24gpu": (24, BOTH, 30, {"kl_weight": 1e-3}),
    "self_forcing_video_multi_reward_48gpu": (48, BOTH, 10, {}),
    "casual_forcing_video_hpsv3": (8, VQ, 30, {}),
    "casual_forcing_video_hpsv3_16gpu": (16, VQ, 10, {}),
    "casual_forcing_video_hpsv3_24gpu": (24, VQ, 10, {}),
    "casual_forcing_video_hpsv3_48gpu": (48, VQ, 30, {}),
    "casual_forcing_video_hpsv3_mq_ta_48gpu": (48, {HPSV3: 1.0, MQ: 1.0, TA: 1.0}, 30, {}),
    "casual_forcing_video_hpsv3_ta_48gpu": (48, {HPSV3: 0.1, TA: 1.0}, 30, {}),
    "casual_forcing_video_multi_reward": (8, BOTH, 30, {"learning_rate": 2e-5}),
    "casual_forcing_video_multi_reward_16gpu": (16, BOTH, 10, {}),
    "casual_forcing_video_multireward_48gpu": (48, BOTH, 30, {"kl_weight": 5e-4}),
    "casual_forcing_video_multi_reward_48gpu": (48, BOTH, 30, {"kl_weight": 5e-4}),
    "causal_forcing_video_multi_reward_48gpu": (48, BOTH, 30, {"kl_weight": 5e-4}),
    "casual_forcing_video_ta_48gpu": (48, {TA: 1.0}, 30, {"learning_rate": 2e-5}),
    "krea14b_video_hpsv3": (8, VQ, 30, {}),
    "krea14b_video_hpsv3_16gpu": (16, VQ, 30, {}),
    "krea14b_video_hpsv3_24gpu": (24, VQ, 30, {}),
    "krea14b_video_hpsv3_48gpu": (48, VQ, 30, {}),
    "krea14b_video_multi_reward": (8, BOTH, 30, {}),
    "krea14b_video_multi_reward_16gpu": (16, BOTH, 30, {}),
    "krea14b_video_multi_reward_24gpu": (24, BOTH, 30, {}),
    "krea14b_video_multi_reward_48gpu": (48, BOTH, 30, {}),
}
MODELS = {"longlive": (12, 3), "self_forcing": (-1, 0), "casual_forcing": (-1, 0), "krea14b": (-1, 0)}
FOLDERS = dict(zip(MODELS, ("longlive", "self-forcing", "causal-forcing-chunkwise", "krea-14b")))


@pytest.mark.parametrize("name", RUNS)
def test_settings(name, monkeypatch, capsys):
    processes, rewards, eval_epochs, others = RUNS[name]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = parse_args(["--config", name])
    base = name.split("_video_")[0].replace("causal", "casual")
    batch, group, batches = (KREA_SIZES if base == "krea14b" else SIZES)[processes]
    expected = {"beta": 0.1, "kl_weight": 1e-4, "learning_rate": 1e-5, "num_frames": 81, "rewards": rewards}
    expected |= {"train_batch_size": batch, "samples_per_prompt": group, "batches_per_epoch": batches}
    # An epoch is one optimizer step, so that steps are epochs.
    expected |= {"gradient_accumulation_steps": batches, "eval_steps": eval_epochs, "checkpointing_steps": 30}
    expected |= dict(zip(("local_attn_size", "sink_size"), MODELS[base]))
    expected |= {"height": 480, "width": 832, "rank": 256, "lora_alpha": 256, "lora_dropout": 0.0, "seed": 42}
    expected |= {"lora_target_modules": [], "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-4}
    expected |= {"adam_epsilon": 1e-8, "max_grad_norm": 1.0, "mixed_precision": "bf16", "adv_clip_max": 5.0}
    expected |= {"old_policy_decay_rate": 0.001, "old_policy_decay_max": 0.5, "ema_decay": 0.9}
    expected |= {"advantage_std": "global", "train_timesteps": "raw", "context": "noisy", "context_policy": "own"}
    expected |= {"allow_tf32": True, "gradient_checkpointing": "full", "loss_weighting": "none"}
    expected |= {"collapse_factor": 0.0, "merge_lora": False}
    expected |= {"reference_reset_kl": None, "reference_reset_epochs": None, "advantage_reward": "composite"}
    expected |= {"sigmas": [1.0, 0.75, 0.5, 0.25], "lr_scheduler": "constant", "lr_warmup_steps": 0}
    expected |= {"init_lora": None, "selective_kl": False, "window_size": None, "eval_num_frames": None} | others
    assert {field: getattr(config, field) for field in expected} == expected
    assert config.steps_per_epoch == 1
    printed = capsys.readouterr().out
    assert "as published" in printed and "\nas released; --recommended" in printed and "but for" not in printed
    assert config.model == FOLDERS[base]


# What does not decide what is trained: where things come from and go to, how much is looked at, with what memory.
FREE = {"import_modules", "reward_options", "reward_placement", "reward_timeout", "revision", "variant"}
FREE |= {"prompt_column", "output_dir", "eval_rewards", "num_eval_prompts", "eval_seeds", "num_eval_videos"}
FREE |= {"checkpoints_total_limit", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "logging_dir"}
FREE |= {"push_to_hub", "hub_model_id", "hub_base_model", "hub_license"}
FREE |= {"blocks_per_pass", "compile", "prompt_embeds_dir"}
# These say nothing in a run whose KL is for all samples and whose reference stays.
SELECTIVE = RISK.keys() | RESET.keys() - {"reference_reset_kl", "reference_reset_epochs"}


@pytest.mark.parametrize("name", published_names())
def test_nothing_that_decides_is_left_to_our_defaults(name):
    """A new field goes into common.yaml, with what the release does, or into FREE."""
    settings = find_published_run(name).settings
    fields = {field.name for field in dataclasses.fields(NFTConfig)}
    assert settings.keys() <= fields
    assert fields - FREE - settings.keys() == (set() if settings["selective_kl"] else SELECTIVE)


@pytest.mark.parametrize("name", ["self_forcing_video_hpsv3", "longlive_video_hpsv3_gardo"])
def test_what_we_recommend_is_a_flag(name, capsys):
    released = parse_args(["--config", name])
    capsys.readouterr()
    config = parse_args(["--config", name, "--recommended", "--beta", "0.3", "--output_dir", "mine"])
    changes = {"context": "clean", "context_policy": "old", "train_timesteps": "warped", "collapse_factor": 2.0}
    changes |= {"merge_lora": True}
    if "gardo" in name:
        changes |= {"risk_rule": "hacked", "kl_average": "selected", "reference_reset_kl_step": 0.0}
        changes |= {"reference_reset_kl_min": 0.0, "reference_reset_kl_max": None}
    given = {"beta": 0.3, "output_dir": "mine"}
    assert dataclasses.asdict(config) == dataclasses.asdict(released) | changes | given
    printed = capsys.readouterr().out.splitlines()[1]
    assert printed.startswith("with what we recommend: context=clean, context_policy=old, train_timesteps=warped, ")
    assert printed.endswith("; but for your beta") and ("risk_rule=hacked" in printed) == ("gardo" in name)
    config = parse_args(["--config", name, "--recommended", "false", "--context", "clean"])
    assert dataclasses.asdict(config) == dataclasses.asdict(released) | {"context": "clean"}
    assert capsys.readouterr().out.splitlines()[1].endswith("; but for your context")


@pytest.mark.parametrize("config", [[], ["--config", "tiny_shapes"]])
def test_recommended_goes_with_a_published_name(config):
    with pytest.raises(UserError, match="--recommended goes with the name of a published run"):
        parse_args([*config, "--recommended"])


OURS = [name for name, (_, _, processes) in recommended_names().items() if processes == 8]


def test_runs_of_ours_are_none_of_the_published():
    assert not recommended_names().keys() & published_names().keys()
    published = {find_published_run(name).settings["model"] for name in published_names()}
    ours = {model for model, variant, _ in recommended_names().values() if variant != "switch"}
    assert published | ours == PUBLISHED_MODELS.keys() and not published & ours
    assert {"raven_video_hpsv3", "infinity_rope_video_multi_reward_48gpu"} <= recommended_names().keys()
    switches = [name for name, (_, variant, _) in recommended_names().items() if variant == "switch"]
    assert switches == ["longlive_video_switch_1gpu", "longlive_video_switch", "longlive_video_switch_48gpu"]


@pytest.mark.parametrize(
    ("name", "processes", "samples"),
    [
        ("longlive_video_switch_1gpu", 1, 48),
        ("longlive_video_switch", 8, 384),
        ("longlive_video_switch_48gpu", 48, 1152),
    ],
)
def test_longlive_is_trained_for_the_switch(name, processes, samples, monkeypatch, capsys):
    """Of whole groups that share a past; every window is after a switch, and every kind of it is drawn."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = parse_args(["--config", name])
    assert f"{samples} samples an epoch, as recommended" in capsys.readouterr().out
    assert config.groups_per_epoch(processes) * config.samples_per_prompt == samples
    pasts = [make_windows(config, 60, 3, 3).past(epoch) for epoch in range(300)]
    assert {past.num_frames for past in pasts} == set(range(3, 51, 3))
    kinds = {(past.switch.transition, past.num_frames - past.switch.frame) for past in pasts}
    assert kinds == {(transition, distance) for transition in ("recache", "roll") for distance in (0, 12)}
    assert all(past.shared and past.switch.frame >= 3 for past in pasts)


@pytest.mark.parametrize("name", OURS)
def test_a_run_of_ours(name, monkeypatch, capsys):
    """What we recommend, with the flag and without it, on the model's own window, positions and steps."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = parse_args(["--config", name])
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("384 samples an epoch, as recommended")
    assert second == "as we recommend; no such run was published"
    assert parse_args(["--config", name, "--recommended"]) == config
    recommended = yaml.safe_load((PUBLISHED / "recommended.yaml").read_text())
    assert {field: getattr(config, field) for field in recommended} == recommended
    assert find_published_run(name).settings.keys() >= find_published_run("longlive_video_hpsv3").settings.keys()
    model = PUBLISHED_MODELS[config.model]
    pipe = tiny_pipeline(**model.transformer, **model.pipeline)
    if model.experts == 2:
        pipe.memory_transformer = tiny_pipeline(**model.transformer).transformer
    before = dict(pipe.transformer.config), dict(pipe.config)
    set_recipe(pipe, config)
    assert (dict(pipe.transformer.config), dict(pipe.config)) == before
    # What a run would only be told after its model is loaded.
    check_experts(pipe, config)
    blocks = pipe.transformer.config.num_frames_per_block
    windows = make_windows(config, 21, blocks, pipe.transformer.config.sink_size)
    check_context(config, pipe.denoiser, windows.have_past)
    # Not with a memory bank or a window, nor where 21 blocks are several passes of several blocks.
    monkeypatch.setattr(compilation, "compiler_works", lambda device: True)
    compiled = compilation.compiles_blocks(config, pipe.denoiser, windows.size, torch.device("cuda"))
    alike = config.num_pass_blocks == 1 or config.num_pass_blocks * blocks >= 21
    assert compiled == (alike and "memflow" not in name and "switch" not in name)
    assert len(training_sigmas(pipe, config.train_timesteps, config.train_steps))


def test_krea_is_trained_in_the_plain_loop():
    config = parse_args(["--config", "krea14b_video_hpsv3"])
    assert config.num_context_frames == 0 and config.sigmas == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("name", ["longlive_video_hpsv3", "self_forcing_video_hpsv3_16gpu", "krea14b_video_hpsv3"])
def test_any_number_of_processes_gets_whole_groups(name):
    run = find_published_run(name)
    total = run.processes * run.settings["train_batch_size"] * run.settings["batches_per_epoch"]
    for processes in range(1, 65):
        settings, line = run.settings_for(processes, {})
        groups = NFTConfig(**settings).groups_per_epoch(processes)  # raises if they are not whole
        samples = groups * settings["samples_per_prompt"]
        assert f"on {processes} process" in line and f"{samples} samples" in line
        if processes not in run.sizes:
            assert settings["train_batch_size"] == run.settings["train_batch_size"]
            step = processes * settings["train_batch_size"] * settings["samples_per_prompt"]
            assert abs(samples - total) <= step
            assert "near to those published for" in line


def test_sizes_of_the_base_for_another_published_number():
    settings, line = find_published_run("longlive_video_multi_reward").settings_for(48, {})
    assert (settings["train_batch_size"], settings["samples_per_prompt"], settings["batches_per_epoch"]) == SIZES[48]
    assert "those published for 48 processes" in line
    assert settings["eval_steps"] == 10  # of the run itself


# Processes, what is given, then batch, group and batches, and what the run says. In single videos a group of 24 takes
# 24 batches on one process and 3 on eight; either way the published 384 samples come out.
@pytest.mark.parametrize(
    "processes,given,sizes,words",
    [
        (1, {"train_batch_size": 1}, (1, 24, 384), "batches of 1, groups of 24, 384 samples an epoch, near to"),
        (8, {"train_batch_size": 1}, (1, 24, 48), "batches of 1, groups of 24, 384 samples an epoch, near to"),
        (8, {"samples_per_prompt": 6}, (3, 6, 16), "batches of 3, groups of 6, 384 samples an epoch, near to"),
        (2, {"batches_per_epoch": 4}, (3, 24, 4), "batches of 3, groups of 24, 24 samples an epoch, as given"),
        (8, {"train_batch_size": 3}, (3, 24, 16), "384 samples an epoch, as published"),
    ],
)
def test_sizes_on_the_command_line_stay(processes, given, sizes, words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    command = ["--config", "longlive_video_hpsv3", "--prompts", "mine.txt"]
    config = parse_args(command + [part for name, n in given.items() for part in (f"--{name}", str(n))])
    assert (config.train_batch_size, config.samples_per_prompt, config.batches_per_epoch) == sizes
    assert config.groups_per_epoch(processes) * sizes[1] == processes * sizes[0] * sizes[2]
    assert words in capsys.readouterr().out and config.prompts == "mine.txt"


@pytest.mark.parametrize("size,words", [("0", "at least 1"), ("many", "a whole number")])
def test_sizes_that_are_none(size, words):
    with pytest.raises(UserError, match=f"train_batch_size must be {words}"):
        parse_args(["--config", "longlive_video_hpsv3", "--train_batch_size", size])


def test_list(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_args(["--config", "list"])
    assert exit.value.code == 0
    table, ours = capsys.readouterr().out.split("\n\nOf ours, none of them published:\n")
    rows = table.splitlines()
    assert [row.split()[0] for row in ours.splitlines()[1:]] == list(recommended_names())
    names = [row.split()[0] for row in rows[1:]]
    assert names == list(published_names()) and len(set(names)) == len(names)
    spelled = {name.replace("casual", "causal").replace("multireward", "multi_reward") for name in RUNS}
    assert spelled == set(names)
    row = next(row for row in rows if row.startswith("causal_forcing_video_hpsv3_ta_48gpu"))
    expected = ["causal-forcing-chunkwise", "video_hpsv3_local=0.1,", TA, "48", "x", "4", "x", "6", "24"]
    assert row.split()[1:] == expected


@pytest.mark.parametrize(
    "name,words",
    [
        ("longlive_video_hpsv4", "longlive_video_hpsv3"),
        ("longlive_video_hpsv3_12gpu", "longlive_video_hpsv3_16gpu"),
        ("longlive_video_long_48gpu", "longlive_video_long"),
        ("selfforcing_video_hpsv3", "self_forcing_video_hpsv3"),
        ("tiny", "no such file and no such name"),
        ("longlive_hpsv3", "did you mean longlive_video_hpsv3.*those of published runs, which --config list prints"),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(UserError, match=words):
        parse_args(["--config", name])


def test_the_default_number_may_be_spelled_out():
    assert find_published_run("longlive_video_long_8gpu").settings["num_frames"] == 237


README_ONLY = {"krea14b_video_multi_reward_16gpu", "krea14b_video_multi_reward_48gpu"}
README_ONLY |= {"longlive_video_hpsv3_with_lora_init_16gpu", "longlive_video_multi_reward_24gpu"}


def row_of_the_page(name):
    """What docs/published_runs.md says of a run, from its YAML."""
    run = find_published_run(name)
    settings, processes = run.settings, run.processes
    batch, group, batches = (settings[n] for n in ("train_batch_size", "samples_per_prompt", "batches_per_epoch"))
    together, windowed = processes * batch, bool(settings["window_choices"])
    # The rows of the page's first table in which a name did not give what was released.
    before = [1] * (not settings["init_lora"]) + [2] * (settings["context"] == "noisy") + [3, 4, 5, 6]
    before += [7] * (settings["local_attn_size"] != -1 and not windowed) + [8, 9] * windowed
    before += [10, 11, 12, 13] * settings["selective_kl"]
    rewards = [reward if weight == 1 else f"{weight:g} {reward}" for reward, weight in settings["rewards"].items()]
    cells = [
        name + "*" * (name in README_ONLY),
        settings["model"] + " + LoRA" * bool(settings["init_lora"]),
        " + ".join(rewards),
        f"{processes} x {batch} x {batches}",
        str(settings["num_frames"]),
        f"{settings['learning_rate']:g}, {settings['kl_weight']:g}, {settings['beta']:g}",
        str(settings["eval_steps"]),
        f"{together // group} x {group * batches}",
        " ".join(map(str, before)),
        f"14: {together * batches // group} x {group}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_page_has_a_row_for_every_run():
    expected = [row_of_the_page(name) for name in published_names()]
    rows = [line for line in PAGE.splitlines() if re.match(r"\| \w+_video_", line)]
    assert rows == expected, "the rows should be:\n" + "\n".join(expected)


def settings_on_the_page(heading):
    """The `field: value` of a section's tables."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [yaml.safe_load(text) for row in rows for text in re.findall(r"`(\w+: [^`]+)`", row)]


def test_the_page_states_what_the_files_do():
    gardo, streaming = (
        find_published_run(f"longlive_video_{name}").settings
        for name in ("hpsv3_gardo", "hpsv3_streaming_with_lora_init")
    )
    stated = settings_on_the_page("Released, before, now")
    assert len(stated) > 15
    for setting in stated:
        assert setting.items() <= gardo.items() or setting.items() <= streaming.items(), setting
    recommended = yaml.safe_load((PUBLISHED / "recommended.yaml").read_text())
    assert {k: v for setting in settings_on_the_page("What we recommend") for k, v in setting.items()} == recommended

"""Runs that go on with other settings: what is compared is the same videos, judged by the same rewards."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.reporting.comparison import Evaluation
from astrolabe_diffusers.reporting.report import RunReport
from astrolabe_diffusers.training import NFTConfig, NFTTrainer
from astrolabe_diffusers.training.adapter_files import WEIGHT_NAMES, save_adapter
from astrolabe_diffusers.training.results import BestAdapter
from tests.training.helpers import BRIGHTNESS, policy_pipeline, tiny_settings


pytestmark = pytest.mark.usefixtures("no_charts")


CONTRAST = "tests.training.rewards:contrast"
# Its two steps are two epochs of two batches.
SHORT = {"num_frames": 9, "train_batch_size": 2, "batches_per_epoch": 2, "checkpointing_steps": 1}


def config_of(model_folder, folder, **values):
    settings = tiny_settings(model_folder, folder, **SHORT | values)
    return NFTConfig(**{name: str(v) if name in ("model", "output_dir") else v for name, v in settings.items()})


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """The folder of a run that has come to its end."""
    folder = tmp_path_factory.mktemp("finished")
    NFTTrainer(config=config_of(model_folder, folder)).train()
    return folder


def resume(model_folder, folder, **values):
    config = config_of(model_folder, folder, resume_from_checkpoint="latest", **values)
    trainer = NFTTrainer(config=config)
    return trainer.train(), trainer


def first_scores(config):
    """Those of a new run of these settings, before it has learnt anything."""
    trainer = NFTTrainer(config=config)
    trainer.start()
    trainer.follow_up()
    trainer.end()
    return trainer.report.evaluations[0].scores


def evaluations_of(folder):
    return [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]


OTHER_PROMPTS = [f"a {color} cross moves up on a white background" for color in ("red", "green", "blue", "purple")]
CHANGES = {
    "more prompts": ({"num_eval_prompts": 3}, ["videos"]),
    "more seeds": ({"eval_seeds": 2}, ["videos"]),
    "other prompts": ({"prompts": OTHER_PROMPTS}, ["videos"]),
    "longer videos": ({"eval_num_frames": 21}, ["size"]),
    "another reward": ({"rewards": {CONTRAST: 1.0}, "eval_rewards": []}, ["rewards"]),
    "another weight": ({"rewards": {BRIGHTNESS: -2.0}}, ["rewards"]),
    "another option": ({"reward_options": {CONTRAST: {"scale": 2.0}}}, ["rewards"]),
    "a reward that is watched": ({"eval_rewards": [CONTRAST, "flicker"]}, ["rewards"]),
    "the sampler's steps": ({"sigmas": [1.0, 0.5]}, ["sampling"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_judged_otherwise_is_judged_anew(name, model_folder, finished, tmp_path, capsys):
    values, changed = CHANGES[name]
    if "prompts" in values:
        (tmp_path / "prompts.txt").write_text("\n".join(values["prompts"]))
        values = values | {"prompts": str(tmp_path / "prompts.txt")}
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    earlier = evaluations_of(folder)
    results, trainer = resume(model_folder, folder, **values)
    assert f"other {', '.join(changed)}: the policy that the run began with" in capsys.readouterr().out
    # Before and after are of now; what was judged before stays in the log.
    *kept, before, after = evaluations_of(folder)
    assert kept == earlier and (before["step"], after["step"]) == (0, 2)
    expected = first_scores(config_of(model_folder, tmp_path / "new", **values))
    assert before["scores"] == expected
    reward = results["scores"]["reward"]
    assert reward["before"] == pytest.approx(sum(expected["reward"]) / len(expected["reward"]))
    assert reward["after"] == pytest.approx(after["mean"]["reward"]) and reward["change"] != 0
    assert results["scores"].keys() == expected.keys() and results["num_videos"] == len(expected["reward"])
    # The best is one of these two, and its adapter the one that was judged.
    best = max((before, after), key=lambda record: record["mean"]["reward"])
    assert results["best"] == {"step": best["step"], "reward": best["mean"]["reward"]}
    adapter = load_file(folder / "best" / "pytorch_lora_weights.safetensors")
    last = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(value, last[key]) for key, value in adapter.items()) == (best is after)
    assert any(value.any() for key, value in adapter.items() if "lora_B" in key) == (best is after)
    # The second time the settings are the same.
    again, _ = resume(model_folder, folder, **values)
    assert evaluations_of(folder) == [*kept, before, after] and again["scores"] == results["scores"]
    assert "began with" not in capsys.readouterr().out


def test_the_same_settings_said_otherwise_are_the_same(model_folder, finished, tmp_path):
    """Defaults that are given, the order of rewards, where videos are decoded and how large batches are."""
    rewards = {BRIGHTNESS: 1.0, "flicker": 0.5}
    config = config_of(model_folder, tmp_path / "run", rewards=rewards, eval_rewards=[CONTRAST, "sharpness"])
    NFTTrainer(config=config).train()
    before = evaluations_of(tmp_path / "run")
    rewards = {"flicker": 0.5, BRIGHTNESS: 1.0}
    same = dict(rewards=rewards, eval_rewards=["sharpness", CONTRAST], vae_dtype="float32", train_batch_size=4)
    results, _ = resume(model_folder, tmp_path / "run", **same, batches_per_epoch=1, learning_rate=1e-3)
    assert evaluations_of(tmp_path / "run") == before and results["best"] is not None


def test_a_run_from_a_lora_is_compared_with_that(model_folder, tmp_path):
    """The policy that it began with is no longer anywhere but there; the average is what is judged."""
    save_adapter(policy_pipeline(height=16, width=32, num_frames=9, num_layers=1).transformer, tmp_path / "lora")
    values = {"init_lora": str(tmp_path / "lora"), "ema_decay": 0.5}
    NFTTrainer(config=config_of(model_folder, tmp_path / "run", **values)).train()
    values["rewards"] = {CONTRAST: 1.0}
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-2" / WEIGHT_NAMES["ema"])
    _, trainer = resume(model_folder, tmp_path / "run", **values)
    before, after = evaluations_of(tmp_path / "run")[-2:]
    expected = first_scores(config_of(model_folder, tmp_path / "new", **values))
    assert before["scores"] == expected
    base = first_scores(config_of(model_folder, tmp_path / "base", **values | {"init_lora": None}))
    assert before["scores"]["reward"] != base["reward"]
    # After it every policy is the checkpoint's again.
    assert trainer.initial == [] and after["scores"] != before["scores"]
    last = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert sorted(v.sum().item() for v in last.values()) == sorted(v.sum().item() for v in checkpoint.values())


def test_it_goes_on_learning_from_the_checkpoint(model_folder, finished, tmp_path):
    """To judge the beginning anew changes nothing that is learnt."""
    for name, seeds, curve in (("same", 1, [1, 2, 3]), ("other", 2, [3])):
        shutil.copytree(finished, tmp_path / name)
        more = {"max_train_steps": 3, "eval_steps": 9, "eval_seeds": seeds}
        _, trainer = resume(model_folder, tmp_path / name, **more)
        # What is drawn is only what may be compared.
        assert [step for step, _ in trainer.report.curve] == curve
        assert [evaluation.step for evaluation in trainer.report.evaluations][-2:] == [2 * (seeds == 1), 3]
    same, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("same", "other"))
    assert all(torch.equal(value, other[name]) for name, value in same.items())


def test_a_log_that_does_not_say_what_it_is_of(model_folder, finished, tmp_path, capsys):
    """As that of an earlier version, or none."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    records = evaluations_of(folder)
    plain = [{name: record[name] for name in ("step", "scores", "mean")} for record in records]
    (folder / "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in plain))
    # Of which evaluation the best adapter is nobody knows then.
    best = json.loads((folder / "best" / "best.json").read_text())
    (folder / "best" / "best.json").write_text(json.dumps(best | {"reward": 9.0}))
    results, _ = resume(model_folder, folder)
    assert results["best"] == {"step": best["step"], "reward": best["reward"]}
    assert "nothing to compare with in eval.jsonl: the policy that the run began with" in capsys.readouterr().out
    # A run that was resumed at its end knows no better where it was judged so first.
    scores = [record["scores"] for record in evaluations_of(folder)]
    assert scores == 2 * [record["scores"] for record in records]


def test_the_best_by_other_rewards_is_none(tmp_path):
    """As a run leaves it that is killed between an evaluation of new settings and its best adapter."""
    (tmp_path / "best").mkdir()
    for written, best in (({"rewards": "a"}, None), ({"rewards": "b"}, {"step": 2, "reward": 0.96})):
        record = {"step": 2, "reward": 0.96, "identity": written}
        (tmp_path / "best" / "best.json").write_text(json.dumps(record))
        adapter = BestAdapter(None, NFTConfig(output_dir=str(tmp_path)), {"rewards": "b"})
        adapter.resume(4, [])
        assert adapter.record == best


@pytest.mark.parametrize("rewards, step, saved", [((0.5, 0.7, 0.8), 20, 20), ((0.5, 0.8, 0.7), 20, None)])
def test_the_best_before_a_checkpoint_is_to_be_surpassed(tmp_path, rewards, step, saved):
    """What came after the checkpoint is gone, the best one among it; of those before, the last is that of the adapter
    that was loaded."""
    transformer = policy_pipeline().transformer
    identity, config = {"rewards": "a"}, NFTConfig(output_dir=str(tmp_path))
    BestAdapter(transformer, config, identity).offer(Evaluation(40, {"reward": [0.85]}))
    evaluations = [Evaluation(10 * i, {"reward": [reward]}) for i, reward in enumerate(rewards)]
    best = BestAdapter(transformer, config, identity)
    best.resume(step, evaluations)
    assert best.record == (saved and {"step": saved, "reward": 0.8})
    best.offer(Evaluation(30, {"reward": [0.75]}))
    assert best.record == (saved and {"step": saved, "reward": 0.8})
    best.offer(Evaluation(40, {"reward": [0.81]}))
    assert best.record == {"step": 40, "reward": 0.81}
    assert json.loads((tmp_path / "best" / "best.json").read_text())["reward"] == 0.81


BATCHES = {"batches_per_epoch": 4, "samples_per_prompt": 2}


def test_an_epoch_that_would_pass_the_end_is_refused(model_folder, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    more = BATCHES | {"max_train_steps": 4, "resume_from_checkpoint": "checkpoint-1"}
    for accumulation, spread in ((2, "2"), (1, "4")):
        config = config_of(model_folder, folder, **more, gradient_accumulation_steps=accumulation)
        with pytest.raises(UserError) as error:
            NFTTrainer(config=config).train()
        assert str(error.value) == (
            f"from checkpoint-1 to max_train_steps=4 is no whole number of epochs of {spread} optimizer steps; with "
            "batches_per_epoch=4 gradient_accumulation_steps can be 4."
        )
    # Nor is checkpoint-2 set aside.
    left = {path: path.read_bytes() for path in before}
    assert left == before and (folder / "checkpoints" / "checkpoint-2").is_dir()


def test_epochs_of_another_length_come_to_the_end(model_folder, finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    more = BATCHES | {"max_train_steps": 6, "gradient_accumulation_steps": 2}
    add_epoch, epochs = RunReport.add_epoch, []

    def watched(report, metrics, scores, seconds_left):
        epochs.append((metrics["step"], seconds_left))
        add_epoch(report, metrics, scores, seconds_left)

    monkeypatch.setattr(RunReport, "add_epoch", watched)
    results, _ = resume(model_folder, folder, **more)
    assert [step for step, _ in epochs] == [4, 6] and epochs[0][1] > 0 == epochs[1][1]
    assert results["num_samples"] == 2 * 4 + 2 * 8  # two epochs each


@pytest.mark.parametrize(
    ("step", "batches", "accumulation", "steps", "fits"), [(3, 6, 3, 4, "6"), (6, 8, 2, 8, "4 or 8")]
)
def test_what_would_do_is_named(step, batches, accumulation, steps, fits):
    config = NFTConfig(
        batches_per_epoch=batches, gradient_accumulation_steps=accumulation, max_train_steps=steps, train_batch_size=24
    )
    with pytest.raises(UserError, match=f"gradient_accumulation_steps can be {fits}\\.$"):
        config.check_resumed(step, "checkpoint-3")
    for other in map(int, fits.split(" or ")):
        replace(config, gradient_accumulation_steps=other, num_train_epochs=100).check_resumed(step, "checkpoint-3")
    config.check_resumed(steps + 1, "checkpoint-9")  # it is done

"""A run from Python: functions, objects and names as rewards, prompts from lists, callbacks."""

import json
import math
import signal
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset, DatasetDict
from diffusers import DiffusionPipeline, WanPipeline
from safetensors.torch import load_file

from astrolabe_diffusers.errors import Interrupted, UserError
from astrolabe_diffusers.rewards import Reward, RewardOutput
from astrolabe_diffusers.training import NFTConfig, NFTTrainer, TrainerCallback
from astrolabe_diffusers.training.build import name_rewards
from tests.training.helpers import BRIGHTNESS, tiny_settings
from tests.training.rewards import brightness


pytestmark = pytest.mark.usefixtures("no_charts")


PROMPTS = [f"a {color} circle moves left on a black background" for color in ("red", "green", "blue", "white")]


def red(videos, prompts, metadata):
    return videos[:, :, 0].mean(dim=(1, 2, 3))


class Darkness(Reward):
    def score(self, videos, prompts, metadata=None):
        return RewardOutput(1 - videos.flatten(1).mean(1))


def settings(model_folder, folder, **values):
    lean = {"num_frames": 9, "eval_rewards": [], "checkpointing_steps": 1}
    values = tiny_settings(model_folder, folder, **lean | values)
    values.pop("rewards")
    return values


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Recorder(TrainerCallback):
    def __init__(self):
        self.calls = []

    def on_epoch_end(self, trainer, metrics):
        self.calls.append(("epoch", metrics["step"]))
        return {"twice_the_reward": 2 * metrics["reward"]}

    def on_evaluate(self, trainer, evaluation):
        self.calls.append(("evaluation", evaluation.step))

    def on_checkpoint(self, trainer, path):
        self.calls.append(("checkpoint", path.name))

    def on_train_end(self, trainer, results):
        self.calls.append(("end", results["steps"]))


def test_a_run_from_python(model_folder, tmp_path):
    pipeline, recorder = DiffusionPipeline.from_pretrained(model_folder), Recorder()
    config = NFTConfig(**settings(model_folder, tmp_path), rewards={"red": 0.5})
    trainer = NFTTrainer(
        pipeline,
        config,
        reward_funcs=[red, BRIGHTNESS, Darkness()],
        train_prompts=PROMPTS,
        eval_prompts=[{"prompt": PROMPTS[3], "number": 7}],
        callbacks=[recorder],
    )
    # The weight of a name is the settings', and 1 without one.
    assert trainer.config.rewards == {"red": 0.5, BRIGHTNESS: 1.0, "darkness": 1.0}
    assert [p.text for p in trainer.prompts] == PROMPTS[:3]  # what is held out is not trained on
    assert trainer.eval_prompts[0].metadata == {"number": 7}
    results = trainer.train()
    assert set(results["scores"]) >= {"reward", "red", BRIGHTNESS, "darkness"}
    for metrics in metrics_of(tmp_path):
        assert metrics["darkness"] == pytest.approx(1 - metrics[BRIGHTNESS], abs=1e-5)
        assert metrics["reward"] == pytest.approx(0.5 * metrics["red"] + 1, abs=1e-5)
        assert metrics["twice_the_reward"] == 2 * metrics["reward"]
    assert recorder.calls == [
        ("evaluation", 0),
        ("epoch", 1),
        ("checkpoint", "checkpoint-1"),
        ("epoch", 2),
        ("evaluation", 2),
        ("checkpoint", "checkpoint-2"),
        ("end", 2),
    ]


def test_function_and_name_train_the_same(model_folder, tmp_path):
    """The dotted path of a function and the function itself, a dataset and the file: one run."""
    adapters, dataset = [], Dataset.from_dict({"prompt": PROMPTS})
    for folder, reward, prompts in (("a", brightness, None), ("b", BRIGHTNESS, dataset)):
        config = NFTConfig(**settings(model_folder, tmp_path / folder, num_eval_prompts=2))
        if prompts is None:
            (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
            config.prompts = str(tmp_path / "prompts.txt")
        NFTTrainer(str(model_folder), config, reward_funcs=[reward], train_prompts=prompts).train()
        adapters.append(load_file(tmp_path / folder / "pytorch_lora_weights.safetensors"))
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reward_funcs": [red, red]}, "two rewards are called 'red'"),
        ({"reward_funcs": [red, red]}, "^reward_funcs: two rewards"),
        ({"reward_funcs": []}, "rewards is empty"),
        ({"reward_funcs": {"sharpness": 0.5}}, "^reward_funcs: .*'sharpness': 0.5.* is neither a name,"),
        ({"reward_funcs": "sharpnes"}, r"'sharpnes' \(did you mean sharpness\?\)"),
        ({"train_prompts": []}, "no prompts"),
        ({"train_prompts": PROMPTS, "eval_prompts": [5]}, "prompt 0 of eval_prompts must be a text"),
        ({"train_prompts": PROMPTS[0]}, "is no prompt file, has no train.txt, and cannot be loaded as a dataset"),
        ({"train_prompts": PROMPTS, "eval_prompts": PROMPTS[0]}, "is no prompt file, has no test.txt, and cannot be "),
        ({"train_prompts": PROMPTS[:2]}, "has 2 different prompts, but num_eval_prompts=2"),
        ({"eval_prompts": PROMPTS}, "go with train_prompts"),
        ({"model": "/no/model"}, "no folder /no/model/prompts"),
    ],
)
def test_mistakes_are_one_line(model_folder, tmp_path, arguments, words):
    arguments = {"config": NFTConfig(**settings(model_folder, tmp_path)), **arguments}
    with pytest.raises(UserError, match=words) as error:
        NFTTrainer(**arguments)
    assert "\n" not in str(error.value)


def test_one_held_out_video_has_no_interval(model_folder, tmp_path):
    config = NFTConfig(**settings(model_folder, tmp_path, num_eval_prompts=1))
    results = NFTTrainer(config=config, reward_funcs=[red]).train()
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    reward = results["scores"]["reward"]
    assert math.isnan(reward["half_width_95"])
    assert written["scores"]["reward"] == reward | {"half_width_95": None}
    card = (tmp_path / "README.md").read_text()
    assert "nan" not in card and f"was trained on changed**: reward {reward['change']:+.4f}." in card


class Interrupting(TrainerCallback):
    def on_epoch_end(self, trainer, metrics):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("callbacks", [[], [Interrupting()]])
def test_a_trainer_trains_once(model_folder, tmp_path, callbacks):
    """After its end, and after an interruption; what it has written stays."""
    config = NFTConfig(**settings(model_folder, tmp_path, overwrite_output_dir=True))
    trainer = NFTTrainer(config=config, reward_funcs=[red], callbacks=callbacks)
    with pytest.raises(Interrupted) if callbacks else nullcontext():
        trainer.train()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="trains once: make another one, which with resume_from_checkpoint") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="the rewards are closed"):
        trainer.evaluate()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    again = NFTConfig(**settings(model_folder, tmp_path, resume_from_checkpoint="latest"))
    assert NFTTrainer(config=again, reward_funcs=[red]).train()["steps"] == 2


@pytest.mark.parametrize("first", [0.1, math.nan])
def test_the_best_adapter_is_kept(model_folder, tmp_path, first):
    """Of evaluations whose results are set; one without a finite reward is none."""
    scores = iter([first, 0.5, 0.3, 0.4])

    config = NFTConfig(**settings(model_folder, tmp_path, max_train_steps=3, eval_steps=1))
    trainer = NFTTrainer(config=config, reward_funcs=[red])
    offer = trainer.best.offer

    def scripted(evaluation):
        evaluation.scores["reward"] = [next(scores)]
        offer(evaluation)

    trainer.best.offer = scripted
    results = trainer.train()
    assert results["best"] == {"step": 1, "reward": 0.5}
    best = load_file(tmp_path / "best" / "pytorch_lora_weights.safetensors")
    saved = {n: load_file(tmp_path / f"checkpoints/checkpoint-{n}/pytorch_lora_weights.safetensors") for n in (1, 3)}
    assert all(torch.equal(value, saved[1][name]) for name, value in best.items())
    assert any(not torch.equal(value, saved[3][name]) for name, value in best.items())
    pipe = DiffusionPipeline.from_pretrained(model_folder)
    pipe.load_lora_weights(tmp_path / "best")


@pytest.mark.parametrize(
    ("reward", "name"), [(red, "red"), (Darkness(), "darkness"), (Darkness, "darkness"), (BRIGHTNESS, BRIGHTNESS)]
)
def test_a_single_reward_needs_no_list(reward, name):
    config, named = name_rewards(NFTConfig(rewards={"sharpness": 0.5, "red": 2.0}), reward)
    assert config.rewards == {name: 2.0 if name == "red" else 1.0} and named == {name: reward}


def test_splits_and_a_column_of_their_own(model_folder, tmp_path):
    def split(prompts):
        return Dataset.from_dict({"text": ["wrong"] * len(prompts), "caption": prompts})

    config = NFTConfig(**settings(model_folder, tmp_path, prompt_column="caption"))
    given = DatasetDict(train=split(PROMPTS[:2]), test=split(PROMPTS[2:]))
    trainer = NFTTrainer(config=config, reward_funcs=red, train_prompts=given)
    assert trainer.config.rewards == {"red": 1.0}
    assert [prompt.text for prompt in trainer.prompts] == PROMPTS[:2]
    assert [sample.prompt.text for sample in trainer.held_out.samples] == PROMPTS[2:]
    trainer.end()


def test_a_pipeline_with_loras_is_refused(model_folder, tmp_path):
    """That of an earlier trainer too; what the error says helps."""

    def trainer(pipeline, name):
        config = NFTConfig(**settings(model_folder, tmp_path / name))
        return NFTTrainer(pipeline, config, reward_funcs=red, train_prompts=PROMPTS, eval_prompts=PROMPTS[:1])

    def video(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline(PROMPTS[0], num_frames=9, generator=generator, output_type="latent").frames

    pipeline = DiffusionPipeline.from_pretrained(model_folder)
    base = video(pipeline)
    trainer(pipeline, "first").train()
    trained = video(pipeline)
    assert not torch.equal(base, trained)
    with pytest.raises(UserError, match=r"LoRAs \(default, old\): unload_lora_weights\(\) first.*init_lora") as error:
        trainer(pipeline, "second")
    assert "\n" not in str(error.value)

    loaded = DiffusionPipeline.from_pretrained(model_folder)
    loaded.load_lora_weights(tmp_path / "first")
    for values in ({}, {"init_lora": str(tmp_path / "first")}):
        config = NFTConfig(**settings(model_folder, tmp_path / "third", **values))
        with pytest.raises(UserError, match=r"the pipeline has LoRAs \(default_0\)"):
            NFTTrainer(loaded, config, reward_funcs=red, train_prompts=PROMPTS, eval_prompts=PROMPTS[:1])
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    fused = video(loaded)
    torch.testing.assert_close(fused, trained, atol=1e-4, rtol=0)
    # B starts at zero: its policies are the model that it was given.
    again = trainer(loaded, "third")
    assert torch.equal(video(again.pipeline), fused)
    again.end()


def test_a_pipeline_that_lacks_something(model_folder, tmp_path):
    def error_of(pipeline, **values):
        config = NFTConfig(**settings(model_folder, tmp_path, **values))
        with pytest.raises(UserError) as error:
            NFTTrainer(pipeline, config, reward_funcs=red, train_prompts=PROMPTS)
        assert "\n" not in str(error.value) and "prompt_embeds`" not in str(error.value)
        return str(error.value)

    pipeline = DiffusionPipeline.from_pretrained(model_folder, text_encoder=None, tokenizer=None)
    assert "loaded without tokenizer and text_encoder: load it with them" in error_of(pipeline)
    # Left out for the sake of this setting, maybe.
    assert "give the model as a folder" in error_of(pipeline, prompt_embeds_dir=tmp_path / "embeds")
    pipeline = DiffusionPipeline.from_pretrained(model_folder, vae=None)
    assert "loaded without vae" in error_of(pipeline)
    stock = WanPipeline(pipeline.tokenizer, pipeline.text_encoder, None, pipeline.scheduler)
    assert "must be a CausalWanPipeline, or folder or Hub id of one, not a WanPipeline" in error_of(stock)

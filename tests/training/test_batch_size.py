"""`train_batch_size` `auto`, with memory that is made up."""

import json
import time
import weakref

import pytest
import torch
import yaml

from astrolabe_diffusers.cli.train import parse_args
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.training import NFTConfig, NFTTrainer, batch_size
from astrolabe_diffusers.training.algorithms import get_algorithm
from tests.processes import Torchrun
from tests.training.helpers import BRIGHTNESS, numbers_of_run, tiny_arguments
from tests.training.memory import limit_batches


pytestmark = pytest.mark.usefixtures("no_charts")

# Short videos, so many an epoch and a step, and settings that draw random numbers and have a state.
AUTO = dict(train_batch_size="auto", batches_per_epoch=8, gradient_accumulation_steps=8)
AUTO |= dict(num_frames=9, lora_dropout=0.1)
FOUR = AUTO | dict(train_batch_size=4, batches_per_epoch=2, gradient_accumulation_steps=2)
SELECTIVE = dict(selective_kl="true", rewards=f"{BRIGHTNESS}=1,tests.training.rewards:contrast=0", eval_rewards="")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(batch_size, "says_when_memory_is_full", lambda device: True)


def make_trainer(model_folder, folder, limit=100, algorithm="nft", **values):
    arguments = tiny_arguments(model_folder, folder, algorithm=algorithm, **values)
    trainer = get_algorithm(algorithm)(config=parse_args(arguments))
    return trainer, limit_batches(trainer.transformer, limit)


@pytest.mark.parametrize(
    ("algorithm", "values"),
    [
        ("nft", {}),
        ("nft", SELECTIVE),
        ("nft", {"window_size": 3, "sample_frames": 9, "eval_num_frames": 9}),
        ("awm", {}),
        ("cm_grpo", {}),
        ("tests.training.step_policy_gradient:StepPolicyGradient", {}),  # with a trajectory
    ],
)
def test_a_run_that_finds_four_is_the_run_with_four(algorithm, values, model_folder, tmp_path, gpu, capsys):
    values = {"algorithm": algorithm, **values}
    make_trainer(model_folder, tmp_path / "four", **FOUR | values)[0].train()
    trainer, tried = make_trainer(model_folder, tmp_path / "auto", limit=4, **AUTO | values)
    trainer.train()
    assert max(tried) == 8
    assert numbers_of_run(tmp_path / "auto") == numbers_of_run(tmp_path / "four")
    written = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("four", "auto")]
    assert written[0] | {"output_dir": None} == written[1] | {"output_dir": None}
    line = "train_batch_size auto: 4, the largest of 1, 2, 4, 8 that fits; 2 batches an epoch, 2 a step on each device"
    assert capsys.readouterr().out.count(line) == 1


def test_with_a_shared_past_a_batch_is_of_one_group(model_folder, tmp_path, gpu):
    values = dict(window_size=3, sample_frames=9, shared_past="true")
    trainer, tried = make_trainer(model_folder, tmp_path, limit=2, **AUTO | values)
    trainer.train()
    assert trainer.config.train_batch_size == 2 and max(tried) == 4  # of 8 videos, in groups of 4


def test_the_trial_leaves_nothing(model_folder, tmp_path, gpu):
    trainer, _ = make_trainer(model_folder, tmp_path, limit=2, **AUTO | SELECTIVE)
    weights = {name: tensor.clone() for name, tensor in trainer.transformer.state_dict().items()}
    states, random, training = trainer.state(), torch.get_rng_state(), trainer.transformer.training
    batch_size.set_batch_size(trainer, None)
    assert trainer.config.train_batch_size == trainer.held_out.batch_size == 2
    assert trainer.state() == states and torch.equal(torch.get_rng_state(), random)
    assert trainer.transformer.training == training and not trainer.optimizer.state
    assert all(parameter.grad is None for parameter in trainer.transformer.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.transformer.state_dict().items())
    trainer.end()


def test_a_resumed_run_has_the_size_of_its_checkpoint(model_folder, tmp_path, gpu, monkeypatch, capsys):
    """Whatever memory there is then."""
    make_trainer(model_folder, tmp_path / "whole", **FOUR | dict(max_train_steps=4))[0].train()
    make_trainer(model_folder, tmp_path / "run", limit=4, **AUTO | dict(max_train_steps=2))[0].train()
    monkeypatch.setattr(batch_size, "_largest", lambda *_: pytest.fail("memory was looked at"))
    again = dict(max_train_steps=4, resume_from_checkpoint="latest")
    make_trainer(model_folder, tmp_path / "run", **AUTO | again)[0].train()
    assert numbers_of_run(tmp_path / "run") == numbers_of_run(tmp_path / "whole")
    assert "train_batch_size auto: 4, as checkpoint-2 has it" in capsys.readouterr().out


def test_processes_agree_on_the_smallest(model_folder, tmp_path):
    values = dict(train_batch_size="auto", batches_per_epoch=4, num_frames=9, max_train_steps=1)
    arguments = tiny_arguments(model_folder, tmp_path / "run", **values)
    code, output = Torchrun("tests/training/batch_size_worker.py", tmp_path, *arguments).finish()
    assert code == 0, output
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks == [{"found": [1, 4, 4], "tried": [1, 2, 4]}] * 2


def hungry(videos, prompts, metadata):
    if len(videos) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    return videos.flatten(1).mean(1), None


@pytest.mark.parametrize("watched", [False, True])
def test_rewards_and_the_decoder_need_memory_too(watched, model_folder, tmp_path, gpu):
    rewards = {"eval_rewards" if watched else "rewards": f"{__name__}:hungry"}
    # Batches of an evaluation are those of training, as far as there are videos.
    trainer, _ = make_trainer(model_folder, tmp_path, num_eval_prompts=4, **AUTO | rewards)
    trainer.start()
    assert trainer.config.train_batch_size == 2
    trainer.end()


def slow(videos, prompts, metadata):
    BUSY.append((len(videos), weakref.ref(videos)))
    time.sleep(1 if len(videos) > 4 else 0)
    return hungry(videos, prompts, metadata) if HUNGRY else (videos.flatten(1).mean(1), None)


BUSY, HUNGRY = [], []


@pytest.mark.parametrize("hungry", [False, True])
def test_a_trial_begins_with_nothing_of_the_one_before(hungry, model_folder, tmp_path, gpu, monkeypatch):
    """Neither a batch that is scored when sampling the next one fails, nor what a reward that failed was given."""
    BUSY.clear()
    HUNGRY[:] = [True] * hungry
    begin, alive = batch_size._try, []

    def trial(*args):
        alive.extend(videos for _, ref in BUSY if (videos := ref()) is not None)
        return begin(*args)

    monkeypatch.setattr(batch_size, "_try", trial)
    trainer, _ = make_trainer(model_folder, tmp_path, rewards=f"{__name__}:slow", **AUTO | dict(batches_per_epoch=16))

    def fills_up(_, args):  # with the second batch of eight, while the first is scored
        if hungry or len(args[0]) <= 4 or torch.is_grad_enabled():
            return
        time.sleep(0.1)
        if any(size > 4 for size, _ in BUSY):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    trainer.transformer.register_forward_pre_hook(fills_up)
    trainer.start()
    assert BUSY and not alive and trainer.config.train_batch_size == (2 if hungry else 4)
    trainer.end()


def test_not_even_one_fits(model_folder, tmp_path, gpu):
    trainer, _ = make_trainer(model_folder, tmp_path, **AUTO)
    limit_batches(trainer.transformer, 0)
    with pytest.raises(UserError, match="not even a batch of one video fits"):
        trainer.train()


def test_another_error_is_no_lack_of_memory(model_folder, tmp_path, gpu):
    trainer, _ = make_trainer(model_folder, tmp_path, **AUTO | {"rewards": "tests.training.rewards:broken"})
    with pytest.raises(UserError, match="a reward failed"):
        trainer.train()


def test_a_cpu_is_told_at_once(tmp_path):
    config = NFTConfig(model="nothing is loaded", output_dir=str(tmp_path / "run"), train_batch_size="auto")
    with pytest.raises(UserError, match="train_batch_size=auto needs a GPU"):
        NFTTrainer(config=config)


def test_sizes():
    """Divisors of a step's videos, and with a shared past of a group's."""
    values = dict(train_batch_size="auto", samples_per_prompt=8, batches_per_epoch=24, gradient_accumulation_steps=12)
    assert NFTConfig(**values).batch_sizes() == [12, 6, 4, 3, 2, 1]
    assert NFTConfig(**values, shared_past=True, window_size=3).batch_sizes() == [4, 2, 1]
    config = NFTConfig(**values)
    groups = config.groups_per_epoch(num_processes=2)
    for size in (6, 4, 1, 3):
        config.set_batch_size(size)
        assert (config.batches_per_epoch, config.gradient_accumulation_steps) == (24 // size, 12 // size)
        assert config.groups_per_epoch(num_processes=2) == groups == 6 and config.steps_per_epoch == 2
    with pytest.raises(UserError, match="1 process x train_batch_size auto x batches_per_epoch 6 videos = 6 samples"):
        NFTConfig(**values | dict(batches_per_epoch=6, gradient_accumulation_steps=6)).groups_per_epoch(1)
    with pytest.raises(UserError, match="kl_average=batch"):
        NFTConfig(**values, selective_kl=True, kl_average="batch", rewards={"sharpness": 1, "flicker": 0})
    with pytest.raises(UserError, match="train_batch_size must be a whole number or auto, not 'automatic'"):
        NFTConfig(train_batch_size="automatic")


@pytest.mark.parametrize("recipe", [[], ["--config", "tiny_shapes", "--trained_fraction", "1"]])
def test_a_recipe_and_the_defaults_keep_their_samples(recipe):
    written, auto = parse_args(recipe), parse_args([*recipe, "--train_batch_size", "auto"])
    assert auto.train_batch_size == "auto"
    assert auto.batches_per_epoch == written.train_batch_size * written.batches_per_epoch
    assert (auto.groups_per_epoch(8), auto.steps_per_epoch) == (written.groups_per_epoch(8), written.steps_per_epoch)
    # What the command line counts are videos already.
    given = parse_args([*recipe, "--train_batch_size", "auto", "--batches_per_epoch", "48"])
    assert given.batches_per_epoch == 48


def test_a_published_run_keeps_its_samples(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    run = ["--config", "longlive_video_hpsv3", "--prompts", "mine.txt"]
    published, auto = parse_args(run), parse_args([*run, "--train_batch_size", "auto"])
    assert auto.train_batch_size == "auto"
    assert auto.batches_per_epoch == published.train_batch_size * published.batches_per_epoch
    assert auto.groups_per_epoch(8) == published.groups_per_epoch(8)
    assert ": batches as large as fit, groups of " in capsys.readouterr().out

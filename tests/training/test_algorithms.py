"""Algorithms other than NFT: the page about them, followed to the letter, and one that trains the sampler's steps."""

import json
import re
from pathlib import Path

import pytest
import torch

from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.sampling import PromptEncoder, SharedPastSampler
from astrolabe_diffusers.training import NFTTrainer, OnlineConfig, get_algorithm
from astrolabe_diffusers.training.policies import policy_parameters, use_policy
from tests.training.helpers import SIZE, make_samples, policy_pipeline, randomize_adapters, tiny_settings
from tests.training.step_policy_gradient import StepPolicyGradient, step_batch, step_losses


pytestmark = pytest.mark.usefixtures("no_charts")


PAGE = Path(__file__).parents[2] / "docs" / "customise_algorithm.md"


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_page_s_algorithm_trains(model_folder, tmp_path, monkeypatch):
    code, in_python = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "best_of_group.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    trainer_class = get_algorithm("best_of_group:BestOfGroupTrainer")
    assert trainer_class.__name__ in in_python and trainer_class.config_class.__name__ in in_python
    settings = tiny_settings(model_folder, tmp_path / "run", eval_rewards=[])
    config = trainer_class.config_class(**settings, margin=0.1)
    results = trainer_class(config=config).train()
    assert results["steps"] == 2 and (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    for metrics in metrics_of(tmp_path / "run"):
        assert 0 < metrics["good_samples"] < 1 and metrics["grad_norm"] > 0 and metrics["distance"] > metrics["loss"]
    assert "Best of group" in (tmp_path / "run" / "README.md").read_text()


@pytest.fixture(scope="module")
def stepwise(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stepwise")
    trainer = StepPolicyGradient(config=OnlineConfig(**tiny_settings(model_folder, folder, eval_rewards=[])))
    randomize_adapters(trainer.transformer)
    trainer.start()
    samples = trainer.held_out.samples[:2]
    batch = trainer.rollout(samples)[0]
    yield trainer, batch
    trainer.resources.close()


def test_trajectory_is_how_the_sampler_went(stepwise):
    """From the kept latents the sampler's own rule, in plain code, comes to the video."""
    trainer, batch = stepwise
    trajectory = batch.trajectory
    assert [len(block) for block in trajectory.latents] == [5, 5] and [len(t) for t in trajectory.timesteps] == [4, 4]
    assert torch.equal(torch.cat([block[-1] for block in trajectory.latents], dim=2), batch.latents)
    prepared = step_batch(batch, torch.tensor([1.0, -1.0]))
    with torch.no_grad():
        losses = list(step_losses(trainer.transformer, prepared, trainer.transformer))
    assert len(losses) == 6
    # The error of each step is the noise that was drawn: half its mean square is near 1/2.
    assert torch.stack(losses).mean().item() == pytest.approx(0.5, abs=0.05)


def test_gradient_of_the_steps_by_finite_differences(stepwise):
    trainer, batch = stepwise
    prepared = step_batch(batch, torch.tensor([1.0, -0.5]))
    # The first block alone: what later ones see of it carries no gradient.
    prepared.latents, prepared.timesteps = prepared.latents[:1], prepared.timesteps[:1]
    prepared.clean = prepared.clean[:, :, :3]
    parameters = policy_parameters(trainer.transformer)
    trainer.optimizer.zero_grad()
    trainer.accumulate(prepared, 2)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions)).double()
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3, 1e-3):
            for parameter, direction in zip(parameters, directions):
                parameter.add_(step * direction)
            losses = step_losses(trainer.transformer, prepared, trainer.transformer)
            values.append(sum((prepared.advantages * loss).sum().double() for loss in losses) / 2)
    trainer.optimizer.zero_grad()
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-3, rtol=3e-2, atol=0)


def test_the_steps_are_trained(model_folder, tmp_path):
    config = OnlineConfig(**tiny_settings(model_folder, tmp_path, eval_rewards=[]))
    StepPolicyGradient(config=config).train()
    assert all(metrics["grad_norm"] > 0 for metrics in metrics_of(tmp_path))


def test_trajectory_of_a_window_with_a_shared_past():
    pipe = policy_pipeline()
    sampler = SharedPastSampler(pipe, SIZE, keep_trajectory=True, num_past_frames=3)
    samples = make_samples(2)
    with use_policy(pipe.transformer, "current"):
        latents, trajectory = sampler(PromptEncoder(pipe)([samples[0].prompt.text] * 2), samples)
    assert [len(block) for block in trajectory.latents] == [5] and len(trajectory.timesteps[0]) == 4
    assert torch.equal(trajectory.latents[0][-1], latents[:, :, 3:])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ntf", "did you mean nft"),
        ("no.such.module:Trainer", "no module no"),
        ("astrolabe_diffusers.training.nft:Nothing", "has no OnlineTrainer Nothing"),
    ],
)
def test_unknown_algorithms(name, words):
    with pytest.raises(UserError, match=words):
        get_algorithm(name)


def test_known_algorithms():
    assert get_algorithm("nft") is NFTTrainer
    assert get_algorithm("AWM").config_class.algorithm == "AWM"

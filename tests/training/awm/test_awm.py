import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from astrolabe_diffusers.training.awm import AWMConfig, AWMTrainer
from astrolabe_diffusers.training.awm.trainer import AWMBatch, accumulate_gradients, awm_loss
from astrolabe_diffusers.training.nft import NFTConfig
from astrolabe_diffusers.training.nft.loss import optimality
from astrolabe_diffusers.training.nft.trainer import accumulate_gradients as accumulate_nft_gradients
from astrolabe_diffusers.training.policies import OLD, follow_current, policy_parameters, use_policy
from tests.training.helpers import BRIGHTNESS, noised_batch, policy_pipeline, tiny_settings


ADVANTAGES = torch.tensor([1.5, -0.7])


def config(**values):
    return AWMConfig(**{"rewards": {BRIGHTNESS: 1.0}, "kl_weight": 0.3, "blocks_per_pass": 7, **values})


def awm_batch(pipe, frames=6):
    values = vars(noised_batch(pipe, frames=frames))
    shared = {name: values[name] for name in ("clean", "noisy", "sigma", "timestep", "prompt_embeds", "pipeline")}
    return AWMBatch(**shared, advantages=ADVANTAGES)


def flow(transformer, batch):
    """One pass over clean and noisy blocks, without a cache."""
    return transformer(batch.noisy, batch.timestep, batch.prompt_embeds, clean_hidden_states=batch.clean).sample


def plain_loss(transformer, batch, cfg):
    """The paper's loss on flows, in plain code: `A |v - (eps - x_0)|^2`, and the KL to the model alone."""
    with use_policy(transformer, "base"):
        base = flow(transformer, batch)
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    target = (batch.noisy - batch.clean) / sigma  # x_t - x_0 = s (eps - x_0)
    v = flow(transformer, batch)
    matching = (v - target).square().flatten(1).mean(1)
    kl = (v - base).square().flatten(1).mean(1)
    return (batch.advantages * matching + cfg.kl_weight * kl).mean()


def test_loss_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    prediction, clean = torch.randn(2, 2, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    for i, loss in enumerate(awm_loss(prediction, clean, ADVANTAGES.double())):
        expected = ADVANTAGES[i].double().item() * np.mean((prediction[i].numpy() - clean[i].numpy()) ** 2)
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_gradient_by_finite_differences(kl_weight):
    """With one block there is no context, which is held constant, and the loss is a plain function of the LoRA."""
    pipe, cfg = policy_pipeline(), config(kl_weight=kl_weight)
    batch, parameters = awm_batch(pipe, frames=3), policy_parameters(pipe.transformer)
    sums = accumulate_gradients(Accelerator(mixed_precision="no"), pipe.transformer, batch, cfg, 2, True)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions)).double()
    values = []
    with torch.no_grad():
        torch.testing.assert_close(sums["loss"] / 2, plain_loss(pipe.transformer, batch, cfg), rtol=1e-5, atol=1e-6)
        for step in (1e-3, -2e-3):
            for parameter, direction in zip(parameters, directions):
                parameter.add_(step * direction)
            values.append(plain_loss(pipe.transformer, batch, cfg).double())
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-3, rtol=2e-2, atol=0)


def test_gradient_is_that_of_nft_where_the_old_policy_is_the_current_one():
    """But for the scale of the advantages and of the distances: `(2 r - 1) beta` of NFT's is `A beta / A_max`."""
    pipe, limit, beta = policy_pipeline(), 5.0, 0.7
    batch, parameters = awm_batch(pipe), policy_parameters(pipe.transformer)
    follow_current(pipe.transformer, OLD, decay=0.0)
    accelerator = Accelerator(mixed_precision="no")
    accumulate_gradients(accelerator, pipe.transformer, batch, config(kl_weight=0.0), 2, True)
    expected = [parameter.grad.clone() for parameter in parameters]
    pipe.transformer.zero_grad()
    nft_batch = replace(
        noised_batch(pipe),
        optimality=optimality(ADVANTAGES, limit),
        weight=limit / beta / batch.sigma.square(),
        old_is_current=True,
    )
    cfg = NFTConfig(rewards={BRIGHTNESS: 1.0}, beta=beta, kl_weight=0.0)
    accumulate_nft_gradients(accelerator, pipe.transformer, nft_batch, cfg, 2, True)
    torch.testing.assert_close([p.grad for p in parameters], expected, rtol=1e-4, atol=1e-7)


def test_a_run(model_folder, tmp_path):
    """From the command line's settings to the adapter; no adapter of an old policy is made."""
    trainer = AWMTrainer(config=AWMConfig(**tiny_settings(model_folder, tmp_path, train_steps=[1])))
    assert list(trainer.transformer.peft_config) == ["default"]
    results = trainer.train()
    assert trainer.sigmas.tolist() == [0.9375]
    assert results["steps"] == 2
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["grad_norm"] > 0 and np.isfinite(record["loss"]) for record in metrics)
    assert "AWM" in (tmp_path / "README.md").read_text()

"""What each of two processes does for test_distributed.py; started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from astrolabe_diffusers.distributed.agreement import raise_together
from astrolabe_diffusers.errors import UserError
from astrolabe_diffusers.rollout.samples import process_batches
from astrolabe_diffusers.rollout.sampling import Rollout
from astrolabe_diffusers.rollout.scoring import gather_scores
from astrolabe_diffusers.training.checkpoints import Checkpoints, policy_identity
from astrolabe_diffusers.training.forward_process.noising import noise_batch
from astrolabe_diffusers.training.nft.loss import optimality
from astrolabe_diffusers.training.nft.trainer import NFTBatch, accumulate_gradients
from astrolabe_diffusers.training.policies import CURRENT, policy_parameters, use_policy
from tests.training.helpers import BRIGHTNESS, config, make_samples, policy_pipeline, reward_worker


MODEL = {"num_layers": 1, "vae_num_res_blocks": 0, "target_modules": ["all-linear"]}
# Three blocks, which are two passes: only the second one synchronises.
SIZE = {"height": 16, "width": 32, "num_frames": 33}
CONFIG = config(blocks_per_pass=2)
SAMPLES = make_samples(8, group_size=4)
SIGMAS = torch.tensor([1.0, 0.9375, 0.8333, 0.625])
ADVANTAGES = torch.linspace(-3, 3, 8)
BROKEN = "tests.training.rewards:broken"


def nft_batch(batch, advantages):
    weights = torch.ones(len(advantages))
    values = {"optimality": optimality(advantages, 5.0), "weight": weights, "kl_weight": weights}
    return NFTBatch(**vars(noise_batch(batch, SIGMAS)), **values)


def rollout_and_gradients(accelerator, batch_size: int, rewards: str = BRIGHTNESS):
    """Scores of all samples and this process's gradients after all of its batches."""
    pipe = policy_pipeline(**MODEL)
    pipe.transformer.set_adapter(CURRENT)
    model = accelerator.prepare(pipe.transformer)
    worker = reward_worker(pipe, rewards)

    def split(items):
        return process_batches(items, batch_size, accelerator.process_index, accelerator.num_processes)

    with raise_together(), use_policy(pipe.transformer, "old"):
        batches = list(Rollout(pipe, worker).generate(split(SAMPLES), SIZE))
    scores, _ = gather_scores(batches, SAMPLES)
    count = sum(len(batch.samples) for batch in batches)
    for i, (batch, advantages) in enumerate(zip(batches, split(ADVANTAGES))):
        noised = nft_batch(batch, advantages)
        accumulate_gradients(accelerator, model, noised, CONFIG, count, synchronize=i == len(batches) - 1)
    worker.close()
    return pipe.transformer, scores, [p.grad.clone() for p in policy_parameters(pipe.transformer)]


def gradients_without_synchronisation(accelerator, batch_size: int):
    """The same with the model wrapped while the old policy was active: what DDP then does not do, silently."""
    pipe = policy_pipeline(**MODEL)
    pipe.transformer.set_adapter("old")
    model = accelerator.prepare(pipe.transformer)
    pipe.transformer.set_adapter(CURRENT)
    worker = reward_worker(pipe)
    with use_policy(pipe.transformer, "old"):
        batches = process_batches(SAMPLES, batch_size, accelerator.process_index, accelerator.num_processes)
        batch = next(Rollout(pipe, worker).generate(batches, SIZE))
    worker.close()
    noised = nft_batch(batch, torch.ones(batch_size))
    accumulate_gradients(accelerator, model, noised, CONFIG, batch_size, synchronize=True)
    return [p.grad.clone() for p in policy_parameters(pipe.transformer)]


def main(folder: Path):
    accelerator = Accelerator(mixed_precision="no")
    transformer, scores, gradients = rollout_and_gradients(accelerator, batch_size=2)
    settings = config(output_dir=folder, checkpoints_total_limit=1)
    optimizer = torch.optim.AdamW(policy_parameters(transformer))
    checkpoints = Checkpoints(transformer, optimizer, settings, policy_identity(transformer))
    checkpoint = checkpoints.save(1, {"step": 1})

    # A reward that fails on the second process only.
    try:
        rollout_and_gradients(accelerator, 2, BROKEN if accelerator.process_index else BRIGHTNESS)
        error = None
    except UserError as failure:
        error = str(failure)

    result = {
        "world_size": accelerator.num_processes,
        "scores": scores,
        "gradients": gradients,
        "wrapped_wrongly": gradients_without_synchronisation(accelerator, 2),
        "checkpoint": sorted(path.name for path in checkpoint.iterdir()),
        "error": error,
    }
    torch.save(result, folder / f"rank{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    # As NFTTrainer.end.
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What each of two processes does for test_experts.py; started by torchrun."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from astrolabe_diffusers.training.awm.trainer import accumulate_gradients
from astrolabe_diffusers.training.build import make_accelerator
from tests.training.forward_process.test_experts import BOTH, awm, awm_batch, policy_pair


def main(folder: str):
    cfg = awm("clean_grad", lora_expert="both", output_dir=folder, report_to="none", mixed_precision="no")
    accelerator = make_accelerator(cfg)
    pipe = policy_pair(BOTH)
    model = accelerator.prepare(pipe.denoiser)
    batch, rank = awm_batch(pipe), accelerator.process_index
    mine = {name: value[rank : rank + 1] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    # Twice, as DDP says only in the next pass that a parameter had no gradient in the last one.
    for _ in range(2):
        model.zero_grad()
        accumulate_gradients(accelerator, model, replace(batch, **mine), cfg, 1, True)
    gradients = {name: p.grad for name, p in pipe.denoiser.named_parameters() if ".default." in name}
    torch.save(gradients, Path(folder) / f"rank{rank}.pt")
    # DDP has to go before the process group, as at a trainer's end: it hung here now and then.
    del model
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])

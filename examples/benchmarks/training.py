"""Measures an epoch of training on this machine, at full size with random weights and a reward that costs nothing.

    accelerate launch -q --config_file accelerate_configs/1gpu.yaml examples/benchmarks/training.py \\
        --recipe self-forcing --samples_per_prompt 8 --train_batch_size 4 --batches_per_epoch 2 [--any_field value]

The fields are those of train_nft.py, and so are `--algorithm` and `--config`, for a published run's sizes and rewards:

    ... examples/benchmarks/training.py --recipe self-forcing --config self_forcing_video_hpsv3 --num_train_epochs 2

The last lines say what each process used and whether all have the same LoRA. A table of an optimizer step's gradient,
and of sampling and decoding for it, beside the published way of computing it, in place of an epoch:

    python examples/benchmarks/training.py --recipe self-forcing --baseline [--profile]
"""

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from measuring import limited_memory
from random_models import random_pipeline, recipe_of
from training_comparison import PARTS, check, compare

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.cli.arguments import ArgumentParser
from astrolabe_diffusers.cli.train import parse_settings
from astrolabe_diffusers.distributed.agreement import raise_together
from astrolabe_diffusers.distributed.sharding import full_tensor
from astrolabe_diffusers.errors import UserError, exit_code
from astrolabe_diffusers.layouts.published_models import PUBLISHED_MODELS
from astrolabe_diffusers.reporting.machine import peak_memory_gb
from astrolabe_diffusers.training.algorithms import get_algorithm, get_config_class
from astrolabe_diffusers.training.policies import policy_parameters
from astrolabe_diffusers.training.results import write_results
from astrolabe_diffusers.training.trainer import OnlineTrainer


DEFAULTS = {"rewards": {"sharpness": 1.0}}
# The last epoch is measured, for the first one may compile; what is not part of it is made as small as it gets.
SHORT = {
    "prompts": str(Path(TINY_SHAPES) / "prompts"),
    "prompts_data_dir": None,
    "num_train_epochs": 2,
    "max_train_steps": None,
    "num_eval_prompts": 1,
    "eval_seeds": 1,
    "num_eval_videos": 0,
    "report_to": "none",
    "collapse_factor": 0.0,
}
# Of `--baseline`, as a published run has them; activations of a whole clip fit no card.
BASELINE = {
    "train_batch_size": 1,
    "batches_per_epoch": 2,
    "samples_per_prompt": 2,
    "gradient_checkpointing": "selective",
    "mixed_precision": "bf16",
    "compile": False,
}
FIGURES = ("seconds_sampling", "seconds_scoring", "seconds_training", "seconds", "samples_per_second", "grad_norm")


def checksum(parameters: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(full_tensor(parameter.detach()).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def benchmark(argv: list[str] | None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=PUBLISHED_MODELS, help="random weights at full size, not a folder's")
    parser.add_argument("--memory_gb", type=float, help="as on cards that have so many GB (1e9 bytes) for torch")
    parser.add_argument("--baseline", action="store_true", help="a table: the published way, ours, and ours compiled")
    help = "of --baseline: what is measured, of " + ", ".join(PARTS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=help)
    parser.add_argument("--repetitions", type=int, help="of --baseline: gradients that are timed [2]")
    parser.add_argument("--profile", action="store_true", help="of --baseline: a gradient's kernels by kind")
    algorithm, settings, arguments = parse_settings(parser, argv)
    recipe = recipe_of(arguments.pop("recipe"), arguments.get("model"))
    baseline = arguments.pop("baseline")
    options = {name: arguments.pop(name) for name in ("parts", "repetitions", "profile")}
    options["parts"] = options["parts"] and options["parts"].split(",")  # joined as a field's list is
    options = {name: value for name, value in options.items() if value}
    if options and not baseline:
        raise UserError("--parts, --repetitions and --profile belong to --baseline.")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    limit = limited_memory(torch.device(device), arguments.pop("memory_gb"), argv)
    with limit, tempfile.TemporaryDirectory() as folder:
        defaults = DEFAULTS | BASELINE if baseline else DEFAULTS
        config = get_config_class(algorithm)(**{**defaults, **settings, **SHORT, "output_dir": folder, **arguments})
        if config.transitions and config.switch_prompts == "pairs":
            config.num_eval_prompts = max(config.num_eval_prompts, 2)  # one goes on from the other
        if baseline:
            check(algorithm, config, int(os.environ.get("WORLD_SIZE", 1)))
        pipeline = random_pipeline(recipe, device) if recipe else None
        if pipeline:
            # A server's recipe cannot be trained; the plain loop has the same model.
            pipeline.register_to_config(num_context_frames=None)
        trainer = get_algorithm(algorithm)(pipeline, config)
        with trainer.resources:
            if baseline:
                compare(trainer, **options)
                trainer.end()
            else:
                measure_epochs(trainer)


def measure_epochs(trainer: OnlineTrainer):
    # The held-out video only warms up: a block of it is enough, and no switch.
    sample = trainer.held_out.samples[0]
    trainer.held_out.samples = [replace(sample, prompt=replace(sample.prompt, text=sample.texts[-1]), scenes=())]
    block = trainer.transformer.config.num_frames_per_block
    trainer.held_out.size["num_frames"] = 1 + trainer.pipeline.vae.config.scale_factor_temporal * (block - 1)
    trainer.start()
    trainer.train_epochs()
    memory, lora = peak_memory_gb(trainer.accelerator.device), checksum(policy_parameters(trainer.transformer))
    with raise_together():
        write_results(trainer)
    trainer.end()
    if trainer.accelerator.is_main_process:
        metrics = json.loads((Path(trainer.config.output_dir) / "metrics.jsonl").read_text().splitlines()[-1])
        print("  ".join(f"{name} {metrics[name]:.3g}" for name in FIGURES))
    print(f"process {trainer.accelerator.process_index}: peak memory {memory:.1f} GB, LoRA {lora}", flush=True)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: benchmark(argv))


if __name__ == "__main__":
    raise SystemExit(main())

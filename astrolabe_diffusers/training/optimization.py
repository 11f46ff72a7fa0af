"""The optimizer, its schedule, and what a step of it is."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor

from ..distributed.sharding import full_tensor
from ..errors import UserError
from ..rollout.samples import VideoBatch
from .config import OnlineConfig
from .policies import many_passes, policy_parameters


# Values that are reported as root mean squares; what is summed are squares.
ROOTS = ("deviation", "x0_norm")


def make_optimizer(config: OnlineConfig, parameters: list[torch.nn.Parameter]):
    """AdamW and its learning rate schedule."""
    # One kernel for all parameters; not tried in shards.
    fused = all(parameter.is_cuda and not isinstance(parameter, DTensor) for parameter in parameters)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=fused or None,
    )
    name = config.lr_scheduler
    if name == "constant" and config.lr_warmup_steps:
        name = "constant_with_warmup"
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps
    )
    return optimizer, schedule


def set_schedule(optimizer, lr_scheduler, steps: int):
    """Brings the learning rate to where it is after `steps` optimizer steps, by the settings of this run."""
    # A `LambdaLR`, as all of `get_scheduler` are, prepared by accelerate or not.
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
    rates = [base * factor(steps) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    place = {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | place)


ADVICE = "Lower learning_rate or add lr_warmup_steps, and resume from a checkpoint before the collapse."


# Steps over which the guard against collapse averages.
_WINDOW = 8


class CollapseGuard:
    """
    Stops a run whose policy falls apart, before the step that would make it worse: the norm of the predicted clean
    videos is compared with that of the first steps.

    Prompts of one step may ask for darker pictures than those of another, by which healthy steps of few prompts differ
    twofold. So means over eight steps must not differ by `factor`, and a single step by its square. Never with 0.
    """

    def __init__(self, factor: float):
        self.factor = factor
        self.first: list[float] = []  # norms of the first steps
        self.last: deque[float] = deque(maxlen=_WINDOW)

    def check(self, statistics: dict[str, float], step: int):
        """Raises a [`UserError`] if values of a step are not finite, or `x0_norm`, if there is one, is far off."""
        loss, grad_norm, norm = statistics["loss"], statistics["grad_norm"], statistics.get("x0_norm")
        if not all(map(math.isfinite, (loss, grad_norm, norm or 0.0))):
            raise UserError(
                f"step {step}: the loss is {loss}, the gradient's norm {grad_norm}; the policy has collapsed. {ADVICE}"
            )
        if norm is None:
            return
        # A norm that is off is no part of the beginning.
        first, last = mean(self.first or [norm]), mean([*self.last, norm][-_WINDOW:])
        for what, ratio, factor in (("", norm / first, self.factor**2), ("of late ", last / first, self.factor)):
            if self.factor and not 1 / factor <= ratio <= factor:
                raise UserError(
                    f"step {step}: predicted videos have {what}{ratio:.2f} times the norm they started with "
                    f"(collapse_factor={self.factor:g}); the policy has collapsed. {ADVICE}"
                )
        self.last.append(norm)
        if len(self.first) < _WINDOW:
            self.first.append(norm)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "last": list(self.last)}

    def load_state_dict(self, state: dict[str, Any]):
        # A checkpoint of before has one norm, of its first step: which may be far from the mean.
        self.first, self.last = list(state.get("first", [])), deque(state.get("last", []), maxlen=_WINDOW)


@dataclass
class Optimization:
    """The prepared transformer and what moves it. With `skip_bad` a step whose loss or gradient is no finite number is
    not taken, instead of ending the run."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    max_grad_norm: float
    skip_bad: bool = False

    def step(
        self,
        parts: Sequence[tuple[VideoBatch, Any]],
        accumulate_gradients: Callable[[VideoBatch, Any, int, bool], dict[str, torch.Tensor]],
        guard: CollapseGuard,
        number: int,
        before_batch: Callable[[], object] = lambda: None,
    ) -> dict[str, float]:
        """Step `number`, counted from 1, on batches and what belongs to each; returns means over all samples of all
        processes, of which each has as many. `skipped_steps` is 1 if the step was not taken, in no process.

        Args:
            accumulate_gradients: as that of the trainer.
            before_batch: called before each batch; what it raises leaves the policy as it was.
        """
        transformer = self.accelerator.unwrap_model(self.model)
        transformer.train()
        count = sum(len(batch.samples) for batch, _ in parts)
        totals = {}
        with many_passes(transformer):
            for i, part in enumerate(parts):
                before_batch()
                for name, value in accumulate_gradients(*part, count, i == len(parts) - 1).items():
                    totals[name] = totals.get(name, 0) + value
        means = self.accelerator.reduce(torch.stack(list(totals.values())) / count, reduction="mean").tolist()
        statistics = {name: mean**0.5 if name in ROOTS else mean for name, mean in zip(totals, means)}
        parameters = policy_parameters(transformer)
        norm = self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)
        statistics["grad_norm"] = float(full_tensor(norm))
        # Losses and gradients are means over all processes: these agree.
        skip = self.skip_bad and not all(map(math.isfinite, statistics.values()))
        if not skip:
            guard.check(statistics, number)
            self.optimizer.step()
        statistics["skipped_steps"] = float(skip)
        statistics["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return statistics

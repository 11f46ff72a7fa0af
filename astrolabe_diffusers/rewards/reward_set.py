"""Several rewards as one, wherever they are scored."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from ..spelling import close_matches
from .http_client import split_url
from .placement.local import LocalRewards
from .placement.process import WorkerRewards
from .placement.remote import RemoteRewards
from .reward import RewardError, check_device


PLACES = (
    "'trainer', 'offload', a device such as 'cuda:1', 'process', 'process:cuda:1' or 'http://host:port'; of several, "
    "'process:cuda:6|process:cuda:7', each training process takes one in turn"
)


@dataclass
class RewardSetOutput:
    """
    Attributes:
        total: float32 tensor [B] on the CPU, the weighted sum of the raw scores.
        scores: the raw scores [B] of each reward.
        info: the parts [B] of each reward as "reward/part".
    """

    total: torch.Tensor
    scores: dict[str, torch.Tensor]
    info: dict[str, torch.Tensor]


class RewardSet:
    """
    Scores videos by several rewards and adds them up, each on its raw scale.

    Args:
        weights: reward name or dotted path (see `get_reward`) -> weight. A reward of weight 0 is measured and logged
            but does not count.
        options: for some of them, keyword arguments.
        placement: for some of them, where they are scored; those of one place are together, and places work at the
            same time:

            - `"trainer"`, the default: in this process, on the device that each chooses.
            - `"offload"`: in this process, on the GPU only while they score; `takes_turns` is true then.
            - `"cpu"`, `"cuda:1"`, ...: in this process, on that device.
            - `"process"`, `"process:cuda:1"`: in a process of their own, see `WorkerRewards`.
            - `"http://host:port"`: on a server, see `RemoteRewards`. It has its own options.
            - `"process:cuda:6|process:cuda:7"`: of several places the one whose turn it is for `process_index`.
        timeout: seconds that another process or a server may take for a batch.
        fps: frames a second of the videos, the option `fps` of rewards that have it and are not given another.
        process_index: of this process among those of a run.

    Raises:
        ValueError: a name, an option or a place does not exist, an option is of another type than the reward
            declares, or a weight is no finite number.
        RewardPlaceError: no such server answers.
    """

    def __init__(
        self,
        weights: dict[str, float],
        options: dict[str, dict[str, Any]] | None = None,
        placement: dict[str, str] | None = None,
        timeout: float = 300.0,
        fps: float | None = None,
        process_index: int = 0,
    ):
        if not weights:
            raise ValueError("no reward is named; give at least one, such as {'motion_smoothness': 1.0}.")
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} must be a finite number, not {weight}.")
        options, placement = options or {}, placement or {}
        for name in (*options, *placement):
            if name not in weights:
                close = close_matches(name, weights)
                raise ValueError(f"{name!r}{close} is none of the rewards {', '.join(weights)}.")
        self.weights = dict(weights)
        names: dict[str, list[str]] = {}
        for name in weights:
            places = placement.get(name, "trainer").split("|")
            for place in places:
                _check_place(place)
            names.setdefault(places[process_index % len(places)], []).append(name)
        self.takes_turns = "offload" in names
        defaults = {"fps": fps} if fps else {}
        self._executor, self._places = None, []
        try:
            for place, group in names.items():
                chosen = {name: options[name] for name in group if name in options}
                self._places.append(_make_place(place, group, chosen, timeout, defaults))
        except BaseException:
            self.close()  # the processes that have been started
            raise
        away = [place for place in self._places if not isinstance(place, LocalRewards)]
        if away:
            self._executor = ThreadPoolExecutor(len(away), thread_name_prefix="reward-places")

    @property
    def using_prompts(self) -> list[str]:
        """The names of those rewards that look at the prompt."""
        return [name for place in self._places for name in place.using_prompts]

    def __call__(
        self, videos: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None
    ) -> RewardSetOutput:
        """
        Args:
            videos: float tensor [B, F, C, H, W] in [0, 1].
            prompts: B prompts.
            metadata: B dicts or `None`.

        Raises:
            RewardError: a reward returned anything but one finite score a video, or frames are no finite numbers.
            RewardPlaceError: a process died twice, or a server does not answer, or not in time, or nonsense.
            ValueError: the batch is not what a reward can take.
        """
        if videos.ndim != 5 or not videos.is_floating_point() or len(prompts) != len(videos):
            raise ValueError(
                f"videos must be floats [B, F, C, H, W] with one prompt each; got {videos.dtype} "
                f"{tuple(videos.shape)} and {len(prompts)} prompts."
            )
        if metadata is not None and len(metadata) != len(videos):
            raise ValueError(f"metadata must be None or one dict a video; got {len(metadata)} for {len(videos)}.")
        # Rounded to 256 steps, a NaN would be any number.
        broken = (~videos.sum((1, 2, 3, 4), dtype=torch.float32).isfinite()).nonzero().flatten().tolist()
        if broken:
            raise RewardError(
                f"frames of sample {broken[0]}, prompt {prompts[broken[0]]!r}, are no finite numbers "
                f"({len(broken)} of {len(prompts)} videos)."
            )
        outputs = self._score(videos, prompts, metadata)
        scores, info = {}, {}
        for name in self.weights:
            scores[name] = outputs[name].scores
            bad = (~scores[name].isfinite()).nonzero().flatten().tolist()
            if bad:
                raise RewardError(
                    f"reward {name!r} gave {scores[name][bad[0]].item()} for sample {bad[0]}, prompt "
                    f"{prompts[bad[0]]!r} ({len(bad)} of {len(prompts)} scores are not finite)."
                )
            info |= {f"{name}/{part}": values for part, values in outputs[name].info.items()}
        total = sum(weight * scores[name] for name, weight in self.weights.items())
        return RewardSetOutput(total=total, scores=scores, info=info)

    def _score(self, videos, prompts, metadata):
        away = [
            self._executor.submit(place.score, videos, prompts, metadata)
            for place in self._places
            if not isinstance(place, LocalRewards)
        ]
        try:
            outputs = {}
            for place in self._places:
                if isinstance(place, LocalRewards):
                    outputs |= place.score(videos, prompts, metadata)
        finally:
            wait(away)  # no place is asked anew before it has answered
        for future in away:
            outputs |= future.result()
        return outputs

    def close(self):
        """Ends the processes and threads of rewards."""
        for place in self._places:
            place.close()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


def _check_place(place: str):
    kind, _, device = place.partition(":")
    if kind in ("http", "https"):
        return
    try:
        if place not in ("trainer", "offload", "process"):
            torch.device(device if kind == "process" else place)
    except RuntimeError:
        raise ValueError(f"there is no place {place!r} for rewards; it can be {PLACES}.") from None
    if device or place not in ("trainer", "offload", "process"):
        check_device(device if kind == "process" else place)


def _make_place(place, names, options, timeout, defaults):
    kind, _, device = place.partition(":")
    if kind in ("http", "https"):
        if options:
            address, _ = split_url(place)
            raise ValueError(f"the options of {next(iter(options))!r} are set where it is served, at {address}.")
        return RemoteRewards(place, names, timeout)
    if kind == "process":
        return WorkerRewards(names, options, device or None, timeout, defaults)
    device = None if kind in ("trainer", "offload") else place
    return LocalRewards(names, options, device, kind == "offload", defaults)

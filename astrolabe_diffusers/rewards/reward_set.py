"""Several rewards as one, wherever they are scored."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from ..errors import close_matches
from .config import PLACEMENTS
from .http_client import split_url
from .placement.local import LocalRewards
from .placement.process import ProcessRewards
from .placement.remote import RemoteRewards
from .reward import Closing, Reward, RewardError, check_device


@dataclass
class RewardSetOutput:
    """The weighted sum of the raw scores, float32 [B] on the CPU, these by reward, and the parts of each by
    "reward/part"."""

    total: torch.Tensor
    scores: dict[str, torch.Tensor]
    info: dict[str, torch.Tensor]


class RewardSet(Closing):
    """
    Scores videos by several rewards and adds them up, each on its raw scale; closing it ends their processes.

    Args:
        weights: reward name or dotted path (see `get_reward`) -> weight. A reward of weight 0 is measured and logged
            but does not count.
        options: for some of them, keyword arguments.
        placement: for some of them, where they are scored; those of one are together, and several work at the same
            time:

            - `"trainer"`, the default: in this process, on the device that each chooses.
            - `"offload"`: in this process, on the GPU only while they score; `takes_turns` is true then.
            - `"cpu"`, `"cuda:1"`, ...: in this process, on that device.
            - `"process"`, `"process:cuda:1"`: in a process of their own, see `ProcessRewards`.
            - `"http://host:port"`: on a server, see `RemoteRewards`. It has its own options.
            - `"process:cuda:6|process:cuda:7"`: of several the one whose turn it is for `process_index`.
        timeout: seconds that another process or a server may take for a batch.
        fps: frames a second of the videos, the option `fps` of rewards that have it and are not given another.
        process_index: of this process among those of a run.
        rewards: for some of them, what their name means: a function, or a `Reward` or its class (see `make_reward`),
            which is scored in this process.

    Raises:
        ValueError: a name, an option or a placement does not exist, an option is of another type than the reward
            declares, or a weight is no finite number.
        RewardPlacementError: no such server answers.
    """

    def __init__(
        self,
        weights: dict[str, float],
        options: dict[str, dict[str, Any]] | None = None,
        placement: dict[str, str] | None = None,
        timeout: float = 300.0,
        fps: float | None = None,
        process_index: int = 0,
        rewards: Mapping[str, str | Reward | Callable] | None = None,
    ):
        if not weights:
            raise ValueError("no reward is named; give at least one, such as {'motion_smoothness': 1.0}.")
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights must be by name, such as {{'motion_smoothness': 1.0}}, not {weights!r:.80}.")
        for name, weight in weights.items():
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} must be a finite number, not {weight}.")
        options, placement, rewards = options or {}, placement or {}, rewards or {}
        for name in (*options, *placement, *rewards):
            if name not in weights:
                close = close_matches(name, weights)
                raise ValueError(f"{name!r}{close} is none of the rewards {', '.join(weights)}.")
        self.weights = dict(weights)
        groups: dict[str, dict[str, str | Reward | Callable]] = {}
        for name in weights:
            source = rewards.get(name, name)
            alternatives = placement.get(name, "trainer").split("|")
            for alternative in alternatives:
                check_placement(alternative, name, source)
            groups.setdefault(alternatives[process_index % len(alternatives)], {})[name] = source
        self.takes_turns = "offload" in groups
        defaults = {"fps": fps} if fps else {}
        self._here: list[LocalRewards] = []
        self._away: list[ProcessRewards | RemoteRewards] = []
        with ExitStack() as resources:
            for chosen, sources in groups.items():
                own = {name: options[name] for name in sources if name in options}
                group = _make_group(chosen, sources, own, timeout, defaults)
                if isinstance(group, LocalRewards):
                    self._here.append(group)
                else:
                    self._away.append(resources.enter_context(group))
            if self._away:
                self._executor = ThreadPoolExecutor(len(self._away), thread_name_prefix="reward-placements")
                resources.callback(self._executor.shutdown, wait=False, cancel_futures=True)
            self._resources = resources.pop_all()

    @property
    def using_prompts(self) -> list[str]:
        """The names of those rewards that look at the prompt."""
        return [name for group in (*self._here, *self._away) for name in group.using_prompts]

    @property
    def num_context_frames(self) -> int:
        """How many frames before the videos these rewards look at."""
        return max(group.num_context_frames for group in (*self._here, *self._away))

    def __call__(
        self,
        videos: torch.Tensor,
        prompts: list[str],
        metadata: list[dict[str, Any]] | None = None,
        context: torch.Tensor | None = None,
    ) -> RewardSetOutput:
        """
        Scores B videos, floats [B, F, C, H, W] in [0, 1], with the frames right before them as `context`
        [B, K, C, H, W], of which the last `num_context_frames` are looked at.

        Raises:
            RewardError: a reward returned anything but one finite score a video, or frames are no finite numbers.
            RewardPlacementError: a process died twice, or a server does not answer, or not in time, or nonsense.
            ValueError: the batch is not what a reward can take.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list with one a video, not the text {prompts!r:.80}.")
        if videos.ndim != 5 or not videos.is_floating_point() or len(prompts) != len(videos):
            raise ValueError(
                f"videos must be floats [B, F, C, H, W] with one prompt each; got {videos.dtype} "
                f"{tuple(videos.shape)} and {len(prompts)} prompts."
            )
        if metadata is not None and len(metadata) != len(videos):
            raise ValueError(f"metadata must be None or one dict a video; got {len(metadata)} for {len(videos)}.")
        # Rounded to 256 steps, a NaN would be any number.
        if bad := _not_finite(videos.sum((1, 2, 3, 4), dtype=torch.float32)):
            raise RewardError(
                f"frames of sample {bad[0]}, prompt {prompts[bad[0]]!r}, are no finite numbers "
                f"({len(bad)} of {len(prompts)} videos)."
            )
        outputs = self._score(videos, prompts, metadata, context)
        scores = {name: outputs[name].scores for name in self.weights}
        for name, values in scores.items():
            if bad := _not_finite(values):
                raise RewardError(
                    f"reward {name!r} gave {values[bad[0]].item()} for sample {bad[0]}, prompt {prompts[bad[0]]!r} "
                    f"({len(bad)} of {len(prompts)} scores are not finite)."
                )
        info = {f"{name}/{part}": values for name in scores for part, values in outputs[name].info.items()}
        return RewardSetOutput(sum(weight * scores[name] for name, weight in self.weights.items()), scores, info)

    def _score(self, *arguments):
        answers = [self._executor.submit(group.score, *arguments) for group in self._away]
        outputs = {}
        try:
            for group in self._here:
                outputs |= group.score(*arguments)
        finally:
            wait(answers)  # none is asked anew before it has answered
        for answer in answers:
            outputs |= answer.result()
        return outputs

    def close(self):
        self._resources.close()


def _not_finite(values: torch.Tensor) -> list[int]:
    return (~values.isfinite()).nonzero().flatten().tolist()


_SERVER = ("http", "https")


def check_placement(placement: str, name: str, source: str | Reward | Callable):
    """`ValueError` unless the reward `name`, which `source` says, can be scored there."""
    kind = placement.partition(":")[0]
    if kind not in _SERVER and placement not in ("trainer", "offload", "process"):
        device = placement.removeprefix("process:")
        try:
            torch.device(device)
        except RuntimeError:
            raise ValueError(f"there is no place {placement!r} for rewards; it can be {PLACEMENTS}.") from None
        check_device(device)
    if kind in (*_SERVER, "process") and not isinstance(source, str):
        raise ValueError(
            f"reward {name!r} is an object of this process: it cannot be scored by another, {placement!r}, only at "
            "'trainer', 'offload' or a device such as 'cuda:1'."
        )


def _make_group(placement: str, sources, options, timeout, defaults) -> LocalRewards | ProcessRewards | RemoteRewards:
    """Rewards of one placement, which was checked; arguments as those of [`RewardSet`]."""
    kind, _, device = placement.partition(":")
    if kind in _SERVER:
        if options:
            shown, _ = split_url(placement)
            raise ValueError(f"the options of {next(iter(options))!r} are set where it is served, at {shown}.")
        return RemoteRewards(placement, sources, timeout, **defaults)
    if kind == "process":
        return ProcessRewards(sources, timeout, options=options, device=device or None, defaults=defaults)
    device = None if kind in ("trainer", "offload") else placement
    return LocalRewards(sources, options, device, kind == "offload", defaults)

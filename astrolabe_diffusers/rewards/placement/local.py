"""Rewards in this process."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ..frames import FrameRequest, prepare_frames
from ..registry import assumed_fps, make_reward
from ..reward import Reward, RewardError, RewardOutput, check_device
from .wire import ScoringJob, context_frames


class LocalRewards:
    """
    Rewards that are scored in this process.

    Args:
        rewards: names as in `get_reward`; or what `make_reward` makes rewards of, by the names that they are to have.
        options: by name, the keyword arguments of a reward.
        device: where the weights are; where each reward puts them itself if not given.
        offload: keep the weights in the CPU's memory and copy them to the GPU only while videos are scored.
        defaults: as in `get_reward`.

    Attributes:
        assumed_fps: by name the frames a second that nobody has told a reward of, and that matter to it.
    """

    def __init__(
        self,
        rewards: Iterable[str] | Mapping[str, str | Reward | Callable],
        options: dict[str, dict[str, Any]] | None = None,
        device: str | None = None,
        offload: bool = False,
        defaults: dict[str, Any] | None = None,
    ):
        self.device = device
        self.rewards: dict[str, Reward] = {}
        self.assumed_fps: dict[str, float] = {}
        if device:
            check_device(device)
        # A reward that takes the GPU by default takes this one, not the trainer's.
        with torch.cuda.device(device) if str(device).startswith("cuda") else nullcontext():
            for name in rewards:
                source = rewards[name] if isinstance(rewards, Mapping) else name
                own = (options or {}).get(name, {})
                reward = self.rewards[name] = make_reward(name, source, own, defaults)
                if (fps := assumed_fps(source, {**(defaults or {}), **own})) is not None:
                    self.assumed_fps[name] = fps
                if device:
                    reward.to(device)
        self._offload = OffloadedWeights(self.rewards.values()) if offload else nullcontext()

    @property
    def using_prompts(self) -> list[str]:
        """The names of those rewards that look at the prompt."""
        return [name for name, reward in self.rewards.items() if reward.uses_prompt]

    @property
    def num_context_frames(self) -> int:
        """The most that one of them looks at."""
        return max(reward.num_context_frames for reward in self.rewards.values())

    def requests(self, num_frames: int, height: int, width: int) -> dict[str, FrameRequest | None]:
        """What each reward needs of videos of this shape, see `Reward.request`."""
        return {name: reward.request(num_frames, height, width) for name, reward in self.rewards.items()}

    def score(
        self,
        videos: torch.Tensor,
        prompts: list[str],
        metadata: list[dict[str, Any]] | None,
        context: torch.Tensor | None = None,
    ) -> dict[str, RewardOutput]:
        """The output of each reward for videos [B, F, 3, H, W], float in [0, 1], and the frames before them."""
        requests = self.requests(videos.shape[1], *videos.shape[-2:])
        kinds = set(requests.values())
        prepared = {kind: videos if kind is None else prepare_frames(videos, kind) for kind in kinds}
        frames = {name: prepared[kind] for name, kind in requests.items()}
        context = context_frames(videos, context, self.num_context_frames)
        return self.score_job(ScoringJob(frames, frozenset(), prompts, metadata, context))  # whole videos are floats

    def score_job(self, job: ScoringJob) -> dict[str, RewardOutput]:
        """The output of those rewards that a job asks."""

        def own(name):
            # A reward may write into what it is given, to normalise frames for example. A copy that lives as long as
            # its turn costs less than to find out.
            tensor = job.frames[name].to(self.device or job.frames[name].device, copy=True)
            return tensor.float().div_(255) if name in job.whole else tensor

        def own_context(reward: Reward) -> dict[str, torch.Tensor]:
            if not reward.num_context_frames:
                return {}
            context = job.context[:, max(job.context.shape[1] - reward.num_context_frames, 0) :]
            return {"context": context.to(self.device or context.device, copy=True)}

        def score(name: str) -> RewardOutput:
            reward = self.rewards[name]
            try:
                output = reward.score(
                    own(name), list(job.prompts), copy.deepcopy(job.metadata), **own_context(reward)
                )
            except RewardError as error:
                raise RewardError(f"reward {name!r}: {error}") from error
            if not isinstance(output, RewardOutput):
                raise RewardError(f"reward {name!r} must return a RewardOutput, not a {type(output).__name__}.")
            return output

        # Grad mode belongs to a thread, so what the caller set does not hold in a worker.
        with self._offload, torch.inference_mode():
            outputs = {name: score(name) for name in job.frames}
        return {name: output.checked(name, len(job.prompts)) for name, output in outputs.items()}


class OffloadedWeights:
    """Inside this context the networks of rewards are on a GPU, outside in the CPU's memory, where their copy stays:
    weights do not change, so that leaving the GPU costs nothing. It is pinned where there is a GPU."""

    def __init__(self, rewards: Iterable[Reward]):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        modules = [module for reward in rewards for module in reward.modules()]
        # Several rewards may share a network; `dict` keeps one of each tensor.
        tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        self._home = []
        for tensor in tensors.values():
            tensor.data = tensor.data.cpu()
            if torch.cuda.is_available():
                tensor.data = tensor.data.pin_memory()
            self._home.append((tensor, tensor.data))

    def __enter__(self):
        for tensor, home in self._home:
            tensor.data = home.to(self.device, non_blocking=True, copy=True)

    def __exit__(self, *exception):
        for tensor, home in self._home:
            tensor.data = home

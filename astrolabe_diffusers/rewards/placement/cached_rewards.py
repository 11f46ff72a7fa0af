"""Scores of a server that need not be computed twice."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from ..reward import RewardOutput
from .local import LocalRewards
from .wire import ScoringJob


class CachedRewards(LocalRewards):
    """
    Rewards in this process, of which those that do not look at the prompt remember the videos of earlier jobs by their
    content. It pays where videos come again: scores of the same files, or of the same held-out videos of a base model.

    Args:
        cache_size: videos that are remembered, 0 for none; beyond that, those that came least recently go.
    """

    def __init__(self, *args, cache_size: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.cache_size, self.cache_hits = cache_size, 0
        self._entries: OrderedDict[tuple, dict[str, RewardOutput]] = OrderedDict()

    def score_job(self, job):
        using_prompts = self.using_prompts
        free = [name for name in job.frames if name not in using_prompts] if self.cache_size else []
        keys = _content_keys(job, free)
        known = {key: self._entries[key] for key in keys if key in self._entries}
        if not free or not known:
            outputs = super().score_job(job)
        else:
            self.cache_hits += sum(key in known for key in keys)
            others = [name for name in job.frames if name in using_prompts]
            outputs = super().score_job(job.select(others)) if others else {}
            missing = [i for i, key in enumerate(keys) if key not in known]
            if missing:
                known |= zip((keys[i] for i in missing), _rows(super().score_job(job.select(free, missing))))
            outputs |= {name: RewardOutput.cat([known[key][name] for key in keys]) for name in free}
        for key, row in zip(keys, _rows({name: outputs[name] for name in free})) if free else ():
            self._entries[key] = row
            self._entries.move_to_end(key)
        while len(self._entries) > self.cache_size:
            self._entries.popitem(last=False)
        return outputs


def _content_keys(job: ScoringJob, names: list[str]) -> list[tuple]:
    """For each video of a job the rewards and a digest of what they look at."""
    tensors = {id(tensor): tensor for tensor in (job.frames[name] for name in names)}
    digests = {
        key: [(video.shape, hashlib.blake2b(video.contiguous().numpy()).digest()) for video in tensor]
        for key, tensor in tensors.items()
    }
    return [tuple((name, digests[id(job.frames[name])][i]) for name in names) for i in range(len(job.prompts))]


def _rows(outputs: dict[str, RewardOutput]) -> list[dict[str, RewardOutput]]:
    """The outputs of each video."""
    size = len(next(iter(outputs.values())).scores)
    return [{name: output[i : i + 1] for name, output in outputs.items()} for i in range(size)]

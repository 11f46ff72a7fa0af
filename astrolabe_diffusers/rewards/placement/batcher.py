"""Scoring what several clients ask, one batch after the other."""

import threading
import time
from collections import Counter
from concurrent.futures import Future

from .local import LocalRewards
from .wire import ScoringJob


class Batcher:
    """
    Scores jobs one after the other in a thread, and together those of one kind that wait, `max_batch` videos at most
    unless one job alone has more. If a batch fails, each of its jobs is scored alone: a client does not suffer from
    another's videos.
    """

    def __init__(self, rewards: LocalRewards, max_batch: int, max_waiting: int):
        self.rewards, self.max_batch, self.max_waiting = rewards, max_batch, max_waiting
        self.counters: Counter[str] = Counter()
        self.waiting: list[tuple[ScoringJob, Future]] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="rewards", daemon=True).start()

    def submit(self, job: ScoringJob) -> Future | None:
        """The outputs by reward as a future; `None` if `max_waiting` jobs wait."""
        with self._changed:
            if len(self.waiting) >= self.max_waiting:
                return None
            future = Future()
            self.waiting.append((job, future))
            self._changed.notify()
            return future

    def _work(self):
        while True:
            batch = self._next_batch()
            started = time.perf_counter()
            self._score(batch)
            self.counters["batches"] += 1
            self.counters["videos"] += sum(len(job.prompts) for job, _ in batch)
            self.counters["seconds"] += time.perf_counter() - started

    def _next_batch(self) -> list[tuple[ScoringJob, Future]]:
        with self._changed:
            self._changed.wait_for(lambda: self.waiting)
            batch, rest, size = [], [], 0
            for job, future in self.waiting:
                fits = not batch or (job.kind() == batch[0][0].kind() and size + len(job.prompts) <= self.max_batch)
                if not fits:
                    rest.append((job, future))
                elif future.set_running_or_notify_cancel():
                    batch.append((job, future))
                    size += len(job.prompts)
            self.waiting = rest
            return batch

    def _score(self, batch: list[tuple[ScoringJob, Future]]):
        jobs = [job for job, _ in batch]
        try:
            outputs = self.rewards.score_job(ScoringJob.join(jobs))
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for entry in batch:
                    self._score([entry])
            return
        start = 0
        for job, future in batch:
            rows = slice(start, start + len(job.prompts))
            future.set_result({name: output[rows] for name, output in outputs.items()})
            start = rows.stop

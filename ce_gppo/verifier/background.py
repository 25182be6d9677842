"""Scoring in a thread, while other responses are still being sampled."""

import queue
import threading
from collections.abc import Callable

from ce_gppo.types import Problem, Response


class BackgroundScorer:
    """`reward.score` in a thread, which scores each group while others are still being sampled.

    Groups that arrive while the thread is busy are scored as one batch, and `budget` bounds the time for all of them.
    """

    def __init__(self, score: Callable, problems: list[Problem], **options):
        """problems: one for each group to come. options: the keyword arguments of `score`."""
        self.score, self.problems, self.options = score, problems, options
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        self.parts: list[list[dict[str, float]]] = [[] for _ in problems]
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def add(self, index: int, group: list[Response]) -> None:
        """A group of responses, which have a `text`, to the problem of this index."""
        self.waiting.put((index, [response.text for response in group]))

    def finish(self) -> list[list[dict[str, float]]]:
        """Wait, and return the scores of every group. Raises the error that `score` raised, if any."""
        self.waiting.put(None)
        self.thread.join()
        if self.error:
            raise self.error
        return self.parts

    def _work(self) -> None:
        last = False
        while not last:
            batch = [self.waiting.get()]
            while not self.waiting.empty():
                batch.append(self.waiting.get())
            last = None in batch
            batch = [item for item in batch if item is not None]
            texts = [text for _, group in batch for text in group]
            problems = [self.problems[index] for index, group in batch for _ in group]
            answers, verifiers = [p.answer for p in problems], [p.verifier for p in problems]
            try:
                parts = iter(self.score(texts, answers, verifiers, **self.options))
            except Exception as error:
                self.error = error
                return
            for index, group in batch:
                self.parts[index] = [next(parts) for _ in group]

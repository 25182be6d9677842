"""What ends a run early, and what is kept of an update that could not be made."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch

import ranks
from rollout import Response


class RunEnded(Exception):
    """The run cannot go on. The message is for people, and says what to do."""


class StopRequest:
    """Ctrl-C or SIGTERM: a rollout in hand is dropped, updates in hand are finished, and then the run is saved.

    A second one ends the program at once.
    """

    def __init__(self):
        self.requested = ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __bool__(self) -> bool:
        return bool(self.requested)

    def _handle(self, number: int, frame) -> None:
        if self.requested:
            os._exit(128 + number)  # metrics are on the disk, checkpoints are whole
        self.requested = signal.Signals(number).name
        if ranks.is_main():
            print(f"\n{self.requested}: finishing what is in hand, then saving; once more to stop now", file=sys.stderr)


def save_skipped(folder: Path, step: int, index: int, responses: list[Response], done: dict) -> None:
    """What a skipped update had seen on this rank, to be looked at with torch.load(..., weights_only=True)."""
    folder.mkdir(exist_ok=True)
    fields = [dataclasses.asdict(response) for response in responses]
    record = {"responses": fields, "micro_batch_losses": done["micro_batch_losses"], "grad_norm": done["grad_norm"]}
    torch.save(record, folder / f"step-{step:06d}-update-{index}-rank-{ranks.rank()}.pt")

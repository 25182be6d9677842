"""The ends of a run, row by row of the table in docs/interruptions.md, on one process and on two."""

import pytest

from helpers import SMALL, Forked, metrics_of, quick, ranks, wandb_of
from test_faults import program

pytestmark = pytest.mark.slow

ENDS = {  # kind: (what happens in step 2, exit code, last step with a row, what is printed)
    "finished": ("lambda: None", 0, 2, ""),
    "stopped": ("stop", 0, 2, "stopped after step 2; continue"),
    "ended": ('lambda: setattr(train.run, "MAX_SKIPPED_UPDATES", -1)', 1, 2, "updates in a row had no finite gradient"),
    "failed": ("lambda: fail(MemoryError('of rank 0'))", 1, 1, "of rank 0"),
    "refused": ("lambda: fail(train.messages.UserError('a mistake'))", 2, 1, "a mistake"),
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ENDS)
def test_what_an_end_means(tmp_path, kind, processes):
    """The table of docs/interruptions.md, row by row: exit code, also in W&B, last row, sentence, the same command."""
    fault, code, last, sentence = ENDS[kind]
    folder, script = tmp_path / "out" / "it", program(tmp_path, f'at(train, "learn", [2], {fault})')
    arguments = [*quick(tmp_path / "out"), *SMALL, "--steps", "3" if kind == "stopped" else "2", "--run-name", "it"]
    started = ranks(processes, str(script), *arguments, WANDB_MODE="offline")
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert started[0].returncode == code and sentence in outputs[0], outputs[0]
    assert metrics_of(folder)[-1]["step"] == last and wandb_of(folder)[1] == [code]
    assert ("Traceback" in outputs[0]) == (kind == "failed"), outputs[0]
    assert any(name.startswith("eval/") for name in metrics_of(folder)[-1]) == (kind == "finished")
    if processes == 2 or kind in ("refused", "stopped"):
        return  # what the same command does follows from the folder; of a stopped run see test_faults.py
    again = Forked("train.py", *arguments, WANDB_MODE="disabled")
    told = again.communicate(timeout=200)[0]
    assert again.returncode == (2 if kind == "finished" else 0), told
    assert ("is finished" if kind == "finished" else f"going on with {folder}") in told
    assert any(name.startswith("eval/") for name in metrics_of(folder)[-1])

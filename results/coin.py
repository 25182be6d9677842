"""A reward that nothing can be learned from: the toss of a coin (the idea of arXiv 2509.26114).

make train ARGS="--rewards results/coin.py:score ..."

Entropy then moves only by the objective: by what it clips, and by the betas.
"""

import hashlib


def score(response: str, answer: str) -> float:
    """1 or 0. The same for the same response to the same problem, so that a run can be resumed exactly."""
    return float(hashlib.sha256(f"{answer}\n{response}".encode()).digest()[0] % 2)

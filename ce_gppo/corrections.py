"""Weights for the losses of tokens that vLLM sampled with other probabilities than the trainer's."""

from torch import Tensor

KINDS = ("none", "tis", "mask")
CAP = 2.0  # tis: the largest weight; mask: the largest ratio of the two, either way


def correction_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, kind: str, cap: float = CAP) -> Tensor:
    """Factors [B, T] for the losses of tokens.

    tis: sg(min(pi_old / pi_vllm, cap)), truncated importance sampling (fengyao.notion.site/off-policy-rl).
    mask: 0 where that ratio is outside [1 / cap, cap], 1 elsewhere. Masked tokens stay in the denominator.
    """
    ratio = (old_logprobs - rollout_logprobs).clamp(-20, 20).exp()
    if kind == "tis":
        return ratio.clamp(max=cap)
    if kind == "mask":
        return ((ratio <= cap) & (ratio >= 1 / cap)).to(ratio.dtype)
    raise ValueError(f"rollout_correction '{kind}' is unknown; known: {', '.join(KINDS)}")

"""Weights for the losses of tokens that vLLM sampled with other probabilities than the trainer's.

With r_t = pi_old / pi_vllm of a token, the same weights on both sides, over the T tokens of a response:

| kind     | weight of a token                         | cap c | in verl's rollout_correction                        |
|----------|-------------------------------------------|-------|-----------------------------------------------------|
| tis      | min(r_t, c)                               | 2     | rollout_is token; fengyao.notion.site/off-policy-rl |
| mask     | 1 if 1/c <= r_t <= c, 0 otherwise         | 2     | rollout_rs token                                    |
| seq-tis  | min(r_1 ... r_T, c)                       | 2     | rollout_is sequence                                 |
| seq-mask | 1 if 1/c <= r_1 ... r_T <= c, 0 otherwise | 2     | rollout_rs sequence                                 |
| geo-mask | the same of (r_1 ... r_T)^(1/T)           | 1.001 | rollout_rs geometric, also called Geo-RS            |

The first two are biased, with a low variance. The product over a response is unbiased; its variance grows with length.
Masked tokens stay in the denominator of the loss; in verl they leave it. Others keep the ratio as the weight where
their mask is not 0: IcePop (arXiv 2510.18855) a token's in [0.5, 5], TRL by default a response's up to 3.
The weights have no gradient. The ratio pi / pi_old does not change.
"""

import math

from torch import Tensor

CAPS = {"tis": 2.0, "mask": 2.0, "seq-tis": 2.0, "seq-mask": 2.0, "geo-mask": 1.001}
KINDS = ("none", *CAPS)


def correction_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, kind: str, cap: float | None = None
) -> Tensor:
    """Factors for the losses of tokens, [B, T], or [B, 1] if all tokens of a response have the same.

    cap: None for the cap in the table. Values where mask is 0 are never read.
    """
    if kind not in CAPS:
        raise ValueError(f"rollout_correction '{kind}' is unknown; known: {', '.join(KINDS)}")
    gap = (old_logprobs - rollout_logprobs).masked_fill(~mask, 0)  # [B, T]  log r_t
    if kind.startswith(("seq", "geo")):
        gap = gap.sum(-1, keepdim=True)  # [B, 1]
    if kind.startswith("geo"):
        gap = gap / mask.sum(-1, keepdim=True).clamp(min=1)
    limit = math.log(cap or CAPS[kind])
    if kind.endswith("tis"):
        return gap.clamp(max=limit).exp()
    return (gap.abs() <= limit).to(gap.dtype)

"""GRPO's frozen reference policy: the model that the run began with, for the KL term of kl_coef.

It takes 4 bytes a parameter on each device (with shard: over all devices). With kl_coef 0 it is not loaded.
"""

import torch

from ce_gppo import parallel
from ce_gppo.forward import Policy, collate, even_passes, flatten, micro_batches, own_share
from ce_gppo.model import load_model
from ce_gppo.perf import Meter
from ce_gppo.types import Response


def load_reference(config, device: str) -> torch.nn.Module | None:
    """The policy of config.model, also in a resumed run. None if kl_coef is 0. Collective."""
    if not config.kl_coef:
        return None
    model, _ = load_model(config.model, device, shard=config.shard)
    policy = Policy(model)
    # Without gradients there is nothing for DDP to do.
    return policy if config.shard == "no" else parallel.distribute(policy, config.shard, model._no_split_modules or [])


@torch.no_grad()
@parallel.host_threads()
def set_reference_logprobs(
    reference: torch.nn.Module | None, mini_batches: list[list[Response]], config, meter: Meter
) -> None:
    """Set ref_logprobs, [R], of all responses that this rank trains on. Collective."""
    if reference is None:
        return
    with meter("old_logprobs"):
        responses = flatten(own_share(mini_batch) for mini_batch in mini_batches)
        for indices in even_passes(micro_batches(responses, config.max_micro_batch_tokens)):
            chosen = [responses[i] for i in indices]
            batch = collate(chosen, meter.device)
            logprobs, _, _ = reference(batch, config.temperature)  # [B, R]
            parts = logprobs[batch.response_mask].cpu().split([len(r.response_ids) for r in chosen])
            for response, ref_logprobs in zip(chosen, parts, strict=True):
                response.ref_logprobs = ref_logprobs
        parallel.reshard(reference)

"""One update by one contestant, in a process of its own: its peak memory is then only its own.

    .venv/bin/python -m bench.contestants ours|entropy_only|trl FOLDER

bench/update.py starts it from the repository root; `trl` runs in TRL's environment, which has none of the modules that
`ours` imports. FOLDER holds the model and batch.json. Prints one JSON line, and saves some gradients in
FOLDER/<contestant>.pt.

All do the same work: forward, objective and backward, without the optimizer's step, from float32 weights at ratio 1.
There all clipped objectives have the same gradient. Only TRL can recompute activations, if batch.json says so.
"""

import json
import re
import sys
import time
from pathlib import Path

import torch
from torch import Tensor


def ours(folder: Path, batch: dict):
    """train.update: packed micro-batches, CE-GPPO, the entropy accounting."""
    from bench.common import rollout_of, update_passes
    from ce_gppo.model import load_model
    from ce_gppo.policy import Policy

    model, _ = load_model(str(folder))
    policy = Policy(model)

    def update(rows: list[int]) -> float:
        columns = ([batch[name][i] for i in rows] for name in ("prompt_ids", "response_ids", "advantages"))
        return update_passes(policy, rollout_of(*columns), batch["max_micro_batch_tokens"])

    return model, update


def entropy_only(folder: Path, batch: dict):
    """`ours` without the entropy accounting: logprobs and entropy, but no moment, and no sums over tokens."""
    from ce_gppo import metrics, policy

    def fold(z, m, sums, target_logits, place, temperature):
        """policy._fold without the two sums that only the moment needs."""
        inside = (place >= 0) & (place < z.shape[1])
        target_logits = target_logits + z.gather(1, place.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1) * inside
        e, ez, *others = sums
        new_m = torch.maximum(m, z.amax(1))
        shift = m - new_m
        z = z - new_m[:, None]
        p, scale = z.exp(), shift.exp()
        return new_m, (e * scale + p.sum(1), (ez + shift * e) * scale + z.mul_(p).sum(1), *others), target_logits

    policy._fold, metrics.token_sums = fold, lambda *_: metrics.Sums({}, {}, {}, {})
    return ours(folder, batch)


def trl(folder: Path, batch: dict):
    """GRPOTrainer.compute_loss and backward, loss_type dapo."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    B, longest = len(batch["response_ids"]), max(map(len, batch["response_ids"]))
    options = {"output_dir": str(folder / "trl"), "use_cpu": True, "bf16": False, "report_to": "none"}
    options |= {"loss_type": "dapo", "gradient_checkpointing": batch["trl_gradient_checkpointing"]}
    options |= {"per_device_train_batch_size": B, "num_generations": B, "max_completion_length": longest}
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),  # never called
        args=GRPOConfig(**options),
        train_dataset=Dataset.from_dict({"prompt": ["none"]}),  # never read
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.current_gradient_accumulation_steps = 1  # Trainer.train would set it
    trainer.model.train()

    def update(rows: list[int]) -> float:
        prompt_ids, prompt_mask = padded([batch["prompt_ids"][i] for i in rows], left=True)
        completion_ids, completion_mask = padded([batch["response_ids"][i] for i in rows])
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": torch.tensor([batch["advantages"][i] for i in rows]),
            "num_items_in_batch": completion_mask.sum(),
        }
        batch_loss = trainer.compute_loss(trainer.model, inputs)
        batch_loss.backward()
        return batch_loss.item()

    return trainer.model, update


def padded(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [B, T] each."""
    tensors = [torch.tensor(row) for row in rows]
    side = "left" if left else "right"
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)
    ones = [torch.ones_like(tensor) for tensor in tensors]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def memory_gib(field: str) -> float:
    """Resident memory of this process: VmRSS now, VmHWM at its peak. (ru_maxrss would start at the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 2**20


def main(contestant: str, folder: Path) -> None:
    batch = json.loads((folder / "batch.json").read_text())
    torch.set_num_threads(batch["threads"])
    model, update = globals()[contestant](folder, batch)
    rows = list(range(len(batch["response_ids"])))
    update([min(rows, key=lambda i: len(batch["response_ids"][i]))])  # warms up
    model.zero_grad()
    before = memory_gib("VmRSS")
    start = time.perf_counter()
    batch_loss = update(rows)
    taken = time.perf_counter() - start
    result = {"seconds": taken, "before_gib": before, "peak_gib": memory_gib("VmHWM"), "loss": batch_loss}
    result["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    compared = {n: p.grad for n, p in model.named_parameters() if "layers.0." in n or n == "model.norm.weight"}
    torch.save(compared, folder / f"{contestant}.pt")
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

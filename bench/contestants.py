"""One update by one contestant, in a process of its own: its peak memory is then only its own.

    .venv/bin/python -m bench.contestants ours|trl|plain FOLDER

bench/update.py starts it from the repository root; `trl` runs in TRL's environment, which has none of the modules that
`ours` imports. FOLDER holds the model and batch.json. Prints one JSON line, and saves some gradients in
FOLDER/<contestant>.pt.

All three do the same work: forward, objective and backward, without the optimizer's step, from float32 weights at
ratio 1. There all clipped objectives have the same gradient. Only TRL can recompute activations, if batch.json says so.
"""

import json
import re
import sys
import time
from pathlib import Path

import torch
from torch import Tensor


def ours(folder: Path, batch: dict):
    """The passes of train.update: packed micro-batches, CE-GPPO, the entropy accounting."""
    import train
    from bench.common import response_of
    from ce_gppo.forward import Policy, accumulate_gradients
    from ce_gppo.model import load_model
    from loss import Objective

    model, _ = load_model(str(folder))
    policy = Policy(model)

    def update(rows: list[int]) -> float:
        responses = [  # new ones each time, which have no old logprobs: ratio 1, as in the first update of a rollout
            response_of(batch["prompt_ids"][i], batch["response_ids"][i], advantage=batch["advantages"][i])
            for i in rows
        ]
        batch_loss = train.loss_of(responses, Objective())
        losses, _, _ = accumulate_gradients(
            policy, responses, batch_loss, temperature=1.0, max_tokens=batch["max_micro_batch_tokens"], device="cpu"
        )
        return sum(losses)

    return model, update


def trl(folder: Path, batch: dict):
    """GRPOTrainer.compute_loss and backward, loss_type dapo."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        loss_type="dapo",
        gradient_checkpointing=batch["trl_gradient_checkpointing"],
        per_device_train_batch_size=len(batch["response_ids"]),
        num_generations=len(batch["response_ids"]),
        max_completion_length=max(map(len, batch["response_ids"])),
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),  # never called
        args=arguments,
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


def plain(folder: Path, batch: dict):
    """The straightforward loop: the logits of every token, log_softmax, entropy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def update(rows: list[int]) -> float:
        sequences = [batch["prompt_ids"][i] + batch["response_ids"][i] for i in rows]
        input_ids, attention_mask = padded(sequences)  # [B, T] each
        mask = attention_mask[:, 1:].clone()  # [B, T - 1], aligned with targets
        for row, i in enumerate(rows):
            mask[row, : len(batch["prompt_ids"][i]) - 1] = 0
        advantages = torch.tensor([batch["advantages"][i] for i in rows])[:, None]  # [B, 1]
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        log_p = torch.log_softmax(logits, dim=-1)  # [B, T - 1, V]
        logprobs = log_p.gather(-1, input_ids[:, 1:, None]).squeeze(-1)  # [B, T - 1]
        with torch.no_grad():
            ((-(log_p.exp() * log_p).sum(-1) * mask).sum() / mask.sum()).item()  # the entropy, for a log
        ratio = (logprobs - logprobs.detach()).exp()
        clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        batch_loss = -(clipped * mask).sum() / mask.sum()
        batch_loss.backward()
        return batch_loss.item()

    return model, update


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
    model, update = {"ours": ours, "trl": trl, "plain": plain}[contestant](folder, batch)
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

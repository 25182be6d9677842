"""One update of the policy, by one contestant, in a process of its own, so that its peak memory is its own.

    python bench/contestants.py ours|trl|plain FOLDER        started by bench/update.py, for `trl` in TRL's environment

FOLDER holds the model and batch.json. Prints one JSON line, and leaves a few gradients in FOLDER/<contestant>.pt. All
three do the same: forward, objective, backward, without the optimizer's step, from float32 weights at ratio 1, where
every clipped objective has the same gradient. None recomputes activations unless batch.json says so for TRL.
"""

import json
import re
import sys
import time
from pathlib import Path

import torch
from torch import Tensor


def ours(folder: Path, batch: dict):
    """The loop of train.update: packed micro-batches, CE-GPPO, the entropy accounting."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import loss
    import packing
    import policy
    from rollout import Response

    model, _ = policy.load_model(str(folder))
    responses = [
        Response(prompt, response, torch.zeros(len(response)), False, "", advantage=advantage)
        for prompt, response, advantage in zip(
            batch["prompt_ids"], batch["response_ids"], batch["advantages"], strict=True
        )
    ]

    def update(rows: list[int]) -> float:
        chosen = [responses[i] for i in rows]
        tokens, total_loss = sum(len(r.response_ids) for r in chosen), 0.0
        for indices in packing.micro_batches(chosen, batch["max_micro_batch_tokens"]):
            micro_batch = packing.collate([chosen[i] for i in indices])
            advantages, mask = micro_batch.advantages, micro_batch.response_mask  # as padded as the logprobs
            logprobs, entropy, S = policy.forward(model, micro_batch, 1.0)
            old_logprobs, old_entropy = logprobs.detach(), entropy.detach()
            batch_loss, info = loss.policy_loss(logprobs, old_logprobs, advantages, mask, denominator=tokens)
            batch_loss.backward()
            total_loss += batch_loss.item()
            loss.update_sums(info, logprobs, entropy, S, old_logprobs, old_entropy, advantages, mask)
        return total_loss

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
    trainer.current_gradient_accumulation_steps = 1  # what Trainer.train would set
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
    """The loop that one writes first: the logits of every token, log_softmax, entropy."""
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
    """VmRSS, what is resident now, or VmHWM, the most that was. ru_maxrss would not do: it starts at the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 2**20


def main(contestant: str, folder: Path) -> None:
    batch = json.loads((folder / "batch.json").read_text())
    torch.set_num_threads(batch["threads"])
    model, update = {"ours": ours, "trl": trl, "plain": plain}[contestant](folder, batch)
    rows = list(range(len(batch["response_ids"])))
    update(
        [min(rows, key=lambda i: len(batch["response_ids"][i]))]
    )  # what happens once a process: first use of kernels
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

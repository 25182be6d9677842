"""Shared by the small base policies of the data sets: tokenizer, model, and supervised learning that stops early.

A base policy imitates right responses, of which each problem has many, until it is right in a part of its samples. The
loss decides when to stop. Every batch is drawn anew, so its loss is that of unseen examples, and its mean over the last
batches has less noise than an accuracy that could be measured in the same time.
"""

import argparse
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_linear_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from ce_gppo.messages import UserError
from data.arithmetic.prepare import positive

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(words: tuple[str, ...] = ("\\boxed{",)) -> PreTrainedTokenizerFast:
    """A token for each byte, each role, the end of a turn, padding, and each of `words`."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|pad|>",  # unused; without it Qwen2's tokenizer class adds a token beyond the vocabulary
        eos_token="<|end|>",
        extra_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, num_layers: int = 4) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 32,
            num_key_value_heads=hidden_size // 32,
            max_position_embeddings=512,
            initializer_range=hidden_size**-0.5,  # with the usual 0.02, meant for wide models, learning starts late
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# ----------------------------------------------------------------------------------------------------------------------
# Supervised learning


@dataclass
class Example:
    prompt: list[dict[str, str]]
    response: str
    least: float  # least possible loss: minus the log of the response's probability when examples are drawn, nats


def add_arguments(parser: argparse.ArgumentParser, excess: float, max_steps: int, batch_size: int) -> None:
    """The options of `imitate`, with a data set's defaults."""
    excess_help = "stop at this many nats per response above the least possible loss"
    parser.add_argument("--excess", type=above_zero, default=excess, help=excess_help)
    parser.add_argument("--max-steps", type=positive, default=max_steps, help="then the learning rate is 0: give up")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="examples per step")


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def make_folder(parser: argparse.ArgumentParser, folder: Path) -> Path:
    """Make the folder, early: an error would otherwise come after minutes of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    return folder


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def batch(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and labels, [B, T] each; -100 at tokens that are not imitated."""
    prompts = [prompt_ids(tokenizer, example.prompt) for example in examples]
    responses = [[*tokenizer.encode(example.response), tokenizer.eos_token_id] for example in examples]
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(examples), length), tokenizer.pad_token_id)  # [B, T]
    labels = torch.full((len(examples), length), -100)  # [B, T]
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
    return input_ids, labels


def imitate(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[int], list[Example]],
    excess_wanted: float,
    max_steps: int,
    batch_size: int,
) -> int:
    """Train on examples that `draw` makes, until the loss is near the least possible. Returns the number of steps.

    excess_wanted: nats per response above the least loss, mean over the last 32 batches. UserError if max_steps steps
    do not reach it.
    """
    disable_progress_bar()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    # Muon needs half as many steps, but works in bfloat16: without AVX512-BF16 each takes six times as long.
    # The learning rate falls, so near the end a few steps more or less change little.
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=max_steps)
    recent: deque[float] = deque(maxlen=32)  # excess of the last batches, nats per response
    excess, progress = math.inf, tqdm(range(max_steps), desc="base policy", unit="step", disable=None)
    for step in progress:
        examples = draw(batch_size)
        input_ids, labels = batch(tokenizer, examples)  # [B, T] each
        logits = model(input_ids=input_ids).logits[:, :-1]  # [B, T - 1, V]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens = (labels != -100).sum().item()
        recent.append((loss.item() * tokens - sum(example.least for example in examples)) / batch_size)
        excess = sum(recent) / len(recent)
        progress.set_postfix(excess=f"{excess:.2f}")
        if progress.disable and (step + 1) % 100 == 0:  # no terminal: plain lines for the log
            print(f"base policy: step {step + 1}, excess {excess:.2f} nats", flush=True)
        if excess <= excess_wanted:
            break
    progress.close()
    if excess > excess_wanted:
        raise UserError(f"excess of {excess:.2f} nats after {max_steps} steps, above {excess_wanted}; allow more")
    return step + 1


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def sample(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[list[dict[str, str]]], max_tokens: int
) -> tuple[list[str | None], float]:
    """A response to each prompt at temperature 1 (None: it did not end), and the mean entropy in nats per token."""
    model.eval()
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    responses: list[str | None] = [None] * len(prompts)
    entropy, tokens = 0.0, 0
    for length in sorted(set(map(len, ids))):  # prompts of one length need no padding
        same = [i for i, row in enumerate(ids) if len(row) == length]
        for some in (same[i : i + 256] for i in range(0, len(same), 256)):
            rows = torch.tensor([ids[i] for i in some])  # [B, P]
            options = {"do_sample": True, "top_k": 0, "max_new_tokens": max_tokens, "output_logits": True}
            out = model.generate(rows, attention_mask=torch.ones_like(rows), return_dict_in_generate=True, **options)
            sampled = out.sequences[:, length:]  # [B, R]
            ended = (sampled == tokenizer.eos_token_id).int()
            mask = ended.cumsum(1) - ended == 0  # [B, R]  the end-of-sequence token included
            log_p = torch.stack(out.logits, 1).log_softmax(-1)  # [B, R, V]
            entropy -= ((log_p.exp() * log_p).sum(-1) * mask).sum().item()
            tokens += mask.sum().item()
            for i, row in zip(some, tokenizer.batch_decode(sampled), strict=True):
                response, end, _ = row.partition(tokenizer.eos_token)
                responses[i] = response if end else None
    return responses, entropy / tokens


def summary(folder: Path, model: Qwen2ForCausalLM, steps: int, scores: list[float], k: int, entropy: float) -> str:
    """A line about a base policy. scores: of k samples of each problem in turn. entropy: nats per token."""
    groups = [scores[i : i + k] for i in range(0, len(scores), k)]
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{folder}: {parameters / 1e6:.2f} M parameters, {steps} steps; at temperature 1 accuracy "
        f"{sum(scores) / len(scores):.2f}, pass@{k} {sum(map(max, groups)) / len(groups):.2f}, entropy "
        f"{entropy:.2f} nats per token"
    )

"""The base policy of `arithmetic`: a 0.9 M parameter Qwen2, warm-started by supervised learning, and stopped early.

    python -m data.arithmetic.base           writes the folder base/ beside this file, in about a minute on two cores

Mediocre on purpose: it imitates right workings in random orders until about one sampled answer in four is right, so
that reinforcement learning finds much to improve and much diversity to lose. It never sees a held-out problem.

When to stop is read from the loss. Every batch has new problems, so its loss is that of unseen ones; and the mean over
the last batches is steadier than any share of right samples that could be drawn in the same time.
"""

import math
import random
from collections import Counter, deque

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, get_linear_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from ce_gppo.config import command
from ce_gppo.types import UserError
from data.arithmetic.prepare import arguments, positive, problem, prompt, show, splits, working

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, one for each role, one for the end of a turn, one for padding, and one for `\\boxed{`."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|pad|>",  # bytes need none, but Qwen2's tokenizer class would add one past the model's vocabulary
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
            initializer_range=hidden_size**-0.5,  # at the usual 0.02, meant for wide models, learning starts late
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, terms: list[int]) -> list[int]:
    text = tokenizer.apply_chat_template(prompt(terms), tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, problems: list[list[int]]):
    """input_ids and labels, [B, T] each; -100 where there is nothing to imitate."""
    prompts = [prompt_ids(tokenizer, terms) for terms in problems]
    workings = [[*tokenizer.encode(working(rng, terms)), tokenizer.eos_token_id] for terms in problems]
    length = max(len(p) + len(w) for p, w in zip(prompts, workings, strict=True))
    input_ids = torch.full((len(problems), length), tokenizer.pad_token_id)  # [B, T]
    labels = torch.full((len(problems), length), -100)  # [B, T]
    for i, (p, w) in enumerate(zip(prompts, workings, strict=True)):
        input_ids[i, : len(p) + len(w)] = torch.tensor(p + w)
        labels[i, len(p) : len(p) + len(w)] = torch.tensor(w)
    return input_ids, labels


def least_loss(terms: list[int]) -> float:
    """Nats that a working costs whoever knows all of them: the log of how many there are. Equal terms make fewer."""
    return math.lgamma(len(terms) + 1) - sum(math.lgamma(times + 1) for times in Counter(terms).values())


@torch.no_grad()
def pass_rate(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[list[int]]) -> float:
    """Share of right answers, one sample a problem at temperature 1."""
    model.eval()
    by_length: dict[int, list[list[int]]] = {}  # prompts of one length need no padding
    for terms in problems:
        by_length.setdefault(len(show(terms)), []).append(terms)
    right = 0
    for group in by_length.values():
        for some in (group[i : i + 256] for i in range(0, len(group), 256)):
            ids = torch.tensor([prompt_ids(tokenizer, terms) for terms in some])  # [B, P]
            limit = 16 * len(some[0])  # tokens: one line a term, none longer while totals have three digits
            mask = torch.ones_like(ids)
            rows = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=limit)  # [B, P + R]
            for terms, row in zip(some, rows.tolist(), strict=True):
                right += tokenizer.decode(row).split("<|pad|>")[0].endswith(f"\\boxed{{{sum(terms)}}}<|end|>")
    return right / len(problems)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--excess", type=float, default=2.5, help="stop at so many nats a working above the least loss")
    parser.add_argument("--max-steps", type=positive, default=900, help="the learning rate is 0 then: give up")
    parser.add_argument("--batch-size", type=positive, default=16, help="workings a step")
    args = parser.parse_args()
    if not args.excess > 0:
        parser.error(f"argument --excess: must be above 0, not {args.excess}")
    out = args.out / "base"
    try:
        out.mkdir(parents=True, exist_ok=True)  # now, before a minute is spent
    except OSError as error:
        parser.error(f"argument --out: {error}")
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    _, held_out = splits(args.seed, args.terms, args.largest, args.train, args.held_out)
    forbidden = {show(terms) for terms in held_out}

    disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99))
    # Muon needs half as many steps, but works in bfloat16: without AVX512-BF16 each takes six times as long.
    # The falling learning rate flattens the curve where it stops: a few steps more or less change little.
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=args.max_steps)

    recent: deque[float] = deque(maxlen=32)  # excess of the last batches, nats a working
    excess, progress = math.inf, tqdm(range(args.max_steps), desc="base policy", unit="step", disable=None)
    for step in progress:
        problems: list[list[int]] = []
        while len(problems) < args.batch_size:
            terms = problem(rng, args.terms, args.largest)
            if show(terms) not in forbidden:
                problems.append(terms)
        input_ids, labels = batch(tokenizer, rng, problems)  # [B, T] each
        logits = model(input_ids=input_ids).logits[:, :-1]  # [B, T - 1, V]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens = (labels != -100).sum().item()
        recent.append((loss.item() * tokens - sum(map(least_loss, problems))) / len(problems))
        excess = sum(recent) / len(recent)
        progress.set_postfix(excess=f"{excess:.2f}")
        if progress.disable and (step + 1) % 100 == 0:  # no terminal: plain lines for the log
            print(f"base policy: step {step + 1}, excess {excess:.2f} nats", flush=True)
        if excess <= args.excess:
            break
    progress.close()
    if excess > args.excess:
        raise UserError(f"excess of {excess:.2f} nats after {args.max_steps} steps, above {args.excess}; allow more")

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    rate = pass_rate(model, tokenizer, 4 * held_out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {parameters / 1e6:.2f} M parameters, {step + 1} steps, pass rate {rate:.2f} at temperature 1")


if __name__ == "__main__":
    command(main)

"""The base policy of `arithmetic`: a 0.9 M parameter Qwen2, warm-started by supervised learning, and stopped early.

    python data/arithmetic/base.py           writes the folder base/ beside this file, in about a minute on two cores

Mediocre on purpose: it imitates right workings in random orders until about one sampled answer in four is right, so
that reinforcement learning finds much to improve and much diversity to lose. It never sees a held-out problem.
"""

import random

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from prepare import arguments, problem, prompt, show, splits, working

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


@torch.no_grad()
def pass_rate(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[list[int]]) -> float:
    """Share of right answers, one sample a problem at temperature 1."""
    model.eval()
    by_length: dict[int, list[list[int]]] = {}
    for terms in problems:
        by_length.setdefault(len(show(terms)), []).append(terms)
    right = 0
    for group in by_length.values():
        ids = torch.tensor([prompt_ids(tokenizer, terms) for terms in group])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=64)
        for terms, row in zip(group, out.tolist(), strict=True):
            right += tokenizer.decode(row).split("<|pad|>")[0].endswith(f"\\boxed{{{sum(terms)}}}<|end|>")
    model.train()
    return right / len(problems)


def main() -> None:
    parser = arguments()
    parser.add_argument("--pass-rate", type=float, default=0.25, help="stop when this share of samples is right")
    parser.add_argument("--max-steps", type=int, default=1500, help="give up after this many steps")
    parser.add_argument("--batch-size", type=int, default=32, help="workings a step")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    _, held_out = splits(args.seed, args.terms, args.largest, args.train, args.held_out)
    forbidden = {show(terms) for terms in held_out}
    probe = [problem(rng, args.terms, args.largest) for _ in range(384)]

    disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    # Muon for the matrices learns this task in about half the steps of AdamW alone.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95))]
    warmup = [torch.optim.lr_scheduler.LinearLR(o, start_factor=0.02, total_iters=50) for o in optimizers]

    rate, progress = 0.0, tqdm(range(args.max_steps), desc="base policy", unit="step", disable=None)
    for step in progress:
        problems: list[list[int]] = []
        while len(problems) < args.batch_size:
            terms = problem(rng, args.terms, args.largest)
            if show(terms) not in forbidden:
                problems.append(terms)
        input_ids, labels = batch(tokenizer, rng, problems)
        logits = model(input_ids=input_ids).logits[:, :-1]  # [B, T - 1, V]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *warmup):
            stepper.step()
        if step >= 250 and step % 25 == 0:
            rate = pass_rate(model, tokenizer, probe)
            if progress.disable:  # no terminal: plain lines for the log
                print(f"base policy: step {step}, pass rate {rate:.2f}", flush=True)
            if rate >= args.pass_rate:
                break
        progress.set_postfix(loss=f"{loss.item():.2f}", pass_rate=f"{rate:.2f}")
    progress.close()
    if rate < args.pass_rate:
        raise SystemExit(f"base.py: the pass rate is {rate:.2f} after {args.max_steps} steps, below {args.pass_rate}")

    out = args.out / "base"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {parameters / 1e6:.2f} M parameters, {step + 1} steps, pass rate {rate:.2f} at temperature 1")


if __name__ == "__main__":
    main()

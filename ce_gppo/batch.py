"""The data of a step: a Rollout in columns, its parts for ranks and passes, and their packed form for the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ce_gppo import parallel

BY_TOKEN = ("tokens", "rollout_logprobs", "advantages", "old_logprobs", "entropy", "reference_logprobs")
BY_TOKEN += ("values", "returns", "token_mask")
REPEATED = 0.25  # of a token's memory, at most, is what packed attention keeps of each repetition of a prompt


@dataclass(frozen=True)
class Rollout:
    """P prompts, B responses and the N tokens of these responses, one response after another, without padding.

    The engine gives the first part. Later parts of a step add a column by making a new Rollout (dataclasses.replace).
    Masks come from lengths, never from token ids: padding may be the end-of-sequence token.
    """

    prompts: list[list[int]]  # P  token ids, each prompt once; a part of a rollout keeps them all
    prompt_of: Tensor  # [B]  index in `prompts`; responses to one prompt are neighbours
    lengths: Tensor  # [B]  tokens of each response
    tokens: Tensor  # [N]  exactly as sampled, the end-of-sequence token included
    rollout_logprobs: Tensor  # [N]  vLLM's, of the distribution sampled from, temperature included
    truncated: Tensor  # [B]  bool: stopped by the length limit, not by an end-of-sequence token
    texts: list[str]  # B  for the verifier and for people; never tokenized again

    components: list[dict[str, float]] | None = None  # B  of the reward, from the verifier
    correct: Tensor | None = None  # [B]  bool
    rewards: Tensor | None = None  # [B]  float64: the sum of the components, and the penalty for length
    advantages: Tensor | None = None  # [N]  equal for all tokens of a response, or with a critic one for each token
    old_logprobs: Tensor | None = None  # [N]  under the weights that sampled, the trainer's or vLLM's
    entropy: Tensor | None = None  # [N]  nats, under those weights
    reference_logprobs: Tensor | None = None  # [N]  of the model that the run began with
    values: Tensor | None = None  # [N]  the critic's, before its updates
    returns: Tensor | None = None  # [N]  what the critic should have predicted
    token_mask: Tensor | None = None  # [N]  bool: the tokens that the objective picks
    index: Tensor | None = None  # [B]  number of the response among those of the step

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sequence(self) -> Tensor:
        """The response of each token, [N]: `rewards[sequence]` is each token's reward."""
        return torch.arange(len(self), device=self.lengths.device).repeat_interleave(self.lengths)

    @property
    def sizes(self) -> Tensor:
        """Tokens of prompt and response together, [B]."""
        return self.lengths.new_tensor([len(ids) for ids in self.prompts])[self.prompt_of] + self.lengths

    def by_group(self, values: Tensor) -> Tensor:
        """[B] -> [P, G], where all prompts have equally many responses."""
        return values.reshape(len(self.prompts), -1)

    def __getitem__(self, responses) -> Rollout:
        """These responses, in this order. responses: indices, a slice, or a bool for each."""
        rows = torch.arange(len(self))[responses]  # [b]
        lengths = self.lengths[rows]
        shift = (self.lengths.cumsum(0) - self.lengths)[rows] - (lengths.cumsum(0) - lengths)
        tokens = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)  # [n]

        def part(name: str, column):
            if column is None or name == "prompts":
                return column
            if isinstance(column, list):
                return [column[i] for i in rows.tolist()]
            return column[tokens if name in BY_TOKEN else rows]

        return Rollout(**{name: part(name, column) for name, column in vars(self).items()})

    def without(self, parts: list[Tensor]) -> Tensor:
        """The responses that are in none of the parts, which are indices: [b]."""
        used = torch.cat([torch.zeros(0, dtype=torch.long), *parts])
        return (~torch.isin(torch.arange(len(self)), used)).nonzero()[:, 0]

    def with_missing(self, **columns: Tensor) -> Rollout:
        """With those of the columns that it does not have yet."""
        return replace(self, **{name: column for name, column in columns.items() if getattr(self, name) is None})

    def to(self, device: str) -> Rollout:
        moved = {name: column.to(device) for name, column in vars(self).items() if isinstance(column, Tensor)}
        return replace(self, **moved)


def concat(parts: list[Rollout]) -> Rollout:
    """Parts of one rollout, which have the same prompts, one after another, with the columns that all of them have."""

    def join(name: str, columns: list):
        if name == "prompts" or any(column is None for column in columns):
            return columns[0] if name == "prompts" else None
        return torch.cat(columns) if isinstance(columns[0], Tensor) else list(itertools.chain(*columns))

    return Rollout(**{name: join(name, [getattr(part, name) for part in parts]) for name in vars(parts[0])})


def append(first: Rollout | None, second: Rollout) -> Rollout:
    """Rollouts of different prompts as one."""
    if first is None:
        return second
    prompts = first.prompts + second.prompts
    shifted = replace(second, prompts=prompts, prompt_of=second.prompt_of + len(first.prompts))
    return concat([replace(first, prompts=prompts), shifted])


def gather(rollout: Rollout, prompts: list[list[int]], own: list[int]) -> Rollout:
    """All ranks' rollouts as one, in the order of all `prompts`; own: which of them this rank has sampled. Collective.

    Ranks that share an engine have the same prompts, which count once: the first rank's, which judges the responses.
    """
    rollout = replace(rollout, prompts=prompts, prompt_of=torch.tensor(own, dtype=torch.long)[rollout.prompt_of])
    by_rank = reversed(parallel.all_gather((own, rollout)))
    parts = {min(numbers, default=-1): part for numbers, part in by_rank}  # by engine
    whole = concat(list(parts.values()))
    return whole[whole.prompt_of.argsort(stable=True)]


def local_batch(rollout: Rollout) -> Rollout:
    """The responses that this rank works on, in their order; the ranks' shares have nearly equal numbers of tokens."""
    columns = (column.tolist() for column in (rollout.prompt_of, rollout.sizes, rollout.lengths))
    return rollout[torch.tensor(parallel.deal(*columns, parallel.world_size())) == parallel.rank()]


def micro_batches(rollout: Rollout, max_tokens: int, repeated: float = REPEATED) -> list[Rollout]:
    """Parts of at most max_tokens tokens, in order. Every rank gets the same number, some perhaps empty.

    Neighbours that share a prompt have it once in a part; attention sees it in each sequence, see REPEATED. A response
    that is longer gets a part of its own. Collective.
    """
    cuts, tokens, previous = [0], 0, None
    columns = (column.tolist() for column in (rollout.prompt_of, rollout.sizes, rollout.lengths))
    for i, (prompt, size, length) in enumerate(zip(*columns, strict=True)):
        tokens += length + repeated * (size - length) if prompt == previous else size
        if tokens > max_tokens and i > cuts[-1]:
            cuts.append(i)
            tokens = size  # its prompt once more
        previous = prompt
    cuts += [len(rollout)] * (len(rollout) > 0)
    count = max(parallel.all_gather(len(cuts) - 1))
    cuts += [len(rollout)] * (count + 1 - len(cuts))
    return [rollout[a:b] for a, b in itertools.pairwise(cuts)]


def with_token_mask(rollout: Rollout, token_filter: Callable | None) -> Rollout:
    """This rank's share of a mini-batch, with the tokens that the filter picks in the whole of it. Collective."""
    if token_filter is None:
        return rollout
    parts = parallel.all_gather(torch.stack([rollout.old_logprobs, rollout.entropy, rollout.advantages]))  # [3, n]
    mask = token_filter(*torch.cat(parts, 1)).split([part.shape[1] for part in parts])[parallel.rank()]
    return replace(rollout, token_mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Packing


@dataclass
class Packing:
    """Which packed tokens form which sequence. Only attention needs it; all other layers work token by token."""

    order: Tensor  # [M]  packed indices of the sequences' tokens, one sequence after another, shared prompts repeated
    inverse: Tensor  # [L]  an index in `order` of each packed token
    is_identity: bool  # both are 0, 1, 2, ..., so no token has to be moved
    starts: Tensor  # [B + 1]  int32, the first index of each sequence in `order`, and the end
    longest: int  # tokens
    blocks: list[tuple[int, int]]  # on a CPU: `order` as padded blocks [b, t] of sequences of similar length


@dataclass
class Packed:
    """Prompts and responses as the model sees them: L tokens without padding. A group's prompt is there once."""

    input_ids: Tensor  # [L]
    position_ids: Tensor  # [L]
    predecessors: Tensor  # [N]  packed index of the token before each response token
    targets: Tensor  # [N]  the response tokens
    packing: Packing


def pack(rollout: Rollout, device: str = "cpu") -> Packed:
    """An empty rollout gives two tokens and no targets, for a rank that has nothing to compute."""
    ids, positions, predecessors = [], [], []
    sequences: list[list[int]] = []  # packed indices of each sequence's tokens
    previous, prompt = None, range(0)
    responses = rollout.tokens.split(rollout.lengths.tolist())
    for number, response in zip(rollout.prompt_of.tolist(), responses, strict=True):
        if number != previous:
            previous, prompt = number, range(len(ids), len(ids) + len(rollout.prompts[number]))
            ids += rollout.prompts[number]
            positions += range(len(prompt))
        own = range(len(ids), len(ids) + len(response))
        ids += response.tolist()
        positions += range(len(prompt), len(prompt) + len(response))
        predecessors += [prompt[-1], *own[:-1]] if own else []
        sequences.append([*prompt, *own])
    if not sequences:
        ids, positions, sequences = [0, 0], [0, 1], [[0, 1]]  # with one token dynamo would compile anew
    packing = _pack(sequences, len(ids), device)
    columns = (torch.tensor(x, dtype=torch.long, device=device) for x in (ids, positions, predecessors))
    return Packed(*columns, rollout.tokens.to(device), packing)


def _pack(sequences: list[list[int]], tokens: int, device: str) -> Packing:
    """sequences: the packed indices of each sequence's tokens. tokens: how many of these are distinct.

    On a GPU attention takes sequences of any length. On a CPU it takes blocks, which have some padding.
    """
    on_gpu = device.startswith("cuda")
    sequences = sequences if on_gpu else sorted(sequences, key=len)
    blocks = [] if on_gpu else similar_lengths([len(s) for s in sequences])
    lengths = [t for b, t in blocks for _ in range(b)] or [len(s) for s in sequences]
    starts = [0, *itertools.accumulate(lengths)]
    order = [0] * starts[-1]  # padding stays 0: a real token, whose result is never read
    inverse = [0] * tokens
    for sequence, start in zip(sequences, starts[:-1], strict=True):
        order[start : start + len(sequence)] = sequence
        for place, token in enumerate(sequence, start):  # a shared prompt's copies have equal results
            inverse[token] = place
    is_identity = order == list(range(tokens))
    order, inverse = torch.tensor(order, device=device), torch.tensor(inverse, device=device)
    starts = torch.tensor(starts, dtype=torch.int32, device=device)
    return Packing(order, inverse, is_identity, starts, max(lengths), blocks)


def similar_lengths(lengths: list[int], waste: float = 0.15) -> list[tuple[int, int]]:
    """Ascending lengths -> blocks (number of sequences, longest), each with at most this share of padding."""
    blocks, first, tokens = [], 0, 0
    for i, length in enumerate(lengths):
        if (i - first + 1) * length * (1 - waste) > tokens + length:
            blocks.append((i - first, lengths[i - 1]))
            first, tokens = i, 0
        tokens += length
    return [*blocks, (len(lengths) - first, lengths[-1])]

"""avg@k, pass@k and majority@k of a model, and a file of all responses with their verdicts.

python -m tools.evaluate --model out/<run>/checkpoint-000040                          held-out problems of walk
python -m tools.evaluate --model <folder or hub name> --bench aime24,aime25 --k 32    data/benchmarks/<name>.jsonl each
python -m tools.evaluate --compare out/eval/a.jsonl out/eval/b.jsonl                  two results, problem by problem

The same command continues a stopped evaluation, which ends with the same responses.
"""

import hashlib
import json
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from ce_gppo import ranges as t
from ce_gppo.checkpoint import NAME
from ce_gppo.config import command, read_record
from ce_gppo.evaluation import evaluate
from ce_gppo.messages import UserError
from ce_gppo.model import load_tokenizer
from ce_gppo.problems import Problem, check_files, check_tokens, load_problems
from ce_gppo.run import lock_file, open_to_append
from reward import MARKS, assign, extract_answer, files, score
from rollout import Engine, prepare_environment
from tools.tables import compare, print_table, read_results


@dataclass
class Config:
    model: t.Name = "data/walk/base"  # folder or hub name
    # What is left at None is the run's own for a checkpoint of a run, or else what stands in brackets.
    bench: t.Name | None = None  # names as in data/benchmarks/<name>.jsonl, or JSONL files, "a,b" [walk's]
    k: t.Count | None = None  # samples per problem [8; the paper: AIME24, AIME25, HMMT25, AMC23: 32; MATH500: 4]
    temperature: t.GreedyOrTemperature | None = None  # [0.6, the paper's]
    top_p: t.Share | None = None  # 1.0 turns it off [0.95, the paper's]
    max_prompt_tokens: t.Count | None = None  # problems with longer prompts are dropped, and counted [4096]
    max_response_tokens: t.Count | None = None  # longer are cut; AIME: 32768 [16384, or what the context leaves]
    system_prompt: str | None = None  # instead of a row's own system message ["": the row as it is, as in the paper]
    prompt_suffix: str | None = None  # a line after each problem, such as an instruction to box the answer [""]
    template_switches: str | None = None  # of the model's chat template, such as "enable_thinking=false" [""]
    thinking: bool = False  # count only answers that follow </think>; a response without it scores 0
    rewards: str | None = None  # verifiers, "source=verifier,source2=mine.py:score" [by the source's name, else math]
    out: t.NameOrEmpty = ""  # JSONL file of the responses; empty: out/eval/<model>.<benchmarks>.k<k>.jsonl
    write_every: t.Count = 512  # responses sampled between two writes: a killed run loses at most these
    gpu_memory_utilization: t.Share = 0.9  # share of the GPU's memory for vLLM
    seed: t.Seed = 0
    compare: tuple[str, str] | None = None  # two result files: the problems on which the second is better or worse


def main(config: Config) -> None:
    if config.compare:
        return compare(*config.compare)
    config = complete(config)
    if config.temperature == 0 and config.k > 1:
        raise UserError(f"temperature = 0 gives {config.k} equal samples; use k = 1")
    paths = [name if name.endswith(".jsonl") else f"data/benchmarks/{name}.jsonl" for name in config.bench.split(",")]
    check_files(*paths)  # before a large model is downloaded
    files(config.rewards)
    known, tokenizer = load_tokenizer(config.model)
    limit = known.max_position_embeddings
    longest = min(config.max_prompt_tokens, limit - 1)
    texts = config.system_prompt, config.prompt_suffix, config.template_switches
    problems, dropped = load_problems(",".join(paths), tokenizer, longest, *texts)
    verifiers, (problems,) = assign(config.rewards, problems)
    check_tokens(problems, known.vocab_size, tokenizer, config.thinking, MARKS)
    longest = max(len(problem.prompt_ids) for problem in problems)
    max_tokens = config.max_response_tokens or min(16384, limit - longest)
    if longest + max_tokens > limit:
        raise UserError(
            f"max_response_tokens = {max_tokens} after a prompt of {longest} is beyond the context of {limit}"
        )

    settings = settings_of(config, problems, max_tokens)
    path = Path(config.out or default_out(config, problems))
    size = max(1, config.write_every // config.k)  # problems per chunk; each has its own seed, so it can be redone
    chunks = [problems[i : i + size] for i in range(0, len(problems), size)]
    if path.is_dir():
        raise UserError(f"--out {path}: a folder is there; name a file")
    if path.exists():
        lock(path.open())  # an early error if another evaluation has it; closed at once
    rows = resumed(path, settings, [len(chunk) * config.k for chunk in chunks])
    done = len({row["problem"] for row in rows})
    print(
        f"problems   {len(problems)} x {config.k} samples, {dropped} dropped for a prompt that is too long; {verifiers}"
    )
    print(f"sampling   temperature {config.temperature:g}, top_p {config.top_p:g}, at most {max_tokens} tokens")
    print(f"responses  {path}" + (f", {done} problems were there already" if done else ""), flush=True)

    if done < len(problems):
        file = lock(open_to_append(path, "--out"))
        prepare_environment()
        memory = {"gpu_memory_utilization": config.gpu_memory_utilization}
        engine = Engine(config.model, tokenizer, context=longest + max_tokens, seed=config.seed, **memory)
        with file:
            if not rows:
                file.write(json.dumps({"settings": settings, "problems": len(problems)}) + "\n")
            for number in tqdm(range(done // size, len(chunks)), unit="chunk", disable=None):
                new = sample_chunk(engine, chunks[number], number, number * size, max_tokens, config)
                file.writelines(json.dumps(row) + "\n" for row in new)
                file.flush()
                os.fsync(file.fileno())
                rows += new
    print_table(rows, config.k)


def complete(config: Config) -> Config:
    """Without None: as the run evaluates whose checkpoint the model is, or else with the usual values."""
    values = {"bench": "data/walk/eval.jsonl", "k": 8, "temperature": 0.6, "top_p": 0.95, "max_prompt_tokens": 4096}
    values |= {"system_prompt": "", "prompt_suffix": "", "template_switches": "", "rewards": ""}
    record = Path(config.model).parent / "config.json"
    if NAME.fullmatch(Path(config.model).name) and record.is_file():
        saved = read_record(record)["config"]
        of_run = {"bench": "eval_data", "k": "eval_samples", "temperature": "eval_temperature", "top_p": "eval_top_p"}
        values = {name: saved.get(of_run.get(name, name), usual) for name, usual in values.items()}
        values["max_response_tokens"] = saved.get("eval_response_tokens")
        config = replace(config, thinking=config.thinking or saved.get("thinking", False))
    return replace(config, **{name: value for name, value in values.items() if getattr(config, name) is None})


def settings_of(config: Config, problems: list[Problem], max_tokens: int) -> dict:
    """All settings that change responses or verdicts, with fingerprints of the weights, the data and the verifiers."""
    settings = asdict(config) | {"max_response_tokens": max_tokens, "weights": fingerprint(config.model)}
    data = json.dumps([[p.prompt, p.answer] for p in problems]).encode()
    settings["data"] = hashlib.sha256(data + b"".join(path.read_bytes() for path in files(config.rewards))).hexdigest()
    for name in ("out", "compare", "gpu_memory_utilization"):  # these change no response
        del settings[name]
    return settings


def sample_chunk(
    engine: Engine, problems: list[Problem], number: int, first: int, max_tokens: int, config: Config
) -> list[dict]:
    """The rows of a chunk, which has its own seed; `first` is the number of its first problem."""
    rollout = evaluate(
        engine,
        problems,
        config.k,
        score=score,
        thinking=config.thinking,
        max_tokens=max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=random.Random(f"{config.seed} {number}").getrandbits(32),
    )
    columns = rollout.prompt_of, rollout.lengths, rollout.truncated, rollout.correct
    rows = []
    for j, (i, tokens, truncated, correct) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        problem, text = problems[i], rollout.texts[j]
        where = {"problem": first + i, "sample": j % config.k, "source": problem.source, "question": problem.question}
        extracted = extract_answer(text, problem.verifier, thinking=config.thinking)
        verdict = {"answer": problem.answer, "extracted": extracted, "correct": correct}
        rows.append(where | verdict | {"tokens": tokens, "truncated": truncated, "response": text})
    return rows


def lock(file: TextIO) -> TextIO:
    """The open file, locked until it is closed. UserError if another evaluation has locked it."""
    if not lock_file(file):
        raise UserError(f"{file.name}: another evaluation is writing it; wait for it, or name another file with --out")
    return file


def fingerprint(model: str) -> str:
    """A hash of the weights in a folder, from size, first and last MiB of each file. Empty for a hub name."""
    digest = hashlib.sha256()
    for path in sorted(Path(model).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read())
    return digest.hexdigest() if Path(model).is_dir() else ""


def default_out(config: Config, problems: list[Problem]) -> str:
    model = config.model.strip("/").removeprefix("out/").replace("/", "-")[-100:]
    sources = list(dict.fromkeys(p.source.replace("/", "-") for p in problems))
    names = "-".join(sources) if len("-".join(sources)) <= 100 else f"{len(sources)}-sources"
    return f"out/eval/{model}.{names}.k{config.k}-t{config.temperature:g}.jsonl"


def resumed(path: Path, settings: dict, chunk_rows: list[int]) -> list[dict]:
    """The rows of the complete chunks; cuts the file after them. UserError if it was made with other settings."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    header, rows = read_results(path)
    was = header["settings"]
    if other := sorted(name for name in was.keys() | settings.keys() if was.get(name) != settings.get(name)):
        name = other[0]
        raise UserError(
            f"{path} was made with other settings ({', '.join(other)}: {name} was {was.get(name)!r}, is "
            f"{settings.get(name)!r}); choose another file with --out, or remove it"
        )
    whole = 0
    for count in chunk_rows:
        if whole + count > len(rows):
            break
        whole += count
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, sum(map(len, lines[: whole + 1])) if whole else 0)  # without rows the header is written again
    return rows[:whole]


if __name__ == "__main__":
    command(main, Config, __doc__)

"""The table of an evaluation, and the differences between two, from the files that tools/evaluate.py writes."""

import json
from pathlib import Path

import numpy as np

from ce_gppo.messages import UserError
from reward import score


def read_results(path: Path) -> tuple[dict, list[dict]]:
    """(header, rows) of a result file; a half-written line at its end is left out."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; evaluate.py writes such files, and prints their paths")
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    header, *others = rows or [None]
    whole = isinstance(header, dict) and header.keys() == {"settings", "problems"}
    if not whole or not isinstance(header["settings"], dict) or not all(isinstance(row, dict) for row in others):
        raise UserError(f"{path}: not a result file of evaluate.py; its first line has no settings")
    return header, others


def by_problem(rows: list[dict]) -> dict[str, dict[tuple[str, int], list[dict]]]:
    """source -> problem -> its samples, in the order of the file. A problem is (question, count of earlier equal ones).

    A question is only the last message, so several problems may have the same one.
    """
    groups: dict[str, dict[tuple[str, int], list[dict]]] = {}
    keys: dict[int, tuple[str, int]] = {}
    for row in rows:
        problems = groups.setdefault(row["source"], {})
        if row["problem"] not in keys:
            keys[row["problem"]] = row["question"], sum(question == row["question"] for question, _ in problems)
        problems.setdefault(keys[row["problem"]], []).append(row)
    return groups


def rate(samples: list[dict]) -> float:
    return sum(sample["correct"] for sample in samples) / len(samples)


def majority(samples: list[dict]) -> bool:
    """Whether the most frequent answer is right. All right answers count as one, and so do wrong answers that the
    verifier finds equal. Of equally frequent answers the first counts. Responses without an answer are left out."""
    votes: dict[str | bool, int] = {}  # the key True: all right answers; a text: all wrong answers equal to it
    for sample in samples:
        answer = True if sample["correct"] else sample["extracted"]
        if answer is None:
            continue
        wrong = [other for other in votes if other is not True]
        if answer is not True and answer not in wrong:
            scores = score([f"\\boxed{{{answer}}}"] * len(wrong), wrong, timeout=1.0, budget=10.0)
            answer = next((o for o, parts in zip(wrong, scores, strict=True) if parts["correctness"]), answer)
        votes[answer] = votes.get(answer, 0) + 1
    return bool(votes) and max(votes, key=votes.get) is True


def bootstrap(values: list[float], resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, one per problem, over problems drawn again with replacement."""
    values, generator = np.array(values), np.random.default_rng(0)
    size = 100, len(values)  # 100 at a time: all 10,000 of a large benchmark would take gigabytes
    means = [values[generator.integers(len(values), size=size)].mean(-1) for _ in range(resamples // 100)]
    return tuple(np.quantile(np.concatenate(means), [0.025, 0.975]).tolist())


def print_table(rows: list[dict], k: int) -> None:
    lines = [
        ("benchmark", "problems", f"avg@{k}", "95 % interval", f"pass@{k}", f"majority@{k}", "tokens", "truncated")
    ]
    averages = []
    for source, problems in by_problem(rows).items():
        rates = [rate(samples) for samples in problems.values()]
        low, high = bootstrap(rates)
        samples = [sample for group in problems.values() for sample in group]
        averages.append(sum(rates) / len(rates))
        lines.append(
            (
                source,
                str(len(problems)),
                f"{averages[-1]:.4f}",
                f"{low:.4f} - {high:.4f}",
                f"{sum(r > 0 for r in rates) / len(rates):.4f}",
                f"{sum(majority(group) for group in problems.values()) / len(rates):.4f}",
                f"{sum(sample['tokens'] for sample in samples) / len(samples):.1f}",
                f"{sum(sample['truncated'] for sample in samples) / len(samples):.4f}",
            )
        )
    if len(averages) > 1:
        lines.append(("average", "", f"{sum(averages) / len(averages):.4f}", "", "", "", "", ""))
    print_columns(lines)


def print_columns(lines: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def compare(first: str, second: str) -> None:
    """Print the differences between two result files, by benchmark and by problem. Both must have the same problems."""
    results = []
    for path in (first, second):
        header, rows = read_results(Path(path))
        if len({row["problem"] for row in rows}) < header["problems"]:
            raise UserError(f"{path}: not finished; the command that made it continues it")
        results.append(by_problem(rows))
    a, b = results
    keys = [{(source, *problem) for source in result for problem in result[source]} for result in results]
    if keys[0] != keys[1]:
        source, question, _ = min(keys[0] ^ keys[1])
        raise UserError(
            f"{first} and {second} have different problems, {len(keys[0] ^ keys[1])} in only one of them, such as "
            f"{question[:60]!r} of {source}"
        )
    lines = [("benchmark", "problems", "first", "second", "difference", "95 % interval", "gained", "lost")]
    changed = []
    for source in a:
        pairs = [(rate(samples), rate(b[source][problem])) for problem, samples in a[source].items()]
        differences = [after - before for before, after in pairs]
        low, high = bootstrap(differences)
        means = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
        lines.append(
            (
                source,
                str(len(pairs)),
                *(f"{mean:.4f}" for mean in means),
                f"{means[1] - means[0]:+.4f}",
                f"{low:+.4f} - {high:+.4f}",
                str(sum(difference > 0 for difference in differences)),
                str(sum(difference < 0 for difference in differences)),
            )
        )
        for (question, _), (before, after) in zip(a[source], pairs, strict=True):
            if before != after:
                text = " ".join(question.split())[:80]
                changed.append((after - before, f"{source}  {before:.3f} -> {after:.3f}  {text}"))
    print_columns(lines)
    for _, line in sorted(changed, key=lambda change: -change[0]):
        print(line)

"""Two processes against one: gradients, shards, checkpoints, metrics, and one that fails. Gloo, real vLLM."""

import dataclasses
import json
import math
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ce_gppo import checkpoint, parallel
from ce_gppo.entropy import QUADRANTS
from ce_gppo.metrics import Sums, Update
from ce_gppo.model import load_model
from helpers import by_ranks, metrics_of, outputs_of, quick, ranks, rollout_of, run, torchrun, without_timings
from test_faults import program

pytestmark = pytest.mark.slow

# An update on fixed responses, which the ranks share as given; writes the gradient and a checkpoint.
ONE_UPDATE = """
import json, sys, torch, train
from ce_gppo import checkpoint, parallel
checkpoint.KEEP = 9
from ce_gppo.policy import Policy
from ce_gppo.model import load_model
from helpers import resolved
from pathlib import Path
from test_ranks import groups
folder, shard, shares, name = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
parallel.init()
model, tokenizer = load_model(str(folder / "tiny"), shard=shard)
policy = parallel.distribute(Policy(model), shard, model._no_split_modules)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
config = resolved(max_micro_batch_tokens=24, entropy_coef=0.01, positive_nll_coef=0.1)
objective = train.objective_of_step(config, checkpoint.State(""))
own = torch.tensor([4 * i + j for i in shares[parallel.rank()] for j in range(4)], dtype=torch.long)
_, done = train.update(policy, optimizer, groups()[own], objective, 1e-3, config, "cpu")
merged = train.metrics.update_metrics(parallel.all_gather([done]))[0]
gradients = {name: parallel.full_tensor(parameter.grad).clone() for name, parameter in model.named_parameters()}
checkpoint.Saver(folder, model, tokenizer, optimizer).finish(checkpoint.State("id", int(name)))
done = {"loss": parallel.all_sum(done.loss)[0], "skipped": done.skipped, "metrics": merged}
if parallel.is_main():
    torch.save({"gradients": gradients, "done": done}, folder / f"result-{name}.pt")
"""


def groups():
    """Six groups of four responses."""
    part = rollout_of([(5, (3 * i + j) % 11 + 1) for i in range(6) for j in range(4)])
    return dataclasses.replace(part, prompts=part.prompts[::4], prompt_of=torch.arange(6).repeat_interleave(4))


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """The same mini-batch by one process, and by two in several ways. {name: (gradients and what update returned)}"""
    folder = tmp_path_factory.mktemp("ranks")
    cases = {
        "000001": (1, "no", [[0, 1, 2, 3, 4, 5]]),
        "000002": (2, "no", [[0, 2, 4], [1, 3, 5]]),
        "000003": (2, "no", [[0, 1, 2, 3, 4], [5]]),  # other numbers of groups, tokens and micro-batches
        "000004": (2, "no", [[0, 1, 2, 3, 4, 5], []]),  # one rank has nothing
        "000005": (2, "yes", [[0, 1, 2, 3, 4], [5]]),
        "000006": (2, "offload", [[], [0, 1, 2, 3, 4, 5]]),
    }
    cases = {name: (processes, how, json.dumps(shares)) for name, (processes, how, shares) in cases.items()}
    return folder, by_ranks(folder, ONE_UPDATE, cases, timeout=100)


@pytest.mark.parametrize("case", ["000002", "000003", "000004", "000005", "000006"])
def test_the_gradient_of_two_ranks_is_that_of_one(updates, case):
    one, two = updates[1]["000001"], updates[1][case]
    assert max(gradient.abs().max() for gradient in one["gradients"].values()) > 1e-2
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(two["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    assert two["done"]["loss"] == pytest.approx(one["done"]["loss"], abs=1e-6) and not two["done"]["skipped"]
    ours, expected = (case["done"]["metrics"] for case in (two, one))  # the sums of all ranks and micro-batches
    assert ours.keys() == expected.keys() and len(ours) > 25
    ours["perf/padding"] = expected["perf/padding"]  # that of other blocks
    assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("case", ["000003", "000005", "000006"])
def test_checkpoints_of_one_and_two_ranks_are_the_same(updates, case):
    """With shards, too, they are whole: one process loads them, with the same moments of the optimizer."""
    folder = updates[0]
    ours, expected = folder / f"checkpoint-{case}", folder / "checkpoint-000001"
    assert checkpoint.damage(ours) is None
    weights, expected_weights = (load_file(f / "model.safetensors") for f in (ours, expected))
    assert weights.keys() == expected_weights.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], expected_weights[name], atol=1e-5, rtol=0)
    moments = []
    for path in (ours, expected):
        model, _ = load_model(str(path))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
        assert checkpoint.load(path, model, optimizer) == checkpoint.State("id", int(path.name[-6:]))
        moments.append([optimizer.state[p]["exp_avg"] for p in model.parameters()])
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


SMALL = [
    *("--steps", "3", "--prompts-per-step", "15", "--max-kept-prompts", "8", "--mini-batch-prompts", "2"),
    *("--eval-every", "3", "--eval-samples", "1", "--checkpoint-every", "1", "--max-micro-batch-tokens", "1024"),
]


def test_two_ranks_train_and_one_goes_on(tmp_path):
    """Uneven shares of the prompts, and shards; then one process resumes the run of two. Metrics are over all ranks."""
    process = torchrun(2, "train.py", *quick(tmp_path), *SMALL, "--run-name", "two", "--shard", "yes")
    while process.poll() is None and not (tmp_path / "two" / "checkpoint-000001").exists():
        time.sleep(0.05)
    process.terminate()  # torchrun passes it on
    output = process.communicate(timeout=100)[0]
    before = metrics_of(tmp_path / "two")
    assert "finishing this step's updates" in output and len(before) < 4, output
    assert checkpoint.newest(tmp_path / "two").name == f"checkpoint-{before[-1]['step']:06d}"

    run(tmp_path, "--resume", str(tmp_path / "two"))
    rows = metrics_of(tmp_path / "two")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and without_timings(rows[: len(before)]) == without_timings(
        before
    )
    for row in rows[1:]:
        assert row["reward/mean"] * 120 == pytest.approx(round(row["reward/mean"] * 120)), "all 15 groups are counted"
        assert math.log(row["mismatch/ratio_max"]) < 1e-4, "shards arrive in vLLM as whole weights"
        assert sum(row[f"tokens/{q}"] for q in QUADRANTS) == pytest.approx(1)
        assert row["update_1/ratio_max"] == pytest.approx(1, abs=1e-4)


def test_an_engine_over_two_ranks(tmp_path):
    """rollout_tp = 2: both ranks see the same groups, one judges them, and each trains on half of them.

    vLLM takes its half of the weights.
    """
    verifier, judges = tmp_path / "mine.py", tmp_path / "judges"
    verifier.write_text(
        "import os\nfrom ce_gppo.verifier import puzzles\n"
        "def score(response, answer):\n"
        f"    print(os.getppid(), file=open({str(judges)!r}, 'a'))\n"
        "    return puzzles.walk(response, answer)\n"
    )
    arguments = [*quick(tmp_path), *SMALL, "--run-name", "tp", "--rollout-tp", "2", "--rewards", f"{verifier}:score"]
    outputs_of(ranks(2, "train.py", *arguments), timeout=200)
    rows = metrics_of(tmp_path / "tp")[1:]
    by_rank = Counter(judges.read_text().split()).values()
    assert min(by_rank) == 1 and max(by_rank) > 3 * 120, "a rank has tried the verifier at the start; the other judges"
    assert len(rows) == 3 and all(math.log(row["mismatch/ratio_max"]) < 1e-4 for row in rows)
    assert all(row["reward/mean"] * 120 == pytest.approx(round(row["reward/mean"] * 120)) for row in rows)
    samples = [json.loads(line) for line in (tmp_path / "tp" / "samples.jsonl").read_text().splitlines()]
    assert sum(row["entropy"] is None for row in samples) < len(samples), "the entropies of all ranks"
    assert (tmp_path / "tp" / "tokens.jsonl").read_text().count('"step": 3') >= 1


def test_a_stop_that_reaches_one_rank_of_an_engine_ends_both(tmp_path, request):
    """They must leave the engine's loop together: else one waits forever for the other's half of a matrix product.

    A killed run has left its shared memory under the name that vLLM gives it in every run.
    """
    for rank in range(2):
        left = Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}")
        if not left.exists():
            left.touch()
            request.addfinalizer(left.unlink)
    # In the loop of the fourth call, after those of the check, the first evaluation and rollout.
    asked = "lambda: parallel.rank() or at(sys.modules['vllm.v1.engine.llm_engine'].LLMEngine, 'step', [1], stop)"
    script = program(tmp_path, f'at(rollout.Engine, "generate", [4], {asked})')
    arguments = [*quick(tmp_path), *SMALL, "--run-name", "tp", "--rollout-tp", "2"]
    output = outputs_of(ranks(2, str(script), *arguments), timeout=100)
    assert "stopped after step 1" in output, output
    assert [path.name for path in tmp_path.glob("tp/checkpoint*")] == ["checkpoint-000001"]
    assert not list(Path("/dev/shm").glob("ce-gppo-*"))


def test_a_rank_that_fails_ends_all_ranks_with_its_message(tmp_path):
    fault = "lambda: parallel.rank() == 1 and fail(RuntimeError('the disk of rank 1 is on fire'))"
    script = program(tmp_path, f'at(train.metrics, "measured_sums", [1], {fault})')
    process = torchrun(2, str(script), *quick(tmp_path), *SMALL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "the disk of rank 1 is on fire" in output, output


def test_only_tensors_on_the_cpu_are_gathered():
    """A tensor on a GPU would come back on that GPU on every rank: it is refused, also deep inside other objects."""
    update = Update(Sums({"tokens": torch.ones(1)}, {}, {}, {}), 0.0, 1.0, False, [])
    assert parallel.all_gather([update]) == [[update]]
    update.sums.means["clip/low"] = torch.ones(1, device="meta")
    with pytest.raises(ValueError, match="a tensor is not on the CPU"):
        parallel.all_gather((1, [update]))

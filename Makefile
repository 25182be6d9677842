# Everything runs in .venv, made on first use. `make help` lists the targets.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && { echo $$p; break; }; done)
PLATFORM := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)
# Setup does not compile the installed packages. Python compiles a module at its first import and keeps the result.
export PYTHONDONTWRITEBYTECODE :=
LOCK := requirements/$(PLATFORM).txt
TORCH := $(shell grep '^torch==' $(LOCK))
CHECK_PYTHON = test -n "$(PYTHON)" || \
	{ echo "make: no Python 3.11 to 3.14 found; install one, or run make PYTHON=/path/to/python3" >&2; exit 2; }
CHECK_GPU = .venv/bin/python -m tools.doctor --gpu
# Puts the repository root on Python's path: `.venv/bin/python tools/evaluate.py` then works like `-m tools.evaluate`.
FIND_PROJECT = echo "$(CURDIR)" > "$$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/this-project.pth"
WALK_DATA := data/walk/train.jsonl data/walk/eval.jsonl
WALK_BASE := data/walk/base/model.safetensors
COUNTDOWN_DATA := data/countdown/small-train.jsonl data/countdown/small-eval.jsonl
COUNTDOWN_BASE := data/countdown/base/model.safetensors
# As it was typed: make would take $$x in it for a variable of its own.
override ARGS := $(value ARGS)
# What a run needs: with a recipe of published settings nothing of this, with another one its small policy.
RUN_DATA = $(if $(filter countdown,$(RECIPE)),countdown,$(if $(filter-out walk,$(RECIPE)),,data))

.PHONY: help setup data countdown train eval figures view branch doctor bench reproduce coin speedrun test test-fast torture lint clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 20

train: setup $(RUN_DATA)  ## train; settings by ARGS="--lr 3e-5 --seed 1" (ARGS=--help lists them), or RECIPE=<name>; GPUS=8
	@.venv/bin/$(if $(GPUS),torchrun --standalone --nproc_per_node $(GPUS),python) train.py $(if $(RECIPE),--recipe $(RECIPE)) $(ARGS)

eval: setup $(if $(and $(MODEL),$(BENCH)),,data)  ## evaluate: MODEL=out/<run>/checkpoint-000060 BENCH=aime24,aime25 K=32
	@.venv/bin/python -m tools.evaluate $(if $(MODEL),--model $(MODEL)) $(if $(BENCH),--bench $(BENCH)) $(if $(K),--k $(K)) $(ARGS)

figures: setup  ## draw curves of runs: RUNS="out/a out/b"
	@.venv/bin/python -m tools.figures $(RUNS) $(ARGS)

view: setup  ## write an HTML page that shows a run's effect on single tokens: RUN=out/<run>
	@.venv/bin/python -m tools.view $(RUN) $(ARGS)

branch: setup $(if $(RUN),,$(RUN_DATA))  ## measure how each setting changes entropy in one step: RUN=out/<run> BRANCHES=10 EVERY=5
	@.venv/bin/python -m results.branch $(if $(RUN),--run $(RUN)) $(if $(RECIPE),--recipe $(RECIPE)) $(if $(BRANCHES),--branches $(BRANCHES)) \
		$(if $(EVERY),--every $(EVERY)) $(ARGS)

doctor: setup data  ## check the machine, the setup and a model: MODEL=<folder or hub name>
	@.venv/bin/python -m tools.doctor $(if $(MODEL),--model $(MODEL)) $(ARGS)

bench: setup data  ## measure updates and rollouts: minutes on two cores
	@.venv/bin/python -m bench.update
	@.venv/bin/python -m bench.update --equal
	@.venv/bin/python -m bench.update --equal --shared-prompt
	@.venv/bin/python -m bench.rollout

reproduce: RESULTS = results/$(if $(QUICK),quick,reproduction-walk).jsonl
reproduce: setup data  ## the sweep of docs/evidence.md, 55 runs: 1:40 to three hours on two cores; QUICK=1: a few minutes; RESULTS=<file>
	@.venv/bin/python -m results.sweep --results $(RESULTS) $(if $(QUICK),--quick) $(ARGS)
	@.venv/bin/python -m results.claims $(RESULTS)

coin: setup data  ## rewards by the toss of a coin: gppo explodes or collapses, grpo and decaying do not; ten minutes on two cores
	@.venv/bin/python -m results.sweep --sweep coin --results results/reproduction-coin.jsonl --settings grpo gppo "decaying (1, 1)" --seeds 2 $(ARGS)
	@.venv/bin/python -m results.claims results/reproduction-coin.jsonl

speedrun: setup data  ## minutes until the accuracy on walk is 0.80, as a row of docs/leaderboard.md: three minutes
	@.venv/bin/python -m tools.speedrun $(ARGS)

test: setup data  ## run the tests, in two processes
	@.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: setup data  ## run the tests that need no vLLM and are fast: about a minute
	@.venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

torture: setup data  ## kill a run of twelve steps twenty times, and compare it with an undisturbed one: five minutes
	@KILLS=20 .venv/bin/python -m pytest tests/test_faults.py -k torture -s $(ARGS)

lint: setup  ## check style
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

data: setup $(WALK_DATA) $(WALK_BASE)  ## make the default task, walk, and its base policy: a minute on two cores

$(WALK_DATA) &: data/walk/prepare.py data/common.py | setup
	@.venv/bin/python -m data.walk.prepare

$(WALK_BASE): data/walk/prepare.py data/base.py | setup
	@.venv/bin/python -m data.base

countdown: setup $(COUNTDOWN_DATA) $(COUNTDOWN_BASE)  ## make small tasks of countdown and their base policy, for make train RECIPE=countdown

$(COUNTDOWN_DATA) &: data/countdown/small.py data/common.py | setup
	@.venv/bin/python -m data.countdown.small

$(COUNTDOWN_BASE): data/countdown/small.py data/base.py | setup
	@.venv/bin/python -m data.base countdown

setup: .venv/installed-$(PLATFORM)  ## make .venv with the pinned dependencies

# torch is installed first, its CPU build from PyTorch's own index. If that cannot be reached, the next step installs it
# from pip's default index. All versions are locked, hence --no-deps. --no-compile saves a minute and a half on a slow
# core: few of the files are ever imported.
.venv/installed-cpu: requirements/cpu.txt
	@$(CHECK_PYTHON)
	@echo "installing into .venv, without a GPU: a few minutes and 4 GB, once"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --no-deps --no-compile --retries 0 --timeout 15 $(TORCH) \
		--index-url https://download.pytorch.org/whl/cpu 2>/dev/null || echo "PyTorch's index cannot be reached; continuing without it"
	@.venv/bin/python -m pip install --quiet --no-deps --no-compile -r $<
	@$(FIND_PROJECT)
	@touch $@

.venv/installed-cuda: requirements/cuda.txt
	@$(CHECK_PYTHON)
	@echo "installing into .venv, for an NVIDIA GPU: several minutes, once"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --no-deps --no-compile -r $<
	@$(FIND_PROJECT)
	@$(CHECK_GPU)
	@touch $@

clean:  ## remove .venv, the small data sets and base policies, and caches; runs in out/ are kept
	rm -rf .venv bench/.venv-trl .pytest_cache .ruff_cache data/walk/base data/countdown/base $(WALK_DATA) $(COUNTDOWN_DATA)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

"""README and docs against today's program: commands, settings, files and links that they name."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from ce_gppo import parallel
from ce_gppo.config import parse
from helpers import ROOT, environment
from train import Config

# docs/log.md keeps the commands of its day, with settings that have gone since.
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("*/readme.md"))]
PAGES = [page for page in (*PAGES, *sorted(ROOT.glob("data/*/readme.md"))) if page.name != "log.md"]
OPEN = re.compile(r"\$|<|\.\.\.")  # a variable of the shell, <run>, or words that are left out


def text_of(page) -> str:
    return re.sub(r"\\\n\s*", "", page.read_text())  # one line for each command


def arguments_of(text: str) -> list[list[str]]:
    """The arguments of train.py in each command of a page."""
    found = []
    for command in re.findall(r"make train\b[^\n`|;]*", text):
        words = dict(re.findall(r"""(RECIPE|ARGS)=("[^"]*"|'[^']*'|[^\s,)]+)""", command))
        recipe = ["--recipe", words["RECIPE"]] if "RECIPE" in words else []
        found.append(recipe + shlex.split("".join(shlex.split(words.get("ARGS", "")))))
    found += [shlex.split(command) for command in re.findall(r"\btrain\.py((?: -[^\n`|;#]*)+)", text)]
    return [arguments for arguments in found if "--help" not in arguments]


def check(arguments: list[str]) -> None:
    """UserError or SystemExit for what today's program does not take; of open arguments only the names are checked."""
    if not any(OPEN.search(word) for word in arguments):
        parse(Config, arguments)
        return
    names = {word[2:].replace("-", "_") for word in arguments if word.startswith("--")}
    assert names <= {*Config.__dataclass_fields__, "recipe", "resume"}, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_train_are_taken(page, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 8)  # for commands with GPUS=8
    for arguments in arguments_of(text_of(page)):
        check(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_other_commands_have_their_modules_and_options(page):
    for module, rest in re.findall(r"-m ((?:tools|results|bench|data)\.[\w.]+)([^\n`|;#]*)", text_of(page)):
        file = ROOT / f"{module.replace('.', '/')}.py"
        assert file.is_file(), module
        shared = ROOT.glob("data/*.py") if module.startswith("data.") else ()  # options that several prepare.py have
        source = "".join(path.read_text() for path in (file, *shared))
        for option in re.findall(r" --([a-z][a-z-]*)", rest):
            assert f'"--{option}"' in source or re.search(rf"\b{option.replace('-', '_')}:", source), (module, option)


def test_make_passes_settings_as_they_are_typed():
    typed = "--prompt-suffix 'Box $x$ or $(x).'"
    done = subprocess.run(["make", "-n", "train", f"ARGS={typed}"], cwd=ROOT, capture_output=True, text=True)
    assert typed in done.stdout


def test_a_wrong_setting_or_value_in_a_page_is_seen():
    for line in ('make train ARGS="--sharding yes"', 'make train GPUS=8 ARGS="--shard full"', "train.py --shard=1"):
        (arguments,) = arguments_of(line)
        with pytest.raises(Exception, match="unknown"):
            check(arguments)
    assert len([a for page in PAGES for a in arguments_of(text_of(page))]) > 20


def anchors(page) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/log.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_pairs_are_defined(page):
    """A pair is `file.py`, `name`, or `name` in `file.py`."""
    text = page.read_text()
    pairs = re.findall(r"`([\w/]+\.py)`, `(?:\w+\.)?(\w+)`", text)
    pairs += [(file, name) for name, file in re.findall(r"`(\w+)`\)? in `([\w/]+\.py)`", text)]
    for file, name in pairs:
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.MULTILINE), (file, name)


@pytest.mark.slow
def test_the_tour_runs_top_to_bottom(tmp_path):
    """In docs/, as a notebook does. Its cells are a script here: no notebook server is installed."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    assert all(cell["source"] and not cell.get("outputs") for cell in cells)
    script = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "tour.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "tour.py"],
        cwd=ROOT / "docs",
        env=environment(MPLBACKEND="agg"),
        capture_output=True,
    )
    shown = done.stdout.decode()
    assert done.returncode == 0 and shown.count("update ") == 4 and "times the weight without a clip" in shown, done

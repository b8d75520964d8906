import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyro_scm.cli import build_parser, main

HEAVY = ("torch", "pyro", "anndata", "pandas", "numpy", "scanpy", "arviz", "matplotlib", "rdkit", "sklearn")
VERBS = (
    "models",
    "simulate",
    "fit",
    "evaluate",
    "check",
    "predict",
    "counterfactual",
    "embed",
    "dictionary",
    "dose-response",
    "interactions",
    "scatter",
    "unmix",
    "identify",
    "compare",
    "tune",
    "demo",
    "data",
)


def children(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield name, child
                yield from ((f"{name} {inner}", parser) for inner, parser in children(child))


def parsers() -> dict[str, argparse.ArgumentParser]:
    return {"": build_parser()} | dict(children(build_parser()))


def examples(parser: argparse.ArgumentParser) -> list[str]:
    return [line.strip() for line in (parser.epilog or "").splitlines() if line.startswith("  pyro-scm ")]


def runnable(parser: argparse.ArgumentParser) -> list[str]:
    own = (parser.epilog or "").split("with data of your own")[0]
    return [line for line in examples(parser) if line in own]


def test_every_verb_of_the_specification_is_there() -> None:
    assert tuple(name for name in parsers() if name and " " not in name) == VERBS


@pytest.mark.parametrize("name", list(parsers()))
def test_every_option_is_explained_and_shows_its_default(name: str) -> None:
    parser = parsers()[name]
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert all(choice.help for choice in action._choices_actions)
            continue
        assert action.help, action
        assert len(action.help) >= 10, action
        silent = action.default in (None, argparse.SUPPRESS, False, [])
        if not silent:
            assert "default" in formatter._expand_help(action), action


@pytest.mark.parametrize("name", list(parsers()))
def test_every_help_says_what_the_verb_does_and_gives_an_example(name: str) -> None:
    parser = parsers()[name]
    assert parser.description
    assert len(parser.description) > 60
    assert examples(parser)
    text = parser.format_help()
    assert "--debug" in text
    assert "--quiet" in text
    assert max(len(line) for line in parser.description.splitlines()) <= 120


@pytest.mark.parametrize("name", list(parsers()))
def test_every_example_can_be_parsed(name: str) -> None:
    for line in examples(parsers()[name]):
        build_parser().parse_args(shlex.split(line)[1:])
    assert any(line.startswith(f"pyro-scm {name}") for line in examples(parsers()[name]))


@pytest.mark.parametrize("name", [v for v in VERBS if v not in ("demo", "data")])
def test_examples_run_as_they_stand(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only smaller: fewer cells, genes and epochs."""
    monkeypatch.chdir(tmp_path)
    for line in runnable(parsers()[name]):
        words = shlex.split(line)[1:]
        if words[0] == "simulate":
            words = [*words, "--cells", "6", "--genes", "8"]
        if "--epochs" in words:
            words[words.index("--epochs") + 1] = "1"
        if "--cells" in words:
            words[words.index("--cells") + 1] = "6"
        assert main(words) == 0, line
    assert capsys.readouterr().err == ""


def test_help_loads_nothing_heavy_and_answers_at_once() -> None:
    program = (
        "import sys; from pyro_scm.cli import main\n"
        "for words in (['--help'], ['fit', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        f"found = [m for m in {HEAVY!r} if m in sys.modules]; sys.exit(f'loaded: {{found}}' if found else 0)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert time.perf_counter() - started < 2
    assert done.returncode == 0, done.stderr
    assert "counterfactual" in done.stdout
    assert "--representation" in done.stdout


def test_module_runs_as_a_program_whose_reader_may_leave() -> None:
    reading, writing = os.pipe()
    os.close(reading)  # nobody reads
    done = subprocess.run(
        [sys.executable, "-m", "pyro_scm", "data", "list"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"pyro-scm {version('pyro-scm')}\n"

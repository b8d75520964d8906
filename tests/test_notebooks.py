"""Notebooks run from their first cell to their last, their own assertions hold, and what is shown is what they say."""

import json
import os
import runpy
from pathlib import Path
from typing import Any

import matplotlib
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
QUICK = ("04", "06", "07")
REAL = ("02", "05")
_LARGEST = 300_000


def _parameters() -> list[Any]:
    return [pytest.param(s, id=s.stem, marks=() if s.name[:2] in QUICK else pytest.mark.slow) for s in SCRIPTS]


def _run(script: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context():
        runpy.run_path(str(script))
        plt.close("all")


@pytest.mark.parametrize("script", _parameters())
def test_notebook_runs(script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRO_SCM_DATA", raising=False)  # on simulated cells, everywhere
    _run(script)
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", REAL)
def test_notebook_runs_on_real_cells(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not os.environ.get("PYRO_SCM_DATA"):
        pytest.skip("PYRO_SCM_DATA does not name a folder of public data")
    _run(next(s for s in SCRIPTS if s.name.startswith(number)))
    assert "PYRO_SCM_DATA is not set" not in capsys.readouterr().out


def _cells(script: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The executed notebook's cells, and the code cells of its script."""
    jupytext = pytest.importorskip("jupytext", reason="pyro-scm[notebooks] is not installed")
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    return notebook["cells"], [c.source for c in jupytext.read(script).cells if c.cell_type == "code"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_executed_notebook_is_of_its_script(script: Path) -> None:
    cells, code = _cells(script)
    shown = [c for c in cells if c["cell_type"] == "code"]
    assert ["".join(c["source"]) for c in shown] == code, "stale: python notebooks/execute.py " + script.name[:2]
    assert [c["execution_count"] for c in shown] == list(range(1, len(shown) + 1))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_executed_notebook_shows_its_outputs_and_nothing_else(script: Path) -> None:
    outputs = [o for c in _cells(script)[0] for o in c.get("outputs", [])]
    assert any(o["output_type"] == "stream" and o["name"] == "stdout" for o in outputs)
    assert not [o for o in outputs if o["output_type"] == "error"]
    told = ["".join(o["text"]) for o in outputs if o["output_type"] == "stream" and o["name"] == "stderr"]
    assert not told
    assert script.with_suffix(".ipynb").stat().st_size < _LARGEST


def test_every_question_has_a_notebook() -> None:
    assert [s.name[:2] for s in SCRIPTS] == [f"{n:02d}" for n in range(1, 8)]

"""The demonstration ends with a report whose numbers are those of its tables."""

import re
from pathlib import Path

import pandas as pd
import pytest

from pyro_scm.demo import MODELS, demo
from pyro_scm.recipes import load
from pyro_scm.report import Report


def test_quick_demo_leaves_a_self_contained_report(tmp_path: Path) -> None:
    lines: list[str] = []
    path = demo(tmp_path, quick=True, seeds=(0, 1), progress=False, say=lines.append)
    page = path.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 3
    summary = pd.read_csv(tmp_path / "compare" / "summary.csv", index_col="model")
    assert list(summary.index) == ["no_change", "training_mean", "additive", "ridge", "nearest", *MODELS]
    assert all(name in page for name in summary.index)
    assert f"{summary.loc['ridge', 'delta_r2']:.3f}" in page
    assert len(load(tmp_path / "run")) == 2
    assert any("do(c_" in line for line in lines)
    assert f"Report: {path}" in lines[-1]


@pytest.mark.slow
def test_models_beat_the_best_baseline_and_recover_the_latents(tmp_path: Path) -> None:
    demo(tmp_path, progress=False, say=lambda _: None)
    summary = pd.read_csv(tmp_path / "compare" / "summary.csv", index_col="model")
    best = summary[summary["kind"] == "baseline"]["delta_r2"].max()
    for name in ("environment_vae", "translation_vae", "structured_environment_vae"):
        assert summary.loc[name, "delta_r2"] > best + 0.2, name
    verdict = pd.read_csv(tmp_path / "compare" / "verdict.csv").set_index(["model", "metric"])
    assert verdict.loc[("environment_vae", "delta_r2"), "verdict"] == "better"


def test_report_escapes_text_and_keeps_missing_numbers_apart(tmp_path: Path) -> None:
    report = Report("a < b")
    report.section("R & D", "x < 1")
    report.table(pd.DataFrame({"value": [0.5, float("nan")]}, index=["a", "b"]))
    report.code("if x < 1: pass")
    page = report.write(tmp_path / "page.html").read_text()
    assert "<h1>a &lt; b</h1>" in page
    assert "<h2>R &amp; D</h2>" in page
    assert "<code>if x &lt; 1: pass</code>" in page
    assert "0.500" in page
    assert "–" in page

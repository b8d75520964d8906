"""`pyro-scm check` against the same in Python."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pyro_scm.criticism import checks
from pyro_scm.data import synthetic
from pyro_scm.recipes import load

SMALL = ("--draws", "30", "--particles", "2", "--most-cells", "30", "--most-genes", "6")


def test_the_page_and_the_table_are_the_librarys(
    works: Callable[..., str], run: Path, screen: Path, tmp_path: Path
) -> None:
    import anndata

    printed = works("check", run, screen, *SMALL, "--out", tmp_path / "checks.html")
    data = synthetic.dataset(anndata.read_h5ad(screen), "descriptors")
    fitted = load(run)
    seen = fitted.environments.table["trained"].to_numpy(bool)[data.env]
    expected = checks(fitted, data.subset(seen), data.subset(~seen), draws=30, particles=2, most_cells=30, most_genes=6)
    page = (tmp_path / "checks.html").read_text()
    for check in expected.checks:
        assert f"{check.name}: {check.verdict}" in page
        if check.verdict != "not applicable":
            assert f"Value {check.value:.3g}; " in page
        (row,) = [line for line in printed.splitlines() if line.startswith(f"{check.name} ")]
        assert f" {check.verdict} " in row
    assert expected.summary() in printed
    assert "2 members, 96 cells of 4 environments it was fitted to, 48 cells held out" in page


def test_conformal_recalibration_can_be_asked_for(
    works: Callable[..., str], run: Path, screen: Path, tmp_path: Path
) -> None:
    works("check", run, screen, *SMALL, "--conformal", "--quiet", "--out", tmp_path / "checks.html")
    assert "coverage_conformal" in (tmp_path / "checks.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "checks.txt"), "the result is a .html file"),
        (("--hold-out", "env_9", "--out", "checks.html"), "no environment 'env_9'"),
        (("--hold-out", "env_4", "--conformal", "--out", "checks.html"), "hold out two or more"),
        (
            ("--hold-out", "control,env_1,env_2,env_3", "--out", "checks.html"),
            "holds no cell of an environment that the run was fitted to",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(
    fails: Callable[..., str], run: Path, screen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert said in fails("check", run, screen, *SMALL, *words)
    assert not list(tmp_path.iterdir())

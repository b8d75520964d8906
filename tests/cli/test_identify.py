"""`pyro-scm identify` against the same question asked in Python."""

from collections.abc import Callable
from pathlib import Path

import anndata
import pandas as pd
import pytest

from pyro_scm.data import synthetic
from pyro_scm.identify import identify
from pyro_scm.recipes import load

Works = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, works_once: Callable[..., None]) -> Path:
    """A screen of hard interventions, and a linear run that learns the order."""
    where = tmp_path_factory.mktemp("identify")
    words = "--latent 3 --genes 8 --environments 4 --cells 250 --interventions hard --decoder linear --graph 0-1,1-2"
    works_once("simulate", *words.split(), "--out", where / "sim.h5ad")
    words = "--model structured_environment_vae --environment perturbation --control control --latent 3 --epochs 1"
    words += " --option interventions=hard --option hidden=, --option edges=order-free --seeds 1"
    works_once("fit", where / "sim.h5ad", *words.split(), "--out", where / "run")
    return where


def test_the_report_is_that_of_the_library(works: Works, folder: Path) -> None:
    out = folder / "claims.csv"
    printed = works("identify", folder / "run", folder / "sim.h5ad", "--test-share", "0.4", "--out", out)
    cells = synthetic.dataset(anndata.read_h5ad(folder / "sim.h5ad"))
    report = identify(load(folder / "run"), cells, held_out=0.4)
    lines = [line for line in str(report).splitlines() if not line.startswith("held-out gain")]
    assert len(lines) > 3
    for line in lines:  # the numbers of the gain are compared below, to rounding
        assert line in printed
    assert report.verdict in printed
    table = pd.read_csv(out, index_col=0)
    assert list(table.index) == ["noise z", "targets", "causal order", "graph"]
    assert table["gain"].tolist() == pytest.approx([report.gain] * 4, rel=2e-2)


def test_other_interventions_and_estimators_can_be_asked_for(works: Works, folder: Path) -> None:
    printed = works("identify", folder / "run", folder / "sim.h5ad", "--interventions", "noise")
    assert "noise interventions on unknown targets" in printed
    assert "graph not identified: environments change the noise alone" in printed
    assert "2 seeds, svi" in works(
        "identify", folder / "run", folder / "sim.h5ad", "--estimator", "svi", "--seeds", "0,1"
    )


def test_a_file_of_another_kind_is_refused(fails: Callable[..., str], folder: Path) -> None:
    message = fails("identify", folder / "run", folder / "sim.h5ad", "--out", folder / "claims.txt")
    assert "the result is a .csv file" in message

"""The models of the second seed on the command line."""

from pathlib import Path

import anndata
import numpy as np
import pytest

from pyro_scm.cli import main
from tests.compositions import screen

DATA = ("--environment", "drug", "--control", "DMSO", "--dose", "dose", "--covariates", "cell_type", "--bits", "32")
SMALL = ("--latent", "3", "--hidden", "8", "--epochs", "2", "--seeds", "2", "--quiet")


@pytest.fixture
def file(tmp_path: Path) -> str:
    adata = screen().copy()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    return str(tmp_path / "screen.h5ad")


def done(*words: str) -> None:
    assert main([*words]) == 0


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("cpa", ["--representation", "multi-dose", "--option", "doser=hill", "--option", "covariates=cell_type"]),
        ("chemcpa", ["--representation", "molecules:smiles", "--option", "covariates=cell_type"]),
        ("multicpa", ["--representation", "multi-hot", "--proteins", "protein", "--option", "family=product"]),
    ],
)
def test_fit_predict_counterfactual_and_embed(file: str, tmp_path: Path, model: str, options: list[str]) -> None:
    run, out = str(tmp_path / "run"), tmp_path / "out.h5ad"
    done("fit", file, "--model", model, *DATA, *options, *SMALL, "--out", run)
    covariate = [] if model == "multicpa" else ["--covariate", "cell_type=T"]
    done("predict", run, "--environment", "A 10 uM", *covariate, "--cells", "3", "--out", str(out))
    assert anndata.read_h5ad(out).shape == (6, 12)
    out.unlink()
    done("counterfactual", run, file, "--environment", "A+B 10+10 uM", "--of", "DMSO", "--out", str(out))
    assert np.isfinite(anndata.read_h5ad(out).X).all()
    out.unlink()
    done("embed", run, file, "--out", str(out))


def test_a_dose_that_nobody_measured(file: str, tmp_path: Path) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out.h5ad")
    done("fit", file, "--model", "cpa", *DATA, "--representation", "multi-dose", *SMALL, "--out", run)
    done("predict", run, "--environment", "A+C", "--dose", "3+5", "--cells", "3", "--out", out)
    assert anndata.read_h5ad(out).shape == (6, 12)


def test_another_covariate(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out.h5ad")
    options = ("--representation", "multi-dose", "--option", "covariates=cell_type")
    done("fit", file, "--model", "cpa", *DATA, *options, *SMALL, "--out", run)
    done("counterfactual", run, file, "--covariate", "cell_type=B", "--of", "DMSO", "--out", out)
    layers = anndata.read_h5ad(out)
    change = np.abs(layers.layers["counterfactual"] - layers.layers["factual"]).max(1)
    assert ((change > 0) == (layers.obs["cell_type"] == "T")).all()
    assert main(["predict", run, "--environment", "A 10 uM", "--out", str(tmp_path / "p.h5ad")]) != 0
    assert "this model has effects of 'cell_type': say which cells to simulate" in capsys.readouterr().err

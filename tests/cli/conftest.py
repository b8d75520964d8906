from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from pyro_scm.cli import main

FIT = ("--environment", "perturbation", "--control", "control", "--representation", "uns:descriptors")
SMALL = ("--latent", "3", "--epochs", "2", "--seeds", "0,1", "--batch-size", "64")

DRUGS = {
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "caffeine": "Cn1cnc2c1c(=O)n(C)c(=O)n2C",
    "ibuprofen": "CC(C)Cc1ccc(cc1)C(C)C(=O)O",
    "paracetamol": "CC(=O)Nc1ccc(O)cc1",
    "vorinostat": "O=C(CCCCCCC(=O)Nc1ccccc1)NO",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session")
def screen(folder: Path) -> Path:
    """Five environments and a control of a simulated screen: control, env_1, ..., env_5."""
    file = folder / "sim.h5ad"
    words = ["--latent", "3", "--genes", "12", "--environments", "6", "--cells", "24", "--descriptors", "4", "--quiet"]
    assert main(["simulate", *words, "--out", str(file)]) == 0
    return file


@pytest.fixture(scope="session")
def run(folder: Path, screen: Path) -> Path:
    """Two members of an Environment VAE that has not seen env_4 and env_5; the second is the best."""
    out = folder / "run"
    words = ["fit", str(screen), "--model", "environment_vae", *FIT, *SMALL, "--hold-out", "env_4,env_5", "--quiet"]
    assert main([*words, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def drug_screen(folder: Path) -> Path:
    """Counts of five drugs at two doses and DMSO, in two cell lines and two batches."""
    rng = np.random.default_rng(0)
    rows = [("DMSO", 0.0, line) for line in ("A549", "MCF7")]
    rows += [(drug, dose, line) for drug in DRUGS for dose in (1.0, 10.0) for line in ("A549", "MCF7")]
    obs = pd.DataFrame([row for row in rows for _ in range(8)], columns=["drug", "uM", "line"])
    obs.index = [f"cell_{i}" for i in range(len(obs))]
    obs["smiles"] = obs["drug"].map(DRUGS).astype(object).where(obs["drug"] != "DMSO", "")
    obs["batch"] = np.where(np.arange(len(obs)) % 2 == 0, "one", "two")
    x = rng.poisson(rng.gamma(2.0, 3.0, size=10), size=(len(obs), 10)).astype(np.float32)
    adata = anndata.AnnData(X=x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(10)]))
    file = folder / "drugs.h5ad"
    adata.write_h5ad(file)
    return file


@pytest.fixture(scope="session")
def drug_run(folder: Path, drug_screen: Path) -> Path:
    """Two members fitted to structures, doses and cell lines; vorinostat is held out."""
    out = folder / "drug_run"
    words = ["fit", str(drug_screen), "--model", "translation_vae", "--environment", "drug", "--control", "DMSO"]
    words += ["--dose", "uM", "--cell-line", "line", "--covariates", "batch", "--bits", "64", "--radius", "1"]
    words += ["--representation", "morgan:smiles,dose,cell_line", "--hold-out", "vorinostat", *SMALL, "--quiet"]
    assert main([*words, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def works_once() -> Callable[..., None]:
    """Run a command that must succeed, for fixtures that last."""

    def check(*words: object) -> None:
        assert main([*(str(word) for word in words), "--quiet"]) == 0

    return check


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with exit code 2 and one line; that line."""

    def check(*words: object, status: int = 2) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == status
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("pyro-scm: error: ")
        return lines[0].removeprefix("pyro-scm: error: ")

    return check


@pytest.fixture
def works(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed without a word on the error stream; what it printed."""

    def check(*words: object) -> str:
        capsys.readouterr()
        status = main([str(word) for word in words])
        printed = capsys.readouterr()
        assert (status, printed.err) == (0, "")
        return printed.out

    return check

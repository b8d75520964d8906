"""The verbs that draw, and what `predict` says of conditions unlike training."""

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from pyro_scm.cli import main
from tests.compositions import screen

SMALL = ("--latent", "3", "--hidden", "8", "--epochs", "2", "--seeds", "2")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "screen.h5ad"
    screen().copy().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def pairs_run(file: Path) -> Path:
    """CPA fitted to all but the pair."""
    out = file.parent / "run"
    words = ["fit", str(file), "--model", "cpa", "--environment", "drug", "--control", "DMSO", "--dose", "dose"]
    words += ["--covariates", "cell_type", "--representation", "multi-dose", "--option", "covariates=cell_type"]
    assert main([*words, "--hold-out", "A+B", *SMALL, "--quiet", "--out", str(out)]) == 0
    return out


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def is_picture(file: Path) -> bool:
    return file.read_bytes()[:4] == b"\x89PNG"


def test_dictionary(pairs_run: Path, tmp_path: Path, works: Callable[..., str]) -> None:
    table = tmp_path / "moa.tsv"
    table.write_text("id\tname\tMOA\n1\ta\tkinase\n2\tB\thdac\n")
    out = tmp_path / "out"
    said = works("dictionary", pairs_run, "--annotation", table, "--name", "name", "--colour", "MOA", "--out", out)
    assert "3 of kind perturbation, 2 of kind cell_type, of 2 members" in said
    tables = ("vectors", "entries", "neighbours", "cosine", "map")
    assert files(out) == {*(f"{n}.csv" for n in tables), "map.png", "cosine.png"}
    assert is_picture(out / "map.png")
    entries = pd.read_csv(out / "entries.csv", index_col="name")
    assert entries["MOA"].to_dict()["A"] == "kinase"
    vectors = pd.read_csv(out / "vectors.csv", index_col=["member", "name"])
    assert vectors.shape == (2 * 5, 3)
    cosine = pd.read_csv(out / "cosine.csv", index_col="name")
    own = vectors.loc[0].to_numpy(), vectors.loc[1].to_numpy()
    expected = np.mean([v[0] @ v[1] / np.linalg.norm(v[0]) / np.linalg.norm(v[1]) for v in own])
    assert cosine.loc["A", "B"] == pytest.approx(expected, abs=1e-5)


def test_dose_response(pairs_run: Path, file: Path, tmp_path: Path, works: Callable[..., str]) -> None:
    out = tmp_path / "out"
    said = works("dose-response", pairs_run, file, "--perturbation", "A,B", "--readout", "g0", "--out", out)
    assert "2 curves of g0, 2 members" in said
    assert "no Hill curves: no perturbation has 3 doses or more" in said
    assert "warning: curves of 2 perturbations go beyond what was trained on" in said
    assert files(out) == {"curves.csv", "points.csv", "table.csv", "figure.png"}
    assert is_picture(out / "figure.png")
    assert set(pd.read_csv(out / "points.csv")["dose"]) == {0, 1, 10}


def test_interactions(pairs_run: Path, file: Path, tmp_path: Path, works: Callable[..., str]) -> None:
    out = tmp_path / "out"
    said = works("interactions", pairs_run, file, "--out", out)
    assert "1 combinations, 2 members" in said
    assert files(out) == {"scores.csv", "matrix.csv", "figure.png"}
    assert pd.read_csv(out / "scores.csv")["observed_synergy"].notna().all()
    said = works("interactions", pairs_run, file, "--all", "--amount", "A=500", "--amount", "C=10", "--out", out)
    assert "warning: A+C predicted: dose of A 500 is outside the 1 to 10 of training" in said


def test_scatter(pairs_run: Path, file: Path, tmp_path: Path, works: Callable[..., str]) -> None:
    out = tmp_path / "out"
    assert "A+B 10+10 uM" in works("scatter", pairs_run, file, "--out", out)
    assert files(out) == {"genes.csv", "scores.csv", "figure.png"}
    works("scatter", pairs_run, file, "--environment", "A", "--out", out)
    assert list(pd.read_csv(out / "scores.csv")["environment"]) == ["A 1 uM", "A 10 uM"]


# ---------------------------------------------------------------------- predict
def test_a_prediction_says_how_far_it_is_from_training(
    pairs_run: Path, tmp_path: Path, works: Callable[..., str]
) -> None:
    out = tmp_path / "p.h5ad"
    words = ("--covariate", "cell_type=T", "--cells", "3", "--out", out)
    said = works("predict", pairs_run, "--environment", "A 10 uM", *words)
    assert "fitted to cells of this environment" in said
    assert "nearest" not in said
    obs = anndata.read_h5ad(out).obs
    assert set(obs["nearest_training"]) == {"A 10 uM"}
    assert (obs["distance"] == 0).all()
    assert set(obs["warning"]) == {""}
    said = works("predict", pairs_run, "--environment", "A+B 10+10 uM", *words)
    assert "nearest training condition: 'A 10 uM', at distance 0.5" in said
    assert "warning" not in said
    said = works("predict", pairs_run, "--environment", "A", "--dose", "300", *words)
    assert "warning: dose of A 300 is outside the 1 to 10 of training" in said
    assert set(anndata.read_h5ad(out).obs["warning"]) == {"dose of A 300 is outside the 1 to 10 of training"}


def test_an_unseen_drug_is_warned_of(drug_run: Path, tmp_path: Path, works: Callable[..., str]) -> None:
    words = ("--cell-line", "MCF7", "--cells", "3", "--out", tmp_path / "p.h5ad")
    said = works("predict", drug_run, "--environment", "vorinostat", "--dose", "1", *words)
    assert "nearest training condition: " in said
    odd = ("--smiles", "[Xe]", "--dose", "5000")
    said = works("predict", drug_run, "--environment", "xenon", *odd, *words)
    assert "warning: dose 5e+03 is outside the 1 to 10 of training" in said


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dictionary", "RUN", "--name", "x", "--out", "o"), "--name x: of which table? Add --annotation FILE"),
        (("dictionary", "RUN", "--annotation", "no.csv", "--out", "o"), "--annotation no.csv: no such file"),
        (("dictionary", "RUN", "--colour", "moa", "--out", "o"), "no column 'moa' to colour by"),
        (("dose-response", "RUN", "DATA", "--doses", "1,x", "--out", "o"), "'1,x' are not doses in uM"),
        (("dose-response", "RUN", "DATA", "--readout", "TP53", "--out", "o"), "no gene 'TP53'"),
        (("interactions", "RUN", "DATA", "--amount", "A=1", "--out", "o"), "--amount is for --all"),
        (("interactions", "RUN", "DATA", "--all", "--amount", "A=-1", "--out", "o"), "'A=-1' is not NAME=AMOUNT"),
        (("interactions", "RUN", "DATA", "--combination", "A 10 uM", "--out", "o"), "'A 10 uM' is no combination"),
        (("scatter", "RUN", "DATA", "--environment", "Z", "--out", "o"), "no environment 'Z'"),
    ],
)
def test_what_goes_wrong_is_one_line(
    words: tuple[str, ...], message: str, pairs_run: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(pairs_run), "DATA": str(file)}
    assert message in fails(*(places.get(word, word) for word in words))

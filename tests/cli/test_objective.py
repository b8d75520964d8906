"""Adversaries and other options of a model's objective on the command line."""

import json
from pathlib import Path

import pandas as pd
import pytest

from pyro_scm.cli import main
from tests.compositions import screen

DATA = ("--environment", "drug", "--control", "DMSO", "--dose", "dose", "--covariates", "cell_type")
SMALL = ("--latent", "3", "--hidden", "8", "--epochs", "2", "--seeds", "2", "--quiet")
CPA = ("--model", "cpa", "--representation", "multi-dose", "--option", "covariates=cell_type")


@pytest.fixture
def file(tmp_path: Path) -> str:
    adata = screen().copy()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    return str(tmp_path / "screen.h5ad")


def fit(file: str, run: Path, *words: str) -> int:
    return main(["fit", file, *DATA, *words, *SMALL, "--out", str(run)])


def columns(run: Path) -> set[str]:
    return set(pd.read_csv(run / "history.csv").columns)


def test_adversaries_are_off_unless_asked_for(file: str, tmp_path: Path) -> None:
    assert fit(file, tmp_path / "plain", *CPA) == 0
    assert not [name for name in columns(tmp_path / "plain") if name.startswith("adversary")]
    published = ("--option", "prior=flat", "--option", "family=point", "--option", "inputs=x")
    options = ("--adversary", "5", "--objective", "gradient_penalty=1", "--objective", "critic_hidden=8,8")
    assert fit(file, tmp_path / "run", *CPA, *published, *options) == 0
    assert {"adversary_perturbations", "adversary_cell_type"} <= columns(tmp_path / "run")
    remembered = json.loads((tmp_path / "run" / "data.json").read_text())["training"]["objective"]
    assert remembered == {"gradient_penalty": 1, "critic_hidden": [8, 8], "adversary": 5.0}


def test_independence_takes_the_place_of_a_second_player(file: str, tmp_path: Path) -> None:
    assert fit(file, tmp_path / "run", *CPA, "--objective", "independence=10", "--objective", "measure=mmd") == 0
    assert "independence" in columns(tmp_path / "run")


def test_a_training_is_resumed_with_its_adversaries(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit(file, run, *CPA, "--adversary", "2", "--objective", "critic_hidden=8") == 0
    again = ["fit", file, "--resume", "--epochs", "3", "--quiet", "--out", str(run)]
    assert main([*again, "--adversary", "3"]) != 0
    assert "other options (adversary)" in capsys.readouterr().err
    assert main([*again, "--objective", "critic_hidden=8"]) == 0
    history = pd.read_csv(run / "history.csv")
    assert history["epoch"].max() == 3
    assert history["adversary_perturbations"].notna().all()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--model", "vae", "--adversary", "1"), "the model vae is trained by its likelihood alone"),
        ((*CPA, "--objective", "nonsense=1"), "the objective of cpa has no option 'nonsense'"),
        ((*CPA, "--adversary", "1", "--objective", "adversary=2"), "say the same"),
        ((*CPA, "--adversary", "-1"), "'-1' is not a number above 0"),
        ((*CPA, "--objective", "measure=nonsense", "--objective", "independence=1"), "unknown measure"),
    ],
)
def test_what_cannot_be_trained_for_is_refused(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str
) -> None:
    assert fit(file, tmp_path / "run", *words) != 0
    assert complaint in capsys.readouterr().err

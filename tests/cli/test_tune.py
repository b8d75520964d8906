import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pyro_scm import tuning
from pyro_scm.cli.tune import space
from tests.cli.conftest import FIT

TUNE = (
    *FIT,
    "--model",
    "environment_vae,translation_vae",
    "--hold-out",
    "env_4,env_5",
    "--epochs",
    "2",
    "--seeds",
    "2",
)
SPACE = ("--space", "latent=2:4", "--space", "lr=log:1e-3:1e-1", "--space", "sparsity=softmax,top-k")


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("latent=5:50", "latent", (5, 50)),
        (" dropout = 0.1:1 ", "dropout", (0.1, 1)),
        ("lr=log:1e-4:1e-2", "lr", ("log", 1e-4, 1e-2)),
        ("latent=log:5:50", "latent", ("log", 5, 50)),
        ("sparsity=softmax,top-k", "sparsity", ["softmax", "top-k"]),
        ("sparsity=softmax", "sparsity", ["softmax"]),
        ("scale=true,false", "scale", [True, False]),
        ("clip=none,10", "clip", [None, 10]),
        ("hidden=128|256,128", "hidden", [128, (256, 128)]),
    ],
)
def test_a_space_is_a_range_or_choices(text: str, name: str, values: Any) -> None:
    found = space(text)
    assert found == (name, values)
    assert [type(v) for v in found[1]] == [type(v) for v in values]


@pytest.mark.parametrize(
    "text", ["latent", "latent=", "=3", "latent=a:b", "latent=log:3", "latent=1:2:3", "latent=log:1:2:3", "l=true:3"]
)
def test_a_space_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"NAME=VALUES|LOW:HIGH"):
        space(text)


def test_a_study_from_search_to_prediction(
    screen: Path, tmp_path: Path, works: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    words = ("tune", screen, *TUNE, *SPACE, "--space", "hidden=4|6,5", "--degs", "0", "--folder", folder)
    printed = works(*words, "--trials", "2")
    table = pd.read_csv(folder / "trials.csv")
    assert table["trial"].tolist() == [0, 1]
    assert table["hidden"].isin(["(4,)", "(6, 5)"]).all()
    best = json.loads((folder / "best.json").read_text())
    assert f"the best: {best['model']} with latent=" in printed
    assert "ridge" in printed
    assert json.loads((folder / "study.json").read_text())["training"] == {"batch_size": 128, "epochs": 2}

    scored, ran = tuning._scored, []
    monkeypatch.setattr(tuning, "_scored", lambda *given: ran.append(given) or scored(*given))  # type: ignore[func-returns-value]
    works(*words, "--trials", "3", "--quiet")
    assert len(ran) == 1
    more = pd.read_csv(folder / "trials.csv")
    pd.testing.assert_frame_equal(more.head(2), table)

    run = folder / "test" / json.loads((folder / "best.json").read_text())["model"]
    memory = json.loads((run / "data.json").read_text())
    assert memory["hold_out"] == ["env_4", "env_5"]
    assert works("evaluate", run, screen, "--degs", "0").startswith("  ")


def test_several_splits_are_drawn_and_each_is_tested(screen: Path, tmp_path: Path, works: Callable[..., str]) -> None:
    words = ["--model", "environment_vae", "--hold-out-fraction", "0.3", "--splits", "2", "--split-seed", "1"]
    words += ["--space", "lr=0.001:0.01", "--option", "latent=2", "--training", "clip=5", "--score", "rmse"]
    words += ["--trials", "1", "--epochs", "1", "--seeds", "1", "--degs", "0", "--validation-fraction", "0.3"]
    works("tune", screen, *FIT, *words, "--folder", tmp_path)
    settings = json.loads((tmp_path / "study.json").read_text())
    assert settings["models"] == {"environment_vae": {"recipe": "environment_vae", "latent": 2}}
    assert settings["training"] == {"epochs": 1, "batch_size": 128, "clip": 5}
    assert settings["score"] == "rmse"
    assert settings["splits"][0]["held_out"] != settings["splits"][1]["held_out"]
    for i in (1, 2):
        held_out = json.loads((tmp_path / f"test_{i}" / "environment_vae" / "data.json").read_text())["hold_out"]
        assert held_out == settings["splits"][i - 1]["held_out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*TUNE, "--space", "latnt=2:4"), "the space has no option 'latnt'"),
        ((*TUNE, "--space", "latent=2:4.5"), "the space: latent=4.5 is of another kind than its default 20"),
        ((*TUNE, "--space", "sparsity=1,2"), "the space: sparsity=1 is of another kind"),
        ((*TUNE, "--space", "latent=4:2"), "space: latent = (4, 2): low is below high"),
        ((*TUNE, "--space", "latent"), "'latent' is not of the form NAME=VALUES"),
        ((*TUNE, *SPACE, "--space", "latent=5:6"), "--space latent: given twice"),
        ((*TUNE, *SPACE, "--lr", "0.1"), "--lr and --space lr say the same"),
        ((*TUNE, *SPACE, "--option", "latent=3"), "latent is fixed, and in --space"),
        ((*TUNE, "--space", "clip=1:2", "--training", "clip=3"), "clip is fixed, and in --space"),
        ((*TUNE, *SPACE, "--score", "auc"), "unknown score 'auc'"),
        ((*FIT, *SPACE, "--model", "ridge", "--hold-out", "env_4"), "--model ridge: baselines have nothing to tune"),
        ((*FIT, *SPACE, "--model", "vae"), "one of the arguments --hold-out --hold-out-fraction is required"),
        ((*TUNE, *SPACE, "--hold-out", "env_1,env_2,env_3"), "sim.h5ad: "),
        ((*TUNE, *SPACE, "--hold-out", "env_99"), "sim.h5ad: no environment 'env_99'"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(
    screen: Path, tmp_path: Path, fails: Callable[..., str], words: tuple[str, ...], message: str
) -> None:
    assert message in fails("tune", screen, *words, "--folder", tmp_path)
    assert not (tmp_path / "journal.log").exists()


def test_another_search_needs_another_folder(
    screen: Path, tmp_path: Path, fails: Callable[..., str], works: Any
) -> None:
    words = ("tune", screen, *TUNE, "--degs", "0", "--folder", tmp_path)
    works(*words, "--space", "latent=2:3", "--trials", "1")
    assert "holds a study of other settings (space = " in fails(*words, "--space", "latent=2:4", "--trials", "1")


def test_an_interruption_says_how_to_go_on(
    screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyro_scm.cli import main

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_scored", stop)
    assert main(["tune", str(screen), *TUNE, *SPACE, "--folder", str(tmp_path), "--quiet"]) == 130
    assert f"the trials that have ended are in {tmp_path}: the same command goes on" in capsys.readouterr().err

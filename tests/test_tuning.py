import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from pyro_scm import tuning
from pyro_scm.data import splits, synthetic
from pyro_scm.data.splits import Split
from pyro_scm.errors import CheckpointError, DataError, ModelError, PyroScmError, TrainingError
from pyro_scm.evaluation import Comparison
from pyro_scm.tuning import Tuning, tune

SPACE: Any = {"latent": (2, 4), "lr": ("log", 1e-3, 1e-1), "sparsity": ["softmax", "top-k"], "hidden": [(4,), (6, 5)]}
FRAGILE = """
import os, signal
from multiprocessing import parent_process
from pathlib import Path
from pyro_scm import models

def build(schema, *, latent=3):
    died = Path(__file__).with_name("died")
    if latent == 3 and parent_process() is not None and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return models.environment_vae(schema, latent=latent, hidden=(4,), environment_hidden=(4,))
"""


@functools.cache
def split(seed: int = 0) -> Split:
    adata = synthetic.simulate(latent=3, genes=8, environments=8, cells=20, descriptors=5)
    cells = synthetic.dataset(adata, "descriptors")
    return splits.by_environment(cells, fraction=0.3, validation_fraction=0.3, seed=seed)


def study(folder: Path, **changes: Any) -> Tuning:
    options = {
        "models": ("environment_vae", "translation_vae"),
        "space": SPACE,
        "trials": 3,
        "seeds": (0, 1),
        "degs": 0,
    }
    options |= {"epochs": 2, "progress": False, "baselines": ("ridge",), "folder": folder, **changes}
    return tune(options.pop("cells", split()), **options)


def states(found: Tuning) -> list[str]:
    return [str(state) for state in found.trials["state"]]


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    """Five trials in one go."""
    return study(tmp_path_factory.mktemp("five"), trials=5)


def same(a: Tuning, b: Tuning) -> None:
    """The same trials, scores and test scores; only the time may differ."""
    assert_frame_equal(a.trials.drop(columns="seconds"), b.trials.drop(columns="seconds"), check_exact=True)
    assert a.best == b.best
    assert_frame_equal(a.comparisons[0].scores, b.comparisons[0].scores, check_exact=True)


# ---------------------------------------------------------------------- what is asked
@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ((2, 5), int),
        ((2, 5.0), float),
        (("log", 1, 100), int),
        (("log", 1e-4, 1e-2), float),
        ([1, "a", None, (3, 4)], object),
    ],
)
def test_a_dimension_is_a_range_or_some_values(given: Any, kind: type) -> None:
    dimension = tuning._dimension("a", given)
    found = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    values = [dimension.suggest(found.ask(), "a") for _ in range(40)]
    if isinstance(given, list):
        assert set(values) == set(given)
        return
    low, high = given[-2:]
    assert all(isinstance(v, kind) and low <= v <= high for v in values)
    assert (np.median(values) < (low + high) / 5) == (given[0] == "log")


@pytest.mark.parametrize(
    "given",
    [5, "softmax", (5, 2), (2, 2), (1, 2, 3), ("log", 0, 1), ("log", 1), (True, 5), [], [1, 1], [{1}], (0, np.inf)],
)
def test_what_is_no_dimension_is_refused_by_name(given: Any) -> None:
    with pytest.raises(ModelError, match="space: width = "):
        tuning._dimension("width", given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"score": "auc"}, ModelError, "unknown score 'auc': use one of delta_pearson"),
        ({"score": "rmse_deg"}, ModelError, "rmse_deg needs differential genes"),
        ({"models": ()}, ModelError, "no models"),
        ({"models": ("vea",)}, ModelError, "unknown model 'vea'"),
        (
            {"models": {"mine": {"recipe": "vae", "widht": 3}}, "space": {"latent": [2]}},
            ModelError,
            "model 'vae' has no option widht",
        ),
        ({"space": {"laten": (2, 4)}}, ModelError, "has an option 'laten': did you mean one of 'latent'"),
        ({"models": ("vae",), "space": {"sparsity": ["dense"]}}, ModelError, "no model in vae.*'sparsity'"),
        ({"lr": 1e-3}, ModelError, "lr is both in the space and fixed to 0.001"),
        ({"patients": 3}, ModelError, "patients is not an option of a study's training"),
        ({"checkpoint": "x"}, ModelError, "checkpoint is not an option of a study's training"),
        ({"clip": {1}}, ModelError, "options of a study are numbers, words"),
        ({"trials": 0}, ModelError, "trials = 0"),
        ({"processes": 0}, ModelError, "processes = 0"),
        ({"cells": ()}, DataError, "no splits"),
        ({"cells": replace(split(), validation=None)}, DataError, "no validation cells.*validation_fraction=0.2"),
    ],
)
def test_what_cannot_work_is_refused_before_any_trial(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        study(tmp_path, **changes)
    assert not (tmp_path / "journal.log").exists()


def test_a_test_split_that_cannot_be_scored_is_refused_before_any_trial(tmp_path: Path) -> None:
    test = split().test
    first = [int((test.env == e).argmax()) for e in test.present]
    with pytest.raises(DataError, match="2 held-out cells"):
        study(tmp_path, cells=replace(split(), test=test.subset(np.array(first))))


def test_optuna_that_is_not_there_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModelError, match=r"install pyro-scm\[sweep\]"):
        study(tmp_path)


# ---------------------------------------------------------------------- what is found
def test_the_best_trial_is_one_comparison_on_the_validation_environments(five: Tuning) -> None:
    best = five.best
    expected = tuning.compare(
        replace(split(), test=split().validation),
        {best.model: best.options},
        baselines=(),
        degs=0,
        progress=False,
        **{"seeds": (0, 1), **best.training},
    ).summary()
    assert best.score == expected.loc[best.model, "delta_pearson"] == five.trials["score"].max()
    assert best.spread == expected.loc[best.model, "delta_pearson_sd"]
    assert best.score > five.trials["score"].median()
    assert best.training.keys() == {"epochs", "lr"}
    row = five.trials.loc[five.trials["score"].idxmax()]
    assert (row["model"], row["spread"], row["lr"]) == (best.model, best.spread, best.training["lr"])
    assert {name: row[name] for name in ("latent", "sparsity", "hidden")} == best.options


def test_the_test_environments_are_scored_for_the_best_trial_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[set[str], tuple[str, ...], tuple[str, ...]]] = []

    def watched(part: Split, models: Any, *, baselines: Any, **options: Any) -> Comparison:
        scored = set(part.test.environments.index[part.test.present])
        asked.append((scored, tuple(models), tuple(baselines)))
        return Comparison(compare(part, models, baselines=baselines, **options).scores)

    compare = tuning.compare
    monkeypatch.setattr(tuning, "compare", watched)
    found = study(tmp_path, trials=4)
    validation = split().validation
    assert validation is not None
    held = [set(part.environments.index[part.present]) for part in (validation, split().test)]
    trained = [(scored, models, baselines) for scored, models, baselines in asked if models]
    assert [scored for scored, _, _ in trained] == [held[0]] * 4 + [held[1]]
    assert [baselines for _, _, baselines in trained] == [()] * 4 + [("ridge",)]
    assert trained[-1][1] == (found.best.model,)
    assert not held[0] & held[1]


def test_an_error_measure_is_made_small_and_the_table_has_the_best_on_top(tmp_path: Path) -> None:
    found = study(tmp_path, score="rmse", trials=4)
    assert found.best.score == found.trials["score"].min() < found.trials["score"].max()
    assert found.top(2)["score"].tolist() == sorted(found.trials["score"])[:2]


def test_a_score_on_several_splits_is_their_mean(tmp_path: Path) -> None:
    one = {"models": ("environment_vae",), "space": {"lr": [1e-2]}, "trials": 1, "seeds": (3,)}
    scores = [study(tmp_path / str(i), cells=split(i), **one).best.score for i in (0, 1)]
    both = study(tmp_path / "both", cells=(split(0), split(1)), **one)
    assert both.best.score == pytest.approx(np.mean(scores), rel=1e-12)
    assert np.isnan(both.best.spread)
    assert list(both.tests()) == ["test_1", "test_2"]
    assert (tmp_path / "both" / "test_2" / "summary.csv").is_file()


def test_cells_are_split_into_training_validation_and_test(tmp_path: Path) -> None:
    cells = synthetic.dataset(
        synthetic.simulate(latent=3, genes=8, environments=8, cells=20, descriptors=5), "descriptors"
    )
    found = study(tmp_path, cells=cells, trials=1)
    assert found.config["splits"][0]["validation"] == found.config["splits"][0]["test"] == 20


def test_each_model_gets_the_options_that_it_has_and_keeps_those_fixed_for_it(tmp_path: Path) -> None:
    """The temperature is the models'; the training has one of the same name, which is not meant."""
    models = {"plain": {"recipe": "conditional_vae", "latent": 2}, "environment_vae": {}}
    space = {"latent": [3, 4], "temperature": (0.5, 2.0), "guide_hidden": [(5,)], "clip": [None, 10.0]}
    found = study(tmp_path, models=models, space=space, trials=8)
    plain = found.trials[found.trials["model"] == "plain"]
    other = found.trials[found.trials["model"] == "environment_vae"]
    assert len(plain)
    assert len(other)
    assert plain[["latent", "temperature"]].isna().all(axis=None)
    assert other[["latent", "temperature"]].notna().all(axis=None)
    assert set(found.trials["guide_hidden"]) == {(5,)}
    own = {"plain": {"latent", "guide_hidden"}, "environment_vae": {"latent", "temperature", "guide_hidden"}}
    assert found.best.options.keys() == own[found.best.model]
    assert found.best.training.keys() == {"epochs", "clip"}


def test_the_folder_holds_the_table_the_best_and_its_test(five: Tuning, tmp_path: Path) -> None:
    five.save(tmp_path)
    table = pd.read_csv(tmp_path / "trials.csv", float_precision="round_trip")
    assert table["score"].tolist() == five.trials["score"].tolist()
    assert table["trial"].tolist() == list(range(5))
    assert json.loads((tmp_path / "best.json").read_text())["score"] == five.best.score
    assert (tmp_path / "test" / "verdict.csv").is_file()
    assert set(five.comparisons[0].summary().index) == {"ridge", five.best.model}


def test_optuna_says_nothing_and_keeps_its_own_verbosity(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    study(tmp_path, trials=1)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == before == optuna.logging.INFO


# ---------------------------------------------------------------------- trials that go wrong
def test_training_that_diverges_is_recorded_and_the_study_goes_on(tmp_path: Path) -> None:
    found = study(tmp_path, models=("environment_vae",), space={"lr": [1e-2, 1e38]}, trials=6)
    wild = found.trials["lr"] == 1e38
    assert 0 < wild.sum() < 6
    assert (found.trials["state"] == np.where(wild, "failed", "complete")).all()
    assert found.trials.loc[wild, "note"].str.contains("not finite in epoch").all()
    assert (found.trials.loc[~wild, "note"] == "").all()
    assert found.trials.loc[wild, "score"].isna().all()
    assert found.best.training["lr"] == 1e-2


def test_a_study_without_any_score_says_what_was_wrong_with_the_first(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none of the 2 trials has a score; the first: .*not finite in epoch"):
        study(tmp_path, models=("environment_vae",), space={"lr": [1e38]}, trials=2)
    assert pd.read_csv(tmp_path / "trials.csv")["state"].tolist() == ["failed", "failed"]
    with pytest.raises(TrainingError, match="delta_pearson is not defined: the model predicts no change"):
        study(tmp_path / "vae", models=("vae",), space={"latent": (2, 3)}, trials=1)


def test_a_mistake_in_the_code_is_not_taken_for_a_bad_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(tuning, "_scored", broken)
    with pytest.raises(ZeroDivisionError):
        study(tmp_path)


# ---------------------------------------------------------------------- stopping and going on
def test_a_study_goes_on_where_it_stopped_as_if_it_never_had(
    five: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, ran = tuning._scored, []

    def interrupted(job: Any, *chosen: Any) -> tuple[float, float]:
        ran.append(chosen)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return scored(job, *chosen)

    monkeypatch.setattr(tuning, "_scored", interrupted)
    assert len(study(tmp_path, trials=2).trials) == 2
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, trials=5)
    found = study(tmp_path, trials=5)
    assert len(ran) == 6  # the one that was interrupted, twice
    assert states(found) == ["complete"] * 3 + ["killed"] + ["complete"] * 2
    assert found.trials["trial"].tolist() == [0, 1, 2, 3, 3, 4]
    done = found.trials[found.trials["state"] == "complete"].reset_index(drop=True)
    same(replace(found, trials=done), five)
    again = study(tmp_path, trials=5)
    assert len(ran) == 6
    assert_frame_equal(again.trials, found.trials)


def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials without training: the score is a function of the hyper-parameters, best at lr = 0.01 and latent = 4."""

    def scored(_: Any, __: str, options: Any, training: Any) -> tuple[float, float]:
        if options["sparsity"] == "top-k":
            raise TrainingError("it diverged")
        return options["latent"] / 4 - abs(np.log10(training["lr"]) + 2), 0.1

    row = ("environment_vae", "model", 0, "a", "delta_pearson", 0.5)
    scores = pd.DataFrame([row], columns=["model", "kind", "seed", "environment", "metric", "value"])
    monkeypatch.setattr(tuning, "_scored", scored)
    monkeypatch.setattr(tuning._Job, "compared", lambda *_, **__: Comparison(scores))


def test_the_search_learns_from_trials_also_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After ten random trials the sampler looks where scores were high, and away from what failed."""
    stub(monkeypatch)
    found = study(tmp_path / "once", trials=30)
    for trials in (7, 12, 30):
        stopped = study(tmp_path / "stopped", trials=trials)
    same(stopped, found)
    first, later = found.trials.iloc[:10], found.trials.iloc[10:]
    assert later["score"].median() > first["score"].median() + 0.3
    assert (later["state"] == "failed").mean() < (first["state"] == "failed").mean()
    assert found.best.score > first["score"].max()
    assert found.best.score > 0.9


def test_fewer_trials_than_there_are_choose_among_the_first(five: Tuning, tmp_path: Path) -> None:
    study(tmp_path, trials=5)
    assert_frame_equal(
        study(tmp_path, trials=2).trials.drop(columns="seconds"), five.trials.head(2).drop(columns="seconds")
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"space": {**SPACE, "latent": (2, 5)}}, "space"),
        ({"models": ("environment_vae",)}, "models"),
        ({"seeds": (0, 2)}, r"seeds = \[0, 1\], asked for \[0, 2\]"),
        ({"score": "rmse"}, 'score = "delta_pearson", asked for "rmse"'),
        ({"epochs": 3}, "training"),
        ({"seed": 1}, "seed = 0, asked for 1"),
        ({"cells": split(1)}, "splits"),
        ({"cells": replace(split(), train=replace(split().train, x=split().train.x + 1))}, "splits"),
    ],
)
def test_a_study_of_other_settings_is_not_gone_on_with(
    tmp_path: Path, change: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch)
    study(tmp_path, trials=1)
    before = (tmp_path / "journal.log").read_bytes()
    with pytest.raises(CheckpointError, match=f"holds a study of other settings.*{named}"):
        study(tmp_path, **{"trials": 1, **change})
    assert (tmp_path / "journal.log").read_bytes() == before


@pytest.mark.parametrize(
    "harm", ["half a line", "a lock", "no settings", "bad settings", "a bad line", "another process"]
)
def test_what_a_killed_process_leaves_is_mended_and_what_is_damaged_is_refused(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch)
    study(tmp_path, trials=1)
    journal = tmp_path / "journal.log"
    damage: dict[str, Callable[[], object]] = {
        "half a line": lambda: journal.write_bytes(journal.read_bytes() + b'{"op_code": 5'),
        "a lock": lambda: (tmp_path / "journal.log.lock").symlink_to(journal),
        "no settings": (tmp_path / "study.json").unlink,
        "bad settings": lambda: (tmp_path / "study.json").write_text("{"),
        "a bad line": lambda: journal.write_bytes(b"{nonsense\n" + journal.read_bytes()),
        "another process": lambda: None,
    }
    damage[harm]()
    if harm in ("half a line", "a lock"):
        assert study(tmp_path, trials=2).trials["trial"].tolist() == [0, 1]
        return
    messages = {
        "no settings": "no study.json",
        "bad settings": "study.json: not readable",
        "a bad line": "journal.log: damaged",
        "another process": "another process is tuning here",
    }
    if harm == "another process":
        with tuning._claimed(tmp_path), pytest.raises(CheckpointError, match=messages[harm]):
            study(tmp_path, trials=2)
        return
    with pytest.raises(PyroScmError, match=messages[harm]):
        study(tmp_path, trials=2)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/study: cannot be written to"):
        study(tmp_path / "file" / "study")


# ---------------------------------------------------------------------- several processes
def test_two_processes_share_a_study_and_make_the_same_trials(five: Tuning, tmp_path: Path) -> None:
    """The first ten trials are random: what they try does not depend on which others have ended."""
    same(study(tmp_path, trials=5, processes=2), five)


def test_the_trial_of_a_killed_process_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "fragile.py"
    file.write_text(FRAGILE)
    found = study(
        tmp_path / "study",
        models={"fragile": {"recipe": f"{file}:build"}},
        space={"latent": [2, 3]},
        trials=3,
        seed=2,
        processes=2,
    )
    lost = found.trials[found.trials["latent"] == 3]
    assert lost["trial"].nunique() == 1
    assert lost["state"].tolist() == ["killed", "complete"]
    assert lost["note"].tolist() == ["its process was killed", ""]
    assert states(found).count("complete") == 3
    assert sorted(set(found.trials["trial"])) == [0, 1, 2]


def test_a_trial_that_kills_its_process_twice_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker: Any = SimpleNamespace(pid=os.getpid(), exitcode=-9)
    deaths: Counter[int] = Counter()

    def dies(job: Any, *_: Any) -> tuple[float, float]:
        found = optuna.load_study(study_name="tune", storage=tuning._storage(job.journal))
        last = found.trials[-1]
        if last.user_attrs["place"] == 1 and deaths[1] < 2:
            tuning._bury(found, worker, deaths)
            raise KeyboardInterrupt
        return 0.5, 0.1

    stub(monkeypatch)
    monkeypatch.setattr(tuning, "_scored", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path)
    found = study(tmp_path).trials
    assert found["trial"].tolist() == [0, 1, 1, 2]
    assert found["state"].tolist() == ["complete", "killed", "failed", "complete"]
    assert found["note"].tolist() == ["", "its process was killed", "its process was killed twice", ""]
    idle = optuna.load_study(study_name="tune", storage=tuning._storage(tmp_path / "journal.log"))
    for _ in range(4):
        tuning._bury(idle, worker, deaths)
    with pytest.raises(TrainingError, match=r"stopped before its first trial \(exit code -9\)"):
        tuning._bury(idle, worker, deaths)


def test_a_process_that_fails_by_itself_stops_the_study(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def build(schema, *, latent=3):\n    raise ZeroDivisionError('a mistake')\n")
    with pytest.raises(TrainingError, match=r"stopped in trial 0 \(exit code 1\)"):
        study(
            tmp_path / "study", models={"b": {"recipe": f"{file}:build"}}, space={"lr": [1e-3]}, trials=1, processes=2
        )
    assert "a mistake" in capfd.readouterr().err

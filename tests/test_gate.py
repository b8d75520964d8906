"""Who wins against the simple baselines: nobody on an additive screen, the right model on an epistatic one, no trick.

Tables are scored from cheap synthetic predictions: the statistics of the gate are tested, not the training of models.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from pyro_scm import gate, metrics
from pyro_scm.errors import DataError

Predictions = Mapping[str, list[NDArray[np.float64]]]
METRICS = ("delta_pearson", "delta_r2", "rmse", "mae", "rank", "discrimination")
WON = "better than every simple baseline"


def scored(
    truth: NDArray[np.float64], simple: Predictions, models: Predictions, only: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Scores of predicted changes ``[E, G]``, one array a seed, in the layout of `Comparison`."""
    scorers: dict[str, Callable[..., Any]] = {
        "rank": metrics.perturbation_rank,
        "discrimination": metrics.discrimination,
        "rmse": lambda truth, change: np.sqrt(np.mean((truth - change) ** 2, axis=1)),
        "mae": lambda truth, change: np.mean(np.abs(truth - change), axis=1),
        "delta_pearson": lambda *pair: [metrics.pearson(t, p) for t, p in zip(*pair, strict=True)],
        "delta_r2": lambda *pair: [metrics.r2(t, p) for t, p in zip(*pair, strict=True)],
    }
    rows = []
    for kind, predictions in (("baseline", simple), ("model", models)):
        for name, seeds in predictions.items():
            for s, change in enumerate(seeds):
                for metric in only:
                    found = scorers[metric](truth, change)
                    rows += [(name, kind, s, f"e{i}", metric, float(v)) for i, v in enumerate(found)]
    return pd.DataFrame(rows, columns=["model", "kind", "seed", "environment", "metric", "value"])


class Pairs:
    """A screen of pairs of perturbations: effects of eight single ones, and of pairs beyond their sum."""

    def __init__(self, seed: int, epistasis: float = 0.0, environments: int = 14, genes: int = 60) -> None:
        self.rng = rng = np.random.default_rng(seed)
        common = rng.normal(size=genes) / 2  # what all perturbations do
        self.singles = common + rng.normal(size=(8, genes)) * (rng.random((8, genes)) < 0.3)
        every = np.array([(i, j) for i in range(8) for j in range(i)])
        self.pairs = every[rng.permutation(len(every))[:environments]]
        self.beyond = epistasis * rng.normal(size=(environments, genes))
        self.truth = self.sum(self.singles) + self.beyond + self.noise(0.2)  # measured with noise

    @property
    def units(self) -> dict[str, list[str]]:
        return {f"e{k}": [str(i), str(j)] for k, (i, j) in enumerate(self.pairs)}

    def noise(self, scale: float) -> NDArray[np.float64]:
        return scale * self.rng.normal(size=(len(self.pairs), self.singles.shape[1]))

    def sum(self, singles: NDArray[np.float64]) -> NDArray[np.float64]:
        return singles[self.pairs[:, 0]] + singles[self.pairs[:, 1]]

    def additive(self) -> NDArray[np.float64]:
        """Sum of single effects, each measured with noise."""
        return self.sum(self.singles + 0.2 * self.rng.normal(size=self.singles.shape))

    def simple(self) -> dict[str, list[NDArray[np.float64]]]:
        mean = np.tile(self.singles.mean(0), (len(self.pairs), 1))
        return {"no_change": [np.zeros_like(mean)], "training_mean": [mean], "additive": [self.additive()]}


def verdicts(table: pd.DataFrame, metric: str = "delta_pearson", units: gate.Units | None = None) -> dict[str, str]:
    found = gate.verdicts(table, metric=metric, units=units)
    return dict(zip(found["model"], found["verdict"], strict=True))


# ---------------------------------------------------------------------- false and true wins
def test_nobody_wins_on_an_additive_screen() -> None:
    """Of 120 screens, in 6 at most any of three models as good as the additive baseline is declared a winner."""
    won = 0
    for seed in range(120):
        screen = Pairs(seed)
        simple = screen.simple()
        models = {
            "independent": [screen.additive()],  # measured again, equally well
            "ensemble": [simple["additive"][0] + screen.noise(0.05) for _ in range(3)],
            "copy": [simple["additive"][0].copy()],
        }
        table = scored(screen.truth, simple, models, gate.GUARDS)
        won += WON in verdicts(table, units=screen.units).values()
    assert won <= 6


def test_the_right_family_wins_on_an_epistatic_screen() -> None:
    right = wrong = 0
    for seed in range(20):
        screen = Pairs(1000 + seed, epistasis=1.0)
        models = {
            "additive_family": [screen.additive() for _ in range(3)],
            "epistatic": [screen.additive() + 0.7 * screen.beyond + screen.noise(0.3) for _ in range(3)],
        }
        found = verdicts(scored(screen.truth, screen.simple(), models, gate.GUARDS), units=screen.units)
        right += found["epistatic"] == WON
        wrong += found["additive_family"] == WON
    assert right == 20
    assert wrong <= 1


def test_a_model_that_is_worse_is_called_worse() -> None:
    screen = Pairs(3)
    simple = screen.simple()
    table = gate.verdicts(scored(screen.truth, simple, {"noisy": [simple["additive"][0] + screen.noise(1.0)]}))
    row = table.iloc[0]
    assert row["verdict"] == "worse"
    assert row["baseline"] == "additive"
    assert row["upper"] < 0
    assert row["guard"] == "rmse, rank"


# ---------------------------------------------------------------------- tricks
def clipped_score(table: pd.DataFrame, model: str, baseline: str) -> float:
    """Mean over metrics of max((u - b) / (1 - b), 0), or of max(1 - u / b, 0) of errors: what can be exploited."""
    means = table.groupby(["model", "metric"])["value"].mean()
    gains = [
        (means[model, m] - means[baseline, m]) / (1 - means[baseline, m]) for m in ("discrimination", "delta_pearson")
    ]
    gains.append(1 - means[model, "mae"] / means[baseline, "mae"])
    return float(np.mean(np.maximum(gains, 0)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(6))
def test_no_trick_is_better_than_the_baseline_it_starts_from(metric: str, seed: int) -> None:
    screen = Pairs(2000 + seed)
    simple = screen.simple()
    known = simple["additive"][0]
    shrunk = simple["training_mean"][0] + 0.05 * (known - simple["training_mean"][0])
    simple["shrunk"] = [shrunk]  # the best baseline predicts differences, if small ones
    del simple["additive"]
    tricks = {
        "variance_inflation": [10 * shrunk],
        "inflated_differences": [shrunk.mean(0) + 60 * (shrunk - shrunk.mean(0))],
        "random": [screen.noise(1.0) for _ in range(3)],
        "mean_and_noise": [simple["training_mean"][0] + screen.noise(1.0) for _ in range(3)],
        "tiny_random": [screen.noise(1e-3) for _ in range(3)],
        "shuffled": [screen.rng.permutation(shrunk, axis=0)],
    }
    table = scored(screen.truth, simple, tricks)
    found = verdicts(table, metric)
    assert set(found.values()) <= {"no better", "worse"}, found


def test_a_trick_that_a_clipped_score_rewards_fails_by_its_errors() -> None:
    """Scaling up small differences improves discrimination; the error that it costs is clipped away in that score."""
    screen = Pairs(7)
    simple = screen.simple()
    mean = simple["training_mean"][0]
    shrunk = mean + 0.05 * (simple["additive"][0] - mean)
    table = scored(
        screen.truth, {"no_change": simple["no_change"], "shrunk": [shrunk]}, {"scaled": [mean + 100 * (shrunk - mean)]}
    )
    assert clipped_score(table, "scaled", "shrunk") > 0.05
    row = gate.verdicts(table, metric="discrimination").iloc[0]
    assert row["verdict"] != WON
    assert "rmse" in row["guard"]
    assert "worse than the best baseline in rmse" in gate.sentence(row.to_dict())


def test_abstaining_from_hard_environments_does_not_win() -> None:
    """No change predicted for every gene has no correlation; such environments count as 0, and are not left out."""
    rng = np.random.default_rng(0)
    base = np.where(np.arange(16) < 8, 0.6, 0.1) + 0.01 * rng.normal(size=16)
    model = np.where(np.arange(16) < 8, base + 0.05, np.nan)
    rows = [("ridge", "baseline", -1, f"e{i}", "delta_pearson", v) for i, v in enumerate(base)]
    rows += [("m", "model", 0, f"e{i}", "delta_pearson", v) for i, v in enumerate(model)]
    table = pd.DataFrame(rows, columns=["model", "kind", "seed", "environment", "metric", "value"])
    row = gate.verdicts(table).iloc[0]
    assert row["environments"] == 16
    assert row["verdict"] != WON
    assert row["difference"] == pytest.approx(np.nan_to_num(model).mean() - base.mean())
    assert gate.against_best(table)["verdict"].tolist() == ["better"]  # in the environments where both are defined


# ---------------------------------------------------------------------- the rules
def given(**values: list[float]) -> pd.DataFrame:
    """Scores of one metric; models start with m."""
    rows = [
        (name, "model" if name.startswith("m") else "baseline", 0, f"e{i}", "delta_r2", v)
        for name, own in values.items()
        for i, v in enumerate(own)
    ]
    return pd.DataFrame(rows, columns=["model", "kind", "seed", "environment", "metric", "value"])


def test_a_winner_beats_each_baseline_and_not_only_the_best_on_average() -> None:
    level = np.linspace(0, 1, 10)
    other = level - 0.5 + np.tile([1.2, -0.6], 5)  # worse on average, better in every second environment
    table = given(ridge=list(level), nearest=list(other), m=list(level + 0.05))
    pairs = gate.differences(table, metric="delta_r2").set_index("baseline")
    assert pairs.loc["ridge", "lower"] > 0
    assert pairs.loc["nearest", "lower"] < 0 < pairs.loc["nearest", "difference"]
    row = gate.verdicts(table, metric="delta_r2").iloc[0]
    assert (row["verdict"], row["baseline"], row["baselines"]) == ("no better", "nearest", 2)


def test_more_models_need_wider_intervals_and_more_environments() -> None:
    rng = np.random.default_rng(1)
    level = rng.normal(size=6)
    one = given(ridge=list(level), m1=list(level + 0.1 + 0.01 * rng.normal(size=6)))
    assert gate.verdicts(one, metric="delta_r2")["verdict"].tolist() == [WON]
    alone = gate.differences(one, metric="delta_r2").iloc[0]
    many = pd.concat([one, *(one[one["model"] == "m1"].assign(model=f"m{k}") for k in range(2, 9))])
    assert set(gate.verdicts(many, metric="delta_r2")["verdict"]) == {"too few environments"}
    more = given(ridge=list(np.r_[level, level]), m1=list(np.r_[level, level] + np.tile([0.1, 0.2], 6)))
    wide = pd.concat([more, *(more[more["model"] == "m1"].assign(model=f"m{k}") for k in range(2, 9))])
    few, several = (gate.differences(t, metric="delta_r2").iloc[0] for t in (more, wide))
    assert several["upper"] - several["lower"] > few["upper"] - few["lower"]
    assert alone["difference"] == pytest.approx(0.1, abs=0.02)


def test_scores_that_differ_by_rounding_are_equal() -> None:
    level = np.linspace(0.1, 0.9, 9)
    table = given(ridge=list(level), m=list(level + 1e-12))
    assert gate.differences(table, metric="delta_r2")[["difference", "lower", "upper"]].iloc[0].tolist() == [0, 0, 0]
    assert verdicts(table, "delta_r2") == {"m": "no better"}


def test_environments_of_one_unit_are_averaged() -> None:
    level = np.arange(12.0)
    table = given(ridge=list(level), m=list(level + np.repeat([1.0, 2.0, 3.0], 4)))
    units = {f"e{i}": [f"drug {i // 4}"] for i in range(12)}
    row = gate.differences(table, metric="delta_r2", units=units).iloc[0]
    assert (row["difference"], row["environments"], row["units"], row["enough"]) == (2.0, 12, 3, False)
    assert gate.verdicts(table, metric="delta_r2", units=units)["verdict"].tolist() == ["too few environments"]
    assert gate.verdicts(table, metric="delta_r2")["verdict"].tolist() == [WON]


def test_pairs_that_share_a_part_are_not_independent() -> None:
    """Differences that come from the parts alone: 28 pairs of 8 parts are about 8 cases, 28 disjoint pairs are 28."""
    rng = np.random.default_rng(0)
    parts = 0.1 * rng.normal(size=8)
    pairs = [(i, j) for i in range(8) for j in range(i)]
    change = np.array([parts[i] + parts[j] for i, j in pairs])
    table = given(ridge=[0.0] * 28, m=list(change))
    sharing = {f"e{k}": [str(i), str(j)] for k, (i, j) in enumerate(pairs)}
    disjoint = {f"e{k}": [f"{k} a", f"{k} b"] for k in range(28)}
    rows = [gate.differences(table, metric="delta_r2", units=u).iloc[0] for u in (sharing, disjoint, None)]
    widths = [float(row["upper"] - row["lower"]) for row in rows]
    assert widths[0] > 1.5 * widths[1]
    assert widths[1] == pytest.approx(widths[2])
    assert [row["units"] for row in rows] == [28, 28, 28]


def test_a_gate_needs_baselines_and_says_what_is_undefined() -> None:
    with pytest.raises(DataError, match="no baseline has scores of 'rank': judge by one of 'delta_r2'"):
        gate.verdicts(given(ridge=[0.1] * 8, m=[0.2] * 8), metric="rank")
    row = gate.verdicts(given(ridge=[0.1] * 8, m=[float("nan")] * 8), metric="delta_r2").iloc[0]
    assert row["verdict"] == "not defined"
    assert gate.sentence(row.to_dict()) == "m: not defined (delta_r2)"


def test_a_verdict_in_words() -> None:
    level = np.linspace(0, 1, 8)
    table = given(ridge=list(level), no_change=[-1.0] * 8, m=list(level + np.tile([0.1, 0.3], 4)))
    words = gate.sentence(gate.verdicts(table, metric="delta_r2").iloc[0].to_dict())
    assert words.startswith(f"m: {WON} (delta_r2, against ridge, the hardest of 2: +0.200 [+0.1")
    assert words.endswith("] over 8 environments)")

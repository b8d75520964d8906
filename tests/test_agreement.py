"""Predicted against observed changes, gene by gene."""

import functools

import numpy as np
import pytest
import torch

from pyro_scm import metrics, recipes
from pyro_scm.agreement import Scatter, scatter
from pyro_scm.errors import DataError
from pyro_scm.evaluation import predict_means
from pyro_scm.infer import fit
from pyro_scm.run import Run
from tests.compositions import cells

PAIR = "A+B 10+10 uM"


@functools.cache
def fitted() -> Run:
    screen = cells("multi-dose")
    training = screen.subset(screen.env != screen.environment_index(PAIR)[0])
    torch.manual_seed(0)
    model, guide = recipes.make("cpa", training.schema, latent=3, hidden=(8,), guide_hidden=(8,))
    return fit(model, guide, training, seeds=(0, 1), epochs=3, lr=0.02, batch_size=90, progress=False)


@functools.cache
def found() -> Scatter:
    return scatter(fitted(), cells("multi-dose"), ["A 10 uM", PAIR], top=4)


def test_held_out_conditions_are_shown_unless_others_are_asked_for() -> None:
    assert list(scatter(fitted(), cells("multi-dose")).scores.index) == [PAIR]
    assert list(found().scores["trained"]) == [True, False]
    assert list(found().scores["cells"]) == [60, 60]


def test_changes_are_those_observed_and_predicted() -> None:
    screen = cells("multi-dose")
    own = found().genes[found().genes["environment"] == PAIR]
    x = np.asarray(screen.x)
    control, pair = x[screen.env == 0].mean(0), x[screen.env == screen.environment_index(PAIR)[0]].mean(0)
    np.testing.assert_allclose(own["observed"], pair - control, atol=1e-5)
    predicted = predict_means(fitted(), screen, [PAIR], cells=200)[:, 0] - control
    np.testing.assert_allclose(own["predicted"], predicted.mean(0), atol=1e-5)
    assert (own["low"] <= own["predicted"] + 1e-9).all()
    row = found().scores.loc[PAIR]
    truth, guess = own["observed"].to_numpy(), own["predicted"].to_numpy()
    assert row["r2"] == pytest.approx(metrics.r2(truth, guess), abs=1e-4)
    assert row["pearson"] == pytest.approx(np.corrcoef(truth, guess)[0, 1], abs=1e-4)


def test_genes_that_change_are_marked() -> None:
    for name, columns in (("A 10 uM", {"g0", "g1", "g2", "g3"}), (PAIR, {f"g{i}" for i in range(8)})):
        own = found().genes[found().genes["environment"] == name]
        marked = set(own.loc[own["deg"], "gene"])
        assert len(marked) == 4
        assert marked <= columns
    given = scatter(fitted(), cells("multi-dose"), [PAIR], degs={PAIR: [5, 7]}).genes
    assert list(given.loc[given["deg"], "gene"]) == ["g5", "g7"]


def test_the_figure_names_scores_and_genes() -> None:
    axes = found().figure().axes
    assert axes[0].get_title().startswith("A 10 uM (trained on)\n")
    assert axes[1].get_title() == f"{PAIR}\nr² {found().scores.loc[PAIR, 'r2']:.2f}, Pearson Δ " + (
        f"{found().scores.loc[PAIR, 'pearson']:.2f}"
    )
    assert [len(c.get_offsets()) for c in axes[1].collections] == [8, 4]
    assert len(axes[1].texts) == 4
    with pytest.raises(DataError, match="no scatter of 'B 1 uM'"):
        found().figure(["B 1 uM"])


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(DataError, match="'DMSO' has fewer than 2 cells here, or is a reference"):
        scatter(fitted(), cells("multi-dose"), ["DMSO"])
    with pytest.raises(DataError, match="no environment 'Z'"):
        scatter(fitted(), cells("multi-dose"), ["Z"])

"""Axioms of counterfactuals, exact by the equations and measured through expression; errors against a known truth."""

from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import nn

from pyro_scm.batch import Batch
from pyro_scm.counterfactual_recovery import counterfactual_error
from pyro_scm.data import synthetic
from pyro_scm.distributions import normal
from pyro_scm.errors import DataError, InterventionError
from pyro_scm.soundness import axioms
from tests.screens import cells, fitted, make, screen

COLUMNS = ["member", "axiom", "changed", "cycle", "latent", "expression"]


class Inverse(nn.Module):
    """The exact guide of a linear model without observation noise: expression is solved for z."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("inverse", torch.linalg.pinv(model.likelihoods[0].net.weight))

    def forward(self, batch: Batch) -> None:
        assert batch.x is not None
        c = batch.x @ self.inverse.mT  # type: ignore[operator]
        _, _, gain = self.model.parts(batch)
        z = self.model.scm.noise(c, gain)
        with batch.plate():
            pyro.sample("z", normal(z, torch.full_like(z, 1e-6)))


@pytest.fixture(scope="module")
def exact() -> Any:
    """A noiseless linear screen, and the pair that inverts it."""
    adata = synthetic.simulate(
        latent=3, genes=9, environments=4, cells=30, graph=[[0, 1], [1, 2], [0, 2]], decoder="linear", noise=1e-6,
        interventions=("shift", "scale", "hard"), strength=2.0,
    )  # fmt: skip
    data = synthetic.dataset(adata)
    model = synthetic.truth(adata)
    return adata, data, (model, Inverse(model))


def test_a_model_that_can_be_inverted_satisfies_every_axiom_through_expression(exact: Any) -> None:
    _, data, pair = exact
    table = axioms(pair, data, environments=["env_1", "env_2"])
    assert list(table.columns) == COLUMNS
    assert set(table["axiom"]) == {"composition", "effectiveness", "reversibility", "consistency"}
    effective = table[table["axiom"] == "effectiveness"]
    assert effective["changed"].tolist() == ["c_0", "c_1", "c_2"]
    assert effective["latent"].max() < 1e-6
    assert effective["expression"].max() < 1e-3
    rest = table[table["axiom"] != "effectiveness"]
    assert rest["latent"].max() < 1e-5
    assert rest["expression"].max() < 1e-3


def test_the_equations_satisfy_the_axioms_whatever_was_learnt() -> None:
    for name in ("structured_environment_vae", "structured_translation_vae", "vae"):
        table = axioms(fitted(name), cells(), nodes=["c_1"], cycles=1)
        assert table["latent"].max() < 1e-5
        assert sorted(table["member"].unique()) == [0, 1]


def test_what_is_lost_through_expression_is_seen(exact: Any) -> None:
    """A guide that forgets one latent: cells set in it are not read back, and do not reconstruct."""
    _, data, (model, guide) = exact

    class Forgets(nn.Module):
        def forward(self, batch: Batch) -> None:
            assert batch.x is not None
            c = batch.x @ guide.inverse.mT
            _, _, gain = model.parts(batch)
            z = model.scm.noise(c, gain)
            z[:, 2] = 0
            with batch.plate():
                pyro.sample("z", normal(z, torch.full_like(z, 1e-6)))

    table = axioms((model, Forgets()), data, cycles=2).set_index(["axiom", "changed", "cycle"])
    whole = axioms((model, guide), data, cycles=2).set_index(["axiom", "changed", "cycle"])
    for key in (("composition", "", 1), ("effectiveness", "c_2", 1)):
        assert table.loc[key, "expression"] > 0.1
        assert whole.loc[key, "expression"] < 1e-3
    assert table.loc[("effectiveness", "c_0", 1), "expression"] < 1e-3
    assert table["latent"].max() < 1e-5  # the equations hold all the same
    # what was forgotten once is not forgotten again
    assert table.loc[("composition", "", 2), "expression"] == pytest.approx(
        table.loc[("composition", "", 1), "expression"], rel=1e-3
    )


def test_composition_after_one_cycle_is_the_reconstruction_error() -> None:
    from pyro_scm.query import counterfactual

    model, guide = make("vae", cells().schema)
    found = axioms((model, guide), cells(), nodes=[], cycles=1).set_index("axiom").loc["composition", "expression"]
    x = cells().batch().x.numpy()  # type: ignore[union-attr]
    error = (counterfactual((model, guide), cells()).factual_x[0, 0] - x) / x.std(0)
    assert found == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)


def test_counts_are_scored_too() -> None:
    data = cells("negative-binomial")
    table = axioms(make("vae", data.schema), data, nodes=["c_0"], cycles=1)
    assert np.isfinite(table["expression"]).all()
    assert (table.loc[table["axiom"] == "composition", "expression"] > 0).all()


def test_questions_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(InterventionError, match="no causal variable 'c_9'"):
        axioms(fitted(), cells(), nodes=["c_9"])
    with pytest.raises(DataError, match="no environment 'env_9'"):
        axioms(fitted(), cells(), environments=["env_9"])
    with pytest.raises(DataError, match="1 cells: axioms are scored in standard deviations"):
        axioms(fitted(), cells().subset(np.arange(1)))


# ---------------------------------------------------------------------- against the truth
def test_the_truth_makes_no_error(exact: Any) -> None:
    adata, data, pair = exact
    for fit in (synthetic.known(adata, data), pair):
        table = counterfactual_error(fit, data, adata)
        assert table["kind"].tolist() == ["environment"] * 3 + ["do"] * 3
        assert table["asked"].tolist() == ["env_1", "env_2", "env_3", "c_0", "c_1", "c_2"]
        assert table["matched"].tolist()[3:] == ["c_0", "c_1", "c_2"]
        assert (table["error"] < 1e-3 * table["size"]).all()
        assert (table["size"] > 0.1).all()
        assert (table["share"] > 0.999).all()


def test_latents_in_another_order_sign_and_scale_are_matched() -> None:
    """The same model written in other coordinates answers as the truth does."""
    adata = synthetic.simulate(
        latent=3, genes=8, environments=4, cells=40, graph="empty", decoder="linear", strength=3.0, noise=0.1
    )
    data = synthetic.dataset(adata)
    model, guide = synthetic.known(adata, data)
    order, scale = [2, 0, 1], torch.tensor([-2.0, 0.5, 3.0])
    other: Any = synthetic.truth(adata)
    with torch.no_grad():
        other.likelihoods[0].net.weight.copy_(model.likelihoods[0].net.weight[:, order] / scale)  # type: ignore[union-attr,index]
        other.prior.loc.copy_(other.prior.loc[:, order] * scale)
        other.prior.log_scale.copy_(other.prior.log_scale[:, order] + scale.abs().log())
    turned = (other, synthetic.KnownNoise(guide.z[:, order] * scale))
    table = counterfactual_error(turned, data, adata, environments=["env_1"])
    assert table["matched"].tolist()[1:] == ["c_1", "c_2", "c_0"]
    assert (table["share"] > 0.999).all()


def test_doing_nothing_scores_zero_and_the_opposite_less() -> None:
    adata, data = screen(), synthetic.dataset(screen())
    model, guide = synthetic.known(adata, data)
    still: Any = synthetic.truth(adata)
    with torch.no_grad():
        for parameter in still.likelihoods[0].net.parameters():
            parameter.zero_()
    table = counterfactual_error((still, guide), data, adata)
    np.testing.assert_allclose(table["share"], 0, atol=1e-6)
    np.testing.assert_allclose(table["error"], table["size"], rtol=1e-5)
    opposite: Any = synthetic.truth(adata)
    with torch.no_grad():
        opposite.likelihoods[0].net.second.neg_()
    assert (counterfactual_error((opposite, guide), data, adata)["share"] < -2.9).all()
    assert model is not still


def test_what_the_truth_does_not_have_is_refused() -> None:
    adata, data = screen(), synthetic.dataset(screen())
    pair = synthetic.known(adata, data)
    with pytest.raises(InterventionError, match="the true SCM has no node '7'"):
        counterfactual_error(pair, data, adata, nodes=[7])
    with pytest.raises(DataError, match="no environment 'env_9'"):
        counterfactual_error(pair, data, adata, environments=["env_9"])


def test_runs_are_scored_member_by_member() -> None:
    table = counterfactual_error(fitted(), cells(), screen(), nodes=[1])
    assert table["member"].tolist() == [0] * 4 + [1] * 4
    assert table.loc[table["kind"] == "do", "correlation"].between(0, 1).all()
    assert (table["expression"] > 0).all()

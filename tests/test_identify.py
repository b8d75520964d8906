"""The map of what a design grants, and the comparison with and without the graph."""

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch

from guides import amortise
from pyro_scm import models
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError
from pyro_scm.identify import Claim, Design, Report, claims, describe, identify
from pyro_scm.infer import fit
from pyro_scm.regimes import target_labels
from pyro_scm.run import Run

HARD = Design("hard", "known", 3, 4, (1, 1, 1), "linear", "linear")


def screen(kind: str = "hard", **options: object) -> EnvironmentDataset:
    settings = {"latent": 3, "genes": 8, "environments": 4, "cells": 250, "graph": [[0, 1], [1, 2]], "strength": 3.0}
    adata = synthetic.simulate(
        **{**settings, "decoder": "linear", "interventions": (kind,), "constant": True, **options}
    )
    return synthetic.dataset(adata)


def run_of(cells: EnvironmentDataset, known: bool = True, seeds: tuple[int, ...] = (0,), **options: object) -> Run:
    torch.manual_seed(0)
    given = {"hidden": (), "edges": "order-free", "targets": target_labels(cells.environments) if known else None}
    model = models.structured_environment_vae(cells.schema, latent=3, **{**given, **options})  # type: ignore[arg-type]
    guide = amortise(model, cells, hidden=(16,))
    return fit(model, guide, cells, epochs=2, batch_size=250, seeds=seeds, progress=False)


def holds(design: Design) -> dict[str, bool]:
    return {c.quantity: c.holds for c in claims(design)}


# ---------------------------------------------------------------------- the map
@pytest.mark.parametrize(
    ("changes", "z", "order", "graph"),
    [
        ({}, True, True, True),
        ({"mechanism": "network"}, True, True, True),
        ({"targets": "unknown"}, True, True, True),
        ({"hits": (1, 0, 1)}, False, False, False),
        ({"hits": (1, 0, 1), "scale": True, "environments": 7}, True, False, False),
        ({"decoder": "flexible"}, False, False, False),
        ({"decoder": "flexible", "hits": (2, 2, 2)}, True, True, True),
        ({"decoder": "conditional"}, False, False, False),
        ({"environments": 1}, False, False, False),
        ({"interventions": "mechanism"}, True, True, False),
        ({"interventions": "mechanism", "decoder": "flexible"}, False, True, False),
        ({"interventions": "noise"}, True, False, False),
        ({"interventions": "noise", "decoder": "flexible"}, True, False, False),
        ({"interventions": "noise", "mechanism": "network"}, True, False, False),
        ({"mechanism": "none"}, True, False, False),
    ],
)
def test_what_a_design_grants(changes: dict[str, object], z: bool, order: bool, graph: bool) -> None:
    found = holds(replace(HARD, **changes))  # type: ignore[arg-type]
    assert list(found) == ["noise z", "targets", "causal order", "graph"]
    assert (found["noise z"], found["causal order"], found["graph"]) == (z, order, graph)
    assert all(c.extent and c.source for c in claims(replace(HARD, **changes)))  # type: ignore[arg-type]


def test_claims_say_why_and_from_where() -> None:
    granted = {c.quantity: c for c in claims(HARD)}
    assert granted["graph"].source == "Squires et al., ICML 2023"
    assert granted["targets"] == Claim("targets", True, "given", "the data set")
    noise = {c.quantity: c for c in claims(replace(HARD, interventions="noise", decoder="flexible", hits=()))}
    assert "absorbed by the decoder" in noise["graph"].extent
    assert "up to a linear map" in noise["noise z"].extent
    missing = {c.quantity: c for c in claims(replace(HARD, hits=(1, 0, 0)))}
    assert missing["graph"].extent == "2 of 3 latents have no environment that acts on them alone"
    two = {c.quantity: c for c in claims(replace(HARD, decoder="flexible"))}
    assert "two different hard interventions on each latent" in two["graph"].extent


# ---------------------------------------------------------------------- the design of a run
def test_the_design_is_read_off_model_and_cells() -> None:
    cells = screen()
    design, acted = describe(run_of(cells, interventions="hard").model, cells)  # type: ignore[arg-type]
    assert design == replace(HARD, scale=True)
    assert acted.sum(1).tolist() == [0, 1, 1, 1]
    fewer = cells.subset(cells.env < 3)
    assert sum(describe(run_of(cells, interventions="hard").model, fewer)[0].hits) == 2  # type: ignore[arg-type]
    model = run_of(cells, known=False, edges="all", mechanism="network", hidden=(4,), interventions="mechanism").model
    design, acted = describe(model, cells)  # type: ignore[arg-type]
    assert (design.interventions, design.targets, design.decoder) == ("mechanism", "unknown", "flexible")
    assert design.mechanism == "network"
    assert np.isnan(acted[1:]).all()
    plain = run_of(cells, known=False, scale=False).model
    assert describe(plain, cells)[0] == Design("noise", "unknown", 3, 4, (), "linear", "linear")  # type: ignore[arg-type]
    assert "single-target environments of each latent: 1, 1, 1" in str(HARD)


def test_the_true_model_of_a_screen_describes_itself() -> None:
    adata = synthetic.simulate(latent=3, genes=8, environments=4, cells=5, interventions=("hard",), decoder="linear")
    design, acted = describe(synthetic.truth(adata), synthetic.dataset(adata))
    assert (design.interventions, design.targets, design.hits) == ("hard", "known", (1, 1, 1))
    assert np.array_equal(acted, adata.uns["truth"]["targets"])


# ---------------------------------------------------------------------- with and without the graph
@pytest.mark.parametrize("known", [True, False])
def test_hard_interventions_identify_the_graph(known: bool) -> None:
    cells = screen()
    report = identify(run_of(cells, known, interventions="hard"), cells)
    low, high = report.interval()
    assert report.estimator == "exact"
    assert 0.1 < low < report.gain < high
    assert report.identified
    assert "graph identified" in str(report)
    assert report.design.hits == (1, 1, 1)
    assert report.graph.number_of_edges() == 2
    assert report.gains.shape == (1, 300)
    assert list(report.table().index) == ["noise z", "targets", "causal order", "graph"]


def test_shifts_of_the_noise_do_not() -> None:
    cells = screen("shift")
    report = identify(run_of(cells), cells)
    assert abs(report.gain) < 0.01
    assert not report.identified
    assert report.verdict.startswith("graph not identified: environments change the noise alone")


def test_a_graph_that_theory_grants_but_the_data_do_not_need_is_not_identified() -> None:
    cells = screen(graph="empty")
    report = identify(run_of(cells, interventions="hard"), cells)
    assert {c.quantity: c.holds for c in report.claims}["graph"]
    assert report.verdict == "graph not identified: held-out cells do not gain 0.02 nats per cell by it"


def test_what_the_interventions_are_can_be_said() -> None:
    cells = screen("shift")
    report = identify(run_of(cells), cells, interventions="hard")
    assert report.design.interventions == "hard"
    assert not report.identified  # the cells are not as they would be under hard interventions


def test_a_flexible_decoder_is_compared_as_it_was_trained() -> None:
    cells = screen()
    run = run_of(cells, seeds=(0, 1), interventions="hard", hidden=(8,), edges="gated")
    before = {n: p.clone() for n, p in run.parameters.items()}
    report = identify(run, cells, particles=5)
    assert report.estimator == "svi"
    assert report.exact is None
    assert report.gains.shape == (2, 300)
    assert np.isfinite(report.gains).all()
    assert (report.gains != 0).any()
    assert "two different hard interventions" in report.verdict
    assert "2 seeds, svi" in str(report)
    assert all(torch.equal(p, before[n]) for n, p in run.parameters.items())  # the run is left as it was
    again = identify(run, cells, particles=5)
    assert np.array_equal(again.gains, report.gains)


def test_the_interval_is_of_seeds_and_cells() -> None:
    rng = np.random.default_rng(0)
    cells_by = np.repeat([0, 1], 200)
    seeds = np.array([[0.0], [1.0], [2.0]])
    alike = Report(HARD, claims(HARD), np.repeat(rng.normal(1, 1, (1, 400)), 3, 0), cells_by, 0.02, "svi", nx.DiGraph())
    apart = replace(alike, gains=seeds + 0 * alike.gains)
    low, high = alike.interval()
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.15)
    assert apart.interval() == pytest.approx((0, 2), abs=0.4)
    between = replace(alike, gains=10.0 * cells_by[None])
    assert between.interval() == pytest.approx((5, 5))  # environments are strata
    assert alike.interval() == alike.interval()


def test_what_cannot_be_compared_is_refused() -> None:
    cells = screen()
    run = run_of(cells, interventions="hard", hidden=(4,))
    with pytest.raises(ModelError, match="the exact estimator needs linear mechanisms"):
        identify(run, cells, estimator="exact")
    with pytest.raises(ModelError, match="unknown estimator 'mcmc'"):
        identify(run, cells, estimator="mcmc")
    with pytest.raises(ModelError, match="unknown interventions 'soft': use one of noise, hard, mechanism"):
        identify(run, cells, interventions="soft")
    with pytest.raises(DataError, match="identify needs cells of the reference environment"):
        identify(run, cells.subset(cells.env > 0))
    with pytest.raises(ModelError, match="identify needs a run of a LatentModel, this one is of Linear"):
        identify(replace(run, model=torch.nn.Linear(1, 1)), cells)

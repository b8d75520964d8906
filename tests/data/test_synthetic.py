import functools
import json
import math
from pathlib import Path
from typing import Any

import anndata
import networkx as nx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import nn

from pyro_scm import query
from pyro_scm.data import synthetic
from pyro_scm.data.synthetic import Screen, simulate, truth, world
from pyro_scm.errors import DataError, ModelError
from pyro_scm.model import LatentModel
from pyro_scm.nn import MaskedMLP
from pyro_scm.scm import LinearSCM, MechanismSCM

Array = NDArray[Any]
N = 3000


def small(**settings: Any) -> anndata.AnnData:
    return simulate(**{"latent": 4, "genes": 6, "environments": 3, "cells": 5, **settings})


@functools.cache
def screen_of(kind: str) -> anndata.AnnData:
    """0 -> 1 -> 2, 1 -> 3, linear; a control and four environments of N cells, one for each latent."""
    return simulate(
        latent=4, genes=3, environments=5, cells=N, graph=[[0, 1], [1, 2], [1, 3]], interventions=(kind,), strength=3.0
    )


def cells_of(adata: anndata.AnnData, e: int) -> tuple[Array, Array]:
    """z and c of the cells of environment e."""
    mask = adata.obs["perturbation"].cat.codes.to_numpy() == e
    return np.asarray(adata.obsm["z"])[mask], np.asarray(adata.obsm["c"])[mask]


def stored(adata: anndata.AnnData, name: str) -> Array:
    return np.asarray(adata.uns["truth"]["parameters"][name])


def standard_error(values: Array) -> Array:
    result: Array = values.std(0) / math.sqrt(len(values))
    return result


# ---------------------------------------------------------------------- seeds and round trips
def test_a_screen_is_that_of_its_seed() -> None:
    first, second, other = small(seed=3), small(seed=3), small(seed=4)
    for found in (second, other):
        same = found is second
        assert np.array_equal(first.X, found.X) is same
        assert np.array_equal(first.obsm["z"], found.obsm["z"]) is same
        assert np.array_equal(stored(first, "prior.loc"), stored(found, "prior.loc")) is same
    assert list(first.obs["targets"]) == list(second.obs["targets"])


def test_simulating_leaves_the_random_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    truth(small())
    assert torch.equal(torch.randn(3), expected)


def test_settings_come_as_a_screen_by_name_or_both() -> None:
    by_name = simulate(latent=3, genes=4, environments=2, cells=5, seed=6)
    screen = Screen(latent=3, genes=4, environments=2, cells=5, seed=6)
    assert np.array_equal(by_name.X, simulate(screen).X)
    assert np.array_equal(by_name.X, simulate(Screen(latent=3, genes=4, cells=5), environments=2, seed=6).X)
    with pytest.raises(TypeError, match="wings"):
        simulate(wings=2)


def test_cells_genes_and_environments_are_named() -> None:
    adata = small(environments=12, cells=2)
    assert adata.shape == (24, 6)
    assert list(adata.var_names[:2]) == ["gene_0", "gene_1"]
    assert list(adata.obs_names[[0, -1]]) == ["cell_0", "cell_23"]
    names = list(adata.obs["perturbation"].cat.categories)
    assert names == ["control", *(f"env_{e:02d}" for e in range(1, 12))]
    assert (adata.obs["perturbation"].value_counts() == 2).all()
    assert adata.X.dtype == np.float32
    assert adata.obsm["z"].shape == adata.obsm["c"].shape == (24, 4)


EVERY = [
    {},
    {"mechanism": "network", "graph": "growing", "latent": 6, "seed": 3},
    {"graph": [[2, 0], [0, 1]], "decoder": "linear", "interventions": ("hard", "scale")},
    {"observation": "negative-binomial", "graph": "multi-growing", "interventions": ("mechanism",), "targets": 2},
    {"graph": "empty", "interventions": ("shift", "scale", "mechanism", "hard"), "environments": 6, "descriptors": 3},
]


@pytest.mark.parametrize("settings", EVERY)
def test_the_truth_survives_a_file(settings: dict[str, Any], tmp_path: Path) -> None:
    adata = small(**settings)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    again = anndata.read_h5ad(tmp_path / "screen.h5ad")
    model, loaded = truth(adata), truth(again)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert model.sites == loaded.sites
    assert (model.regime is None) == (loaded.regime is None)
    assert all(not p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    for key in ("nodes", "graph", "targets", "shift"):
        assert np.array_equal(adata.uns["truth"][key], again.uns["truth"][key])
    assert list(again.obs["targets"]) == list(adata.obs["targets"])


@pytest.mark.parametrize("settings", EVERY)
def test_the_truth_gives_the_screen_s_causal_variables_from_its_noise(settings: dict[str, Any]) -> None:
    adata = small(**settings)
    model = truth(adata)
    z = torch.as_tensor(adata.obsm["z"])
    batch = world(len(adata.obs["perturbation"].cat.categories), adata.obs["perturbation"].cat.codes.to_numpy())
    gain = model.regime(batch) if model.regime is not None else None
    torch.testing.assert_close(model.scm.solve(z, gain), torch.as_tensor(adata.obsm["c"]))
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(batch)
    torch.testing.assert_close(trace.nodes["c"]["value"], torch.as_tensor(adata.obsm["c"]))


@pytest.mark.parametrize("settings", EVERY)
def test_latents_are_in_one_order_everywhere(settings: dict[str, Any]) -> None:
    """Columns of z, c and of the tables are nodes, in the order of ``nodes``; names speak of nodes."""
    adata = small(**settings)
    model, known = truth(adata), adata.uns["truth"]
    nodes = list(known["nodes"])
    assert tuple(nodes) == model.scm.nodes
    edges = {(nodes[i], nodes[j]) for j, i in np.argwhere(known["graph"])}
    assert edges == set(model.scm.graph.edges)
    by_environment = adata.obs.groupby("perturbation", observed=True)["targets"].first()
    for e, text in enumerate(by_environment):
        assert [t for t in text.split("+") if t] == [str(nodes[j]) for j in np.flatnonzero(known["targets"][e])]
        assert all(f"c_{t}" in model.sites for t in text.split("+") if t)
    assert not known["targets"][0].any()


def test_a_screen_of_another_origin_has_no_truth() -> None:
    adata = small()
    del adata.uns["truth"]
    with pytest.raises(DataError, match=r"no uns\['truth'\]: the truth is only known of a screen made by `simulate`"):
        truth(adata)


# ---------------------------------------------------------------------- what each kind of intervention does
def mixing(adata: anndata.AnnData, gain: Array | None = None) -> Array:
    """(I - G A)^-1."""
    a = stored(adata, "scm.weight") * stored(adata, "scm.mask")
    g = np.ones(len(a)) if gain is None else gain
    result: Array = np.linalg.inv(np.eye(len(a)) - g[:, None] * a)
    return result


def expect_moments(values: Array, mean: Array, covariance: Array) -> None:
    """Sample moments of normal values within 4.5 standard errors."""
    assert (np.abs(values.mean(0) - mean) < 4.5 * np.sqrt(np.diag(covariance) / len(values))).all()
    variances = np.diag(covariance)
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / len(values))
    assert (np.abs(np.cov(values.T) - covariance) < 4.5 * error).all()


@pytest.mark.parametrize("kind", synthetic.INTERVENTIONS)
def test_moments_of_every_environment_are_those_of_the_theory(kind: str) -> None:
    adata = screen_of(kind)
    shift, scale = stored(adata, "prior.loc"), np.exp(stored(adata, "prior.log_scale"))
    gain = stored(adata, "regime.gain") if kind in ("mechanism", "hard") else np.ones_like(shift)
    for e in range(5):
        z, c = cells_of(adata, e)
        noise = np.diag(scale[e] ** 2)
        expect_moments(z, shift[e], noise)
        m = mixing(adata, gain[e])
        expect_moments(c, m @ shift[e], m @ noise @ m.T)


@pytest.mark.parametrize("kind", synthetic.INTERVENTIONS)
def test_each_kind_changes_what_it_says_in_its_targets_and_nothing_else(kind: str) -> None:
    adata = screen_of(kind)
    targets = np.asarray(adata.uns["truth"]["targets"])
    assert targets.sum(1).tolist() == [0, 1, 1, 1, 1]
    assert targets.sum(0).tolist() == [1, 1, 1, 1]  # in turn
    parameters = adata.uns["truth"]["parameters"]
    shift, scale = stored(adata, "prior.loc"), np.exp(stored(adata, "prior.log_scale"))
    gain = stored(adata, "regime.gain") if "regime.gain" in parameters else np.ones_like(shift)
    assert ("regime.gain" in parameters) is (kind in ("mechanism", "hard"))
    assert np.array_equal(shift != 0, targets & (kind in ("shift", "hard")))
    assert np.array_equal(gain != 1, targets & (kind in ("mechanism", "hard")))
    assert np.array_equal(np.abs(np.log(scale)) > 1e-5, targets & (kind == "scale"))
    if kind == "scale":
        assert np.allclose(np.abs(np.log(scale[targets])), math.log(3))
    if kind in ("mechanism", "hard"):
        assert (gain[targets] == (-1 if kind == "mechanism" else 0)).all()
    assert np.array_equal(adata.uns["truth"]["shift"], shift)


def environment_of(adata: anndata.AnnData, j: int) -> int:
    return int(np.flatnonzero(np.asarray(adata.uns["truth"]["targets"])[:, j])[0])


def test_a_hard_intervention_cuts_the_parents() -> None:
    adata = screen_of("hard")
    e = environment_of(adata, 1)
    _, before = cells_of(adata, 0)
    _, after = cells_of(adata, e)
    assert abs(np.corrcoef(before[:, 0], before[:, 1])[0, 1]) > 0.5
    assert abs(np.corrcoef(after[:, 0], after[:, 1])[0, 1]) < 4.5 / math.sqrt(N)
    assert abs(np.corrcoef(after[:, 1], after[:, 2])[0, 1]) > 0.5  # its children still listen
    assert after[:, 1].std() == pytest.approx(1, rel=0.06)


def test_a_mechanism_change_turns_the_sign_of_the_parents_effect() -> None:
    adata = screen_of("mechanism")
    e = environment_of(adata, 1)
    before, after = (np.corrcoef(cells_of(adata, k)[1][:, :2].T)[0, 1] for k in (0, e))
    assert before * after < 0
    assert abs(before) == pytest.approx(abs(after), abs=0.1)


def test_a_shift_moves_the_target_and_its_descendants() -> None:
    adata = screen_of("shift")
    descendants = {0: {0, 1, 2, 3}, 1: {1, 2, 3}, 2: {2}, 3: {3}}
    _, control = cells_of(adata, 0)
    for j, expected in descendants.items():
        _, c = cells_of(adata, environment_of(adata, j))
        distance = np.abs(c.mean(0) - control.mean(0)) / np.hypot(standard_error(c), standard_error(control))
        assert set(np.flatnonzero(distance > 4.5)) == expected


def test_kinds_are_taken_in_turn() -> None:
    adata = small(latent=4, environments=9, interventions=("shift", "hard"))
    gain, targets = stored(adata, "regime.gain"), np.asarray(adata.uns["truth"]["targets"])
    cut = [(gain[e][targets[e]] == 0).all() for e in range(1, 9)]
    assert cut == [False, True] * 4


@pytest.mark.parametrize("cover", [True, False])
def test_targets_are_drawn_or_taken_in_turn(cover: bool) -> None:
    adata = small(latent=5, environments=41, cells=1, targets=2, cover=cover)
    targets = np.asarray(adata.uns["truth"]["targets"])[1:]
    assert (targets.sum(1) == 2).all()
    counts = targets.sum(0)
    assert counts.sum() == 80
    assert (counts == 16).all() if cover else ((counts != 16).any() and (counts > 5).all())


def test_strength_is_the_spread_or_the_size_of_shifts() -> None:
    options = {"latent": 2, "genes": 2, "environments": 801, "cells": 1}
    normal = stored(simulate(**options, strength=3.0), "prior.loc")
    normal = normal[normal != 0]
    assert len(normal) == 800
    assert abs(normal.mean()) < 4 * 3 / math.sqrt(800)
    assert normal.std() == pytest.approx(3, rel=0.1)
    constant = stored(simulate(**options, strength=3.0, constant=True), "prior.loc")
    values, counts = np.unique(constant[constant != 0], return_counts=True)
    assert values.tolist() == [-3, 3]
    assert counts.min() > 320


# ---------------------------------------------------------------------- graphs, mechanisms, decoders
@pytest.mark.parametrize("kind", synthetic.GRAPHS)
def test_kinds_of_graph(kind: str) -> None:
    graph = nx.DiGraph(list(map(tuple, np.argwhere(small(latent=7, graph=kind).uns["truth"]["graph"].T))))
    degrees = [d for _, d in graph.in_degree]
    if kind == "empty":
        assert degrees == []
    elif kind == "growing":
        assert sorted(degrees) == [0] + [1] * 6
    elif kind == "layered":
        assert nx.dag_longest_path_length(graph) == 2  # round(sqrt(7)) layers
        assert sorted(degrees) == [0] * 3 + [2] * 2 + [3] * 2
    else:
        assert max(degrees) <= 3
    assert small(latent=1, graph=kind).uns["truth"]["graph"].tolist() == [[0]]


def test_structural_equations_have_weights_of_one() -> None:
    linear = truth(small(latent=6, graph="multi-growing", seed=2)).scm
    assert isinstance(linear, LinearSCM)
    assert set(linear.matrix[linear.mask > 0].tolist()) == {-1, 1}
    networks = truth(small(latent=6, mechanism="network", graph="layered")).scm
    assert isinstance(networks, MechanismSCM)
    for net in networks.mechanisms:
        assert isinstance(net, MaskedMLP)
        assert net.first.shape[1] == 3
        assert set(net.first.flatten().tolist()) == set(net.second.flatten().tolist()) == {-1, 1}
        assert (net.offset == 0).all()


def reads(model: LatentModel) -> Array:
    """``[G, d]`` which latents each gene reads, found by moving them."""
    likelihood = model.likelihoods[0]
    torch.manual_seed(0)
    c = torch.randn(200, model.latent)
    rows = []
    for j in range(model.latent):
        moved = c.clone()
        moved[:, j] += 3
        rows.append(((likelihood.net(moved) - likelihood.net(c)).abs() > 1e-6).any(0))  # type: ignore[operator]
    result: Array = torch.stack(rows, 1).numpy()
    return result


@pytest.mark.parametrize("decoder", ["linear", "network"])
def test_genes_read_latents_with_the_probability_of_attachment(decoder: str) -> None:
    found = reads(truth(small(latent=8, genes=150, decoder=decoder, attachment=0.3)))
    share = found.mean()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 1200) + 0.7**8 / 8
    assert found.any(1).all()
    assert found.any(0).all()


@pytest.mark.parametrize("decoder", ["linear", "network"])
def test_every_gene_has_a_parent(decoder: str) -> None:
    found = reads(truth(small(latent=4, genes=100, attachment=0.0, decoder=decoder)))
    assert (found.sum(1) == 1).all()
    assert (found.sum(0) > 5).all()
    assert reads(truth(small(latent=4, genes=10, attachment=1.0, decoder=decoder))).all()


def test_gaussian_observations_have_the_noise_asked_for() -> None:
    adata = simulate(latent=3, genes=20, environments=2, cells=500, noise=0.4)
    model = truth(adata)
    batch = world(2, adata.obs["perturbation"].cat.codes.to_numpy())
    mean = model.likelihoods[0].mean(torch.as_tensor(adata.obsm["c"]), batch).numpy()  # type: ignore[operator]
    residual = np.asarray(adata.X) - mean
    assert residual.std(0) == pytest.approx(np.full(20, 0.4), rel=0.12)
    assert np.abs(residual.mean(0)).max() < 4.5 * 0.4 / math.sqrt(1000)
    silent = simulate(latent=3, genes=20, environments=2, cells=5, noise=0.0)
    assert np.abs(np.asarray(silent.X)).max() > 1
    exact = truth(silent).likelihoods[0].net(torch.as_tensor(silent.obsm["c"])).numpy()  # type: ignore[operator]
    np.testing.assert_allclose(np.asarray(silent.X), exact, atol=1e-4)


def test_counts_are_whole_and_have_the_library_sizes_asked_for() -> None:
    adata = simulate(
        latent=3, genes=80, environments=2, cells=400, observation="negative-binomial", depth=1500.0, dispersion=1000.0
    )
    x = np.asarray(adata.X)
    assert (x == np.round(x)).all()
    assert (x >= 0).all()
    size = x.sum(1)
    assert np.median(size) == pytest.approx(1500, rel=0.06)
    assert np.log(size).std() == pytest.approx(0.3, rel=0.12)
    spread = simulate(
        latent=3, genes=80, environments=2, cells=400, observation="negative-binomial", depth=1500.0, dispersion=0.5
    )
    assert np.asarray(spread.X).var(0).mean() > 3 * x.var(0).mean()
    cells = synthetic.dataset(adata)
    assert cells.counts
    assert cells.schema.statistics is not None
    assert cells.schema.statistics.depth == pytest.approx(1500, rel=0.06)


def test_fold_changes_of_counts_stay_within_bounds_under_any_shift() -> None:
    model = truth(small(observation="negative-binomial", decoder="linear"))
    out = model.likelihoods[0].net(1e6 * torch.randn(50, 4))  # type: ignore[operator]
    assert float(out.abs().max()) <= 2
    assert isinstance(model.likelihoods[0].net, nn.Module)


# ---------------------------------------------------------------------- as a data set
def test_the_data_set_describes_environments_as_asked() -> None:
    adata = small(descriptors=6, environments=5)
    one_hot = synthetic.dataset(adata)
    assert one_hot.representation.shape == (5, 4)
    assert one_hot.reference.tolist() == [True, False, False, False, False]
    assert (one_hot.representation[0] == 0).all()
    oracle = synthetic.dataset(adata, "oracle")
    np.testing.assert_allclose(oracle.representation, adata.uns["truth"]["shift"])
    described = synthetic.dataset(adata, "descriptors")
    np.testing.assert_allclose(described.representation, adata.uns["descriptors"].to_numpy())
    assert described.features == tuple(f"descriptor_{i}" for i in range(6))
    assert list(described.environments.index) == list(adata.obs["perturbation"].cat.categories)
    assert list(described.env) == list(adata.obs["perturbation"].cat.codes)


def test_descriptors_carry_the_effect_and_little_noise() -> None:
    adata = small(latent=4, environments=60, cells=1, descriptors=40, descriptor_noise=0.0)
    values, shift = adata.uns["descriptors"].to_numpy(), adata.uns["truth"]["shift"]
    assert values.dtype == np.float32
    assert (values[0] == 0).all()
    fit, *_ = np.linalg.lstsq(values, shift, rcond=None)
    np.testing.assert_allclose(values @ fit, shift, atol=1e-3)
    noisy = small(latent=4, environments=60, cells=1, descriptors=40, descriptor_noise=1.0)
    assert (noisy.uns["descriptors"].to_numpy()[0] == 0).all()
    difference = noisy.uns["descriptors"].to_numpy()[1:] - values[1:]
    assert difference.std() == pytest.approx(values.std(), rel=0.1)
    assert np.array_equal(noisy.X, adata.X)  # describing environments changes no cell
    assert "descriptors" not in small().uns


def test_the_truth_is_a_fitted_model() -> None:
    adata = small(environments=3, cells=6)
    cells = synthetic.dataset(adata)
    fitted = synthetic.known(adata, cells)
    found = query.embed(fitted, cells)
    np.testing.assert_allclose(found["z"][0], adata.obsm["z"], rtol=1e-6)
    np.testing.assert_allclose(found["c"][0], adata.obsm["c"], rtol=1e-4, atol=1e-5)
    rows = np.array([11, 2, 7])
    part = cells.subset(rows)
    np.testing.assert_allclose(query.embed(synthetic.known(adata, part), part)["z"][0], adata.obsm["z"][rows])
    asked = query.counterfactual(fitted, cells, do={"c_1": 2.0})
    assert (asked.c[..., 1] == 2).all()


def test_a_world_of_cells() -> None:
    batch = world(3, np.array([2, 0, 0]), size=np.array([5.0, 6.0, 7.0]), x=torch.ones(3, 4))
    assert batch.env.tolist() == [2, 0, 0]
    assert batch.e.tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert batch.perturbed.tolist() == [0, 1, 1]
    assert batch.size is not None
    assert batch.size.tolist() == [5, 6, 7]
    assert batch.total == 3
    assert world(3, np.array([1])).size is None
    assert world(3, np.array([1])).x is None


# ---------------------------------------------------------------------- settings that make no screen
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent": 0}, "latent = 0: a screen needs at least 1"),
        ({"genes": 0}, "genes = 0: a screen needs at least 1"),
        ({"environments": 0}, "environments = 0: a screen needs at least 1"),
        ({"cells": -1}, "cells = -1: a screen needs at least 1"),
        ({"targets": 0}, r"targets = 0: choose between 1 and the number of latents \(4\)"),
        ({"targets": 5}, r"targets = 5: choose between 1 and the number of latents \(4\)"),
        ({"attachment": 1.5}, "attachment = 1.5: give a probability"),
        ({"dispersion": 0.0}, r"dispersion = 0.0: choose between exp\(-8\) and exp\(8\)"),
        ({"dispersion": 3000.0}, r"dispersion = 3000.0: choose between exp\(-8\) and exp\(8\)"),
        ({"noise": -0.1}, "noise = -0.1: a standard deviation is at least 0"),
        ({"strength": -1.0}, "strength = -1.0: a standard deviation is at least 0"),
        ({"depth": 0.0}, "depth = 0.0: give a positive library size"),
        ({"graph": "ring"}, "unknown graph 'ring': use empty, growing, multi-growing, layered"),
        ({"mechanism": "spline"}, "unknown mechanism 'spline': use linear, network"),
        ({"decoder": "spline"}, "unknown decoder 'spline': use linear, network"),
        ({"observation": "poisson"}, "unknown observation 'poisson': use gaussian, negative-binomial"),
        ({"interventions": ("shift", "soft")}, "unknown interventions 'soft': use shift, scale, mechanism, hard"),
        ({"interventions": ()}, "no kind of intervention given: name at least one of shift, scale, mechanism, hard"),
    ],
)
def test_settings_that_make_no_screen_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small(**settings)


def test_edges_that_make_no_graph_are_refused() -> None:
    with pytest.raises(ModelError, match="the latent graph has a cycle"):
        small(graph=[[0, 1], [1, 0]])
    with pytest.raises(ModelError, match="the prior has 4 latents and the causal layer 5"):
        small(graph=[[0, 9]])


def test_the_screen_is_kept_as_text() -> None:
    adata = small(graph=[[0, 1]], interventions=("hard",), seed=2)
    kept = json.loads(adata.uns["truth"]["screen"])
    assert kept["graph"] == [[0, 1]]
    assert kept["interventions"] == ["hard"]
    assert Screen(**kept).seed == 2


# ---------------------------------------------------------------------- screens of the literature
def test_screens_have_the_numbers_of_their_descriptions() -> None:
    adata = synthetic.simulate("sams-vae", cells=20)
    shift, targets = adata.uns["truth"]["shift"], adata.uns["truth"]["targets"]
    assert adata.shape == (101 * 20, 100)
    assert shift.shape == (101, 15)
    assert (targets[1:].sum(1) >= 1).all()
    assert targets[1:].mean() == pytest.approx(2 / 15, abs=0.02)
    sizes = np.abs(shift[targets])
    assert sizes.mean() == pytest.approx(5, abs=0.15)
    assert sizes.std() == pytest.approx(0.5, abs=0.12)
    counted = synthetic.simulate("svae", cells=3)
    assert sorted(set(counted.uns["truth"]["targets"][1:].sum(1))) == [1, 2, 3]
    assert np.array_equal(np.round(counted.X), counted.X)
    hard = synthetic.simulate("linear-disentanglement", cells=10)
    assert hard.uns["truth"]["targets"][1:].sum(0).tolist() == [1] * 5
    chain = synthetic.simulate("discrepancy-chain", cells=10)
    assert chain.uns["truth"]["graph"].sum() == 4
    with pytest.raises(DataError, match="unknown screen 'other': use one of five-latents, sams-vae, svae"):
        synthetic.simulate("other")


def test_noise_is_a_share_of_each_genes_spread() -> None:
    adata = synthetic.simulate("sams-vae", cells=100)
    model = synthetic.truth(adata)
    cells = synthetic.dataset(adata)
    with torch.no_grad():
        mean = model.likelihoods[0].location(torch.as_tensor(adata.obsm["c"]), cells.batch())
    share = (adata.X - mean.numpy()).std(0) / mean.numpy().std(0)
    assert np.allclose(share, 0.2, atol=0.03)


def test_deep_decoders_are_orthogonal() -> None:
    adata = synthetic.simulate(latent=4, genes=30, environments=2, cells=5, decoder="deep", layers=2, width=12)
    weights = [w for n, w in synthetic.truth(adata).state_dict().items() if "net" in n and n.endswith("weight")]
    assert [tuple(w.shape) for w in weights] == [(12, 4), (12, 12), (30, 12)]
    for w in weights:
        assert torch.allclose(w.mT @ w, torch.eye(w.shape[1]), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": 3, "most_targets": 2}, "most_targets = 2: choose between targets"),
        ({"target_share": 1.5}, "target_share = 1.5: give a probability"),
        ({"noise_share": 0.1, "observation": "negative-binomial"}, "noise_share is of Gaussian observations"),
        ({"decoder": "deep", "layers": 0}, "layers = 0: a screen needs at least 1"),
    ],
)
def test_settings_of_deep_screens_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        synthetic.simulate(**settings)

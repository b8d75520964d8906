import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from anndata import AnnData
from numpy.typing import NDArray
from pyro.distributions import Delta
from scipy.stats import nbinom
from torch import Tensor, nn

from guides import amortise
from pyro_scm import baselines, evaluation, mean_predictions, metrics, query, recipes
from pyro_scm.batch import Batch
from pyro_scm.data import splits, synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.single_cell import differential_genes, halves
from pyro_scm.distributions import NegativeBinomial
from pyro_scm.errors import CheckpointError, DataError, ModelError
from pyro_scm.evaluation import Comparison, compare, predict_means, recovery, score
from pyro_scm.infer import fit
from pyro_scm.mean_predictions import predict_cells
from pyro_scm.model import LatentModel
from pyro_scm.objectives import Objective
from pyro_scm.priors import StandardPrior
from pyro_scm.run import Environments, Run, Settings

FAST: dict[str, Any] = {"epochs": 2, "seeds": (0, 1), "progress": False}


class Exact(nn.Module):
    """The guide that knows z: each cell is recognised by its expression."""

    def __init__(self, x: NDArray[Any], z: NDArray[Any]) -> None:
        super().__init__()
        self.x, self.z = torch.as_tensor(np.asarray(x)), torch.as_tensor(np.asarray(z), dtype=torch.float32)

    def forward(self, batch: Batch) -> Tensor:
        assert batch.x is not None
        found = torch.cdist(batch.x, self.x, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert float(found.values.max()) == 0
        with batch.plate():
            value: Tensor = pyro.sample("z", Delta(self.z[found.indices], event_dim=1))
        return value


def run_of(model: nn.Module, guide: nn.Module, cells: EnvironmentDataset) -> Run:
    """A run of one member that was never trained."""
    parameters = {f"model.{name}": p.detach()[None].clone() for name, p in model.named_parameters()}
    parameters |= {f"guide.{name}": p.detach()[None].clone() for name, p in guide.named_parameters()}
    return Run(
        model=model,
        guide=guide,
        parameters=parameters,
        seeds=(7,),
        schema=cells.schema,
        environments=Environments.of(cells),
        history=pd.DataFrame(),
        settings=Settings(0, 1, 1e-3, "constant", 1.0, 0.0, None, None, 0.0, None, 1),
        stopped=(0,),
        losses=(0.0,),
    )


def screen(**settings: Any) -> tuple[AnnData, EnvironmentDataset]:
    options = {"latent": 3, "genes": 12, "environments": 6, "cells": 40, "descriptors": 8, **settings}
    adata = synthetic.simulate(**options)
    return adata, synthetic.dataset(adata, "descriptors")


def true_mean(adata: AnnData, environment: int, depth: float, cells: int = 20_000) -> NDArray[np.float64]:
    """Mean normalised expression of cells simulated in one environment by the true model."""
    settings = synthetic.Screen(**json.loads(adata.uns["truth"]["screen"]))
    env = np.full(cells, environment)
    counts = settings.observation != "gaussian"
    size = np.random.default_rng(1).lognormal(np.log(settings.depth), 0.3, cells) if counts else None
    torch.manual_seed(1)
    with torch.no_grad():
        x = synthetic.truth(adata)(synthetic.world(settings.environments, env, size=size))["x"].double().numpy()
    return (np.log1p(x / size[:, None] * depth) if size is not None else x).mean(0)


# ---------------------------------------------------------------------- predictions
@pytest.mark.parametrize("mean", [0.01, 0.5, 8.0, 300.0])
@pytest.mark.parametrize("dispersion", [0.3, 5.0, 1000.0])
@pytest.mark.parametrize("factor", [0.1, 1.0, 4.0])
def test_the_expected_logarithm_of_counts_is_their_sum(mean: float, dispersion: float, factor: float) -> None:
    counts = np.arange(30_000)
    exact = nbinom.pmf(counts, dispersion, dispersion / (dispersion + mean)) @ np.log1p(factor * counts)
    law = NegativeBinomial(torch.tensor([[math.log(mean)]]), torch.tensor([[math.log(dispersion)]]))
    assert float(mean_predictions._expected_log1p(law, torch.tensor([[factor]]))) == pytest.approx(
        exact, rel=1e-4, abs=3e-6
    )


@pytest.mark.parametrize("observation", ["gaussian", "negative-binomial"])
def test_the_true_model_predicts_the_true_interventional_mean(observation: str) -> None:
    adata, cells = screen(cells=800, observation=observation, interventions=("shift", "scale", "hard"))
    names = [str(name) for name in cells.environments.index]
    own = np.flatnonzero(cells.env == 0)
    run = run_of(synthetic.truth(adata), Exact(adata.X, adata.obsm["z"]), cells)
    predicted = predict_means(run, cells.subset(own), names, cells=800)[0]
    depth = cells.subset(own).schema.summary.depth
    spread = np.stack([np.asarray(cells.normalised(depth))[cells.env == e].std(0) for e in range(6)])
    truth = np.stack([true_mean(adata, e, depth) for e in range(6)])
    standard_error = np.sqrt(spread**2 + spread[0] ** 2) / np.sqrt(800)
    assert np.abs((predicted - truth) / standard_error).max() < 5
    change = truth - truth[0]
    assert np.sqrt(np.mean((predicted - predicted[0] - change) ** 2)) < 0.1 * np.sqrt(np.mean(change**2))
    # the reference itself: no change from what was observed, to the last digit
    np.testing.assert_allclose(predicted[0], np.asarray(cells.normalised(depth))[own].mean(0), atol=1e-5)


def test_integrating_over_counts_is_nearer_to_the_truth_than_drawing_or_expecting_them() -> None:
    adata, cells = screen(latent=5, genes=100, environments=4, cells=500, observation="negative-binomial", depth=300.0)
    own = cells.subset(cells.env == 0)
    depth = own.schema.summary.depth
    truth = np.stack([true_mean(adata, e, depth, 10_000) for e in range(4)])
    model, guide = synthetic.truth(adata), Exact(adata.X, adata.obsm["z"])
    names = [str(name) for name in cells.environments.index]
    scale = (depth / own.size)[:, None]
    errors: dict[str, list[float]] = {"integrated": [], "expected": [], "drawn": []}
    predicted = predict_means((model, guide), own, names, cells=500)[0]
    for e in range(1, 4):
        change = truth[e] - truth[0]
        answers = {"integrated": predicted[e] - predicted[0]}
        for name, sample in (("expected", False), ("drawn", True)):
            worlds = query.counterfactual((model, guide), own, environment=names[e], sample=sample)
            answers[name] = (np.log1p(worlds.x[0, 0] * scale) - np.log1p(worlds.factual_x[0, 0] * scale)).mean(0)
        for name, answer in answers.items():
            errors[name].append(metrics.rmse(change, answer))
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    assert means["integrated"] < 0.8 * means["expected"]
    assert means["integrated"] < 0.8 * means["drawn"]


def test_a_law_of_counts_without_a_closed_form_is_drawn() -> None:
    torch.manual_seed(0)
    rates = torch.tensor([1.0, 30.0]).expand(4000, 2)
    trace = SimpleNamespace(nodes={"x": {"fn": torch.distributions.Independent(torch.distributions.Poisson(rates), 1)}})
    size = torch.full((4000,), 50.0)
    found = mean_predictions.log_expression(trace, size, 100.0).mean(0)
    counts = np.arange(200)
    law = nbinom.pmf(counts[:, None], 1e7, 1e7 / (1e7 + np.array([1.0, 30.0])))
    np.testing.assert_allclose(found, np.log1p(2.0 * counts) @ law, atol=0.02)


@pytest.fixture(scope="module")
def fitted() -> tuple[AnnData, splits.Split, Comparison]:
    """A small screen with two models, two seeds each."""
    adata, cells = screen(environments=13, genes=20)
    split = splits.by_environment(cells, fraction=0.5)
    models = {"environment_vae": {}, "plain": {"recipe": "vae", "hidden": ()}}
    return adata, split, compare(split, models, latent=3, degs=5, cells=30, **FAST)


def test_a_model_without_environments_predicts_no_change(fitted: tuple[AnnData, splits.Split, Comparison]) -> None:
    _, split, comparison = fitted
    names = comparison.config["environments"]
    run = comparison.runs["plain"]
    predicted = predict_means(run, split.train, names)
    np.testing.assert_allclose(predicted, np.stack([baselines.controls(split.train, names)] * 2), atol=1e-6)
    changed = predict_means(comparison.runs["environment_vae"], split.train, names)
    assert np.abs(changed - predicted).max() > 1e-3


def test_a_prediction_is_the_control_plus_the_mean_counterfactual_change() -> None:
    _, cells = screen()
    model = recipes.make("conditional_vae", cells.schema, latent=3)[0]
    point = recipes.make("ae", cells.schema, latent=3)[1]  # a guide without noise: the same cells give the same answer
    for own in (model, point):
        for p in own.parameters():
            nn.init.normal_(p, std=0.3)
    predicted = predict_means((model, point), cells, ["env_2", "env_4"], cells=40)[0]
    controls = cells.of("control")
    for row, name in zip(predicted, ["env_2", "env_4"], strict=True):
        worlds = query.counterfactual((model, point), controls, environment=name)
        change = worlds.effect[0, 0].mean(0)
        assert np.abs(change).max() > 0.01
        np.testing.assert_allclose(row, np.asarray(controls.x).mean(0) + change, atol=1e-5)


def test_predictions_are_those_of_each_member(fitted: tuple[AnnData, splits.Split, Comparison]) -> None:
    _, split, comparison = fitted
    run = comparison.runs["environment_vae"]
    both = predict_means(run, split.train, ["env_01"], seed=3)
    assert both.shape == (2, 1, 20)
    np.testing.assert_allclose(predict_means(run.member(0), split.train, ["env_01"], seed=3)[0], both[0], rtol=1e-6)
    np.testing.assert_allclose(predict_means(run.member(1), split.train, ["env_01"], seed=4)[0], both[1], rtol=1e-6)
    assert np.abs(both[0] - both[1]).max() > 1e-3
    assert predict_means(run, split.train, [], seed=3).shape == (2, 0, 20)


def test_fewer_cells_are_a_random_part_and_few_are_used_several_times(
    fitted: tuple[AnnData, splits.Split, Comparison],
) -> None:
    _, split, comparison = fitted
    run = comparison.runs["environment_vae"]
    one, same, other = (predict_means(run, split.train, ["env_01"], cells=10, seed=s) for s in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    # 40 reference cells: 4000 asked for is 100 draws of each, whose mean varies less than that of 1 draw
    often = [predict_means(run, split.train, ["env_01"], cells=4000, seed=s)[0] for s in range(4)]
    seldom = [predict_means(run, split.train, ["env_01"], cells=40, seed=s)[0] for s in range(4)]
    assert np.std(often, axis=0).mean() < 0.3 * np.std(seldom, axis=0).mean()


def test_cells_come_from_the_controls_of_the_environment_s_cell_line() -> None:
    adata, _ = screen(cells=20)
    adata.obs["line"] = np.tile(["x", "y"], adata.n_obs // 2)
    adata.X[adata.obs["line"] == "y"] += 100
    cells = EnvironmentDataset.from_anndata(adata, environment="perturbation", control="control", cell_line="line")
    model, guide = recipes.make("vae", cells.schema, latent=3)
    names = ["env_2 y", "env_2 x", "env_3 y"]
    predicted = predict_means((model, guide), cells, names)[0]
    own = {line: np.asarray(cells.of(f"control {line}").x).mean(0) for line in "xy"}
    np.testing.assert_allclose(predicted, np.stack([own["y"], own["x"], own["y"]]), atol=1e-4)
    # each environment is answered in its place, whatever else is asked
    model, guide = (recipes.make(n, cells.schema, latent=3)[i] for i, n in enumerate(("conditional_vae", "ae")))
    single = [predict_means((model, guide), cells, [name])[0, 0] for name in names]
    assert np.abs(single[0] - single[2]).max() > 1e-3
    np.testing.assert_allclose(predict_means((model, guide), cells, names)[0], np.stack(single), rtol=1e-6)


def test_predictions_of_unknown_environments_or_from_no_cells_are_refused() -> None:
    _, cells = screen()
    pair = recipes.make("vae", cells.schema, latent=3)
    with pytest.raises(DataError, match=r"no environment 'env_9': did you mean one of"):
        predict_means(pair, cells, ["env_9"])
    with pytest.raises(DataError, match=r"cells is 0: predict from 1 reference cell or more"):
        predict_means(pair, cells, ["env_1"], cells=0)
    with pytest.raises(DataError, match=r"no cells of a reference environment"):
        predict_means(pair, cells.of("env_1"), ["env_1"])


# ---------------------------------------------------------------------- scores
def test_scores_by_hand() -> None:
    control, truth = np.array([1.0, 1.0, 1.0, 1.0]), np.array([2.0, 0.0, 3.0, 1.0])
    prediction = np.array([2.0, 1.0, 2.0, 1.0])
    # changes 1, -1, 2, 0 (mean 1/2) and 1, 0, 1, 0 (mean 1/2); on genes 0, 1: 1, -1 and 1, 0
    found = score(truth, prediction, control, [0, 1])
    assert found["delta_pearson"] == pytest.approx((0.5 * 0.5 + 1.5 * 0.5 + 1.5 * 0.5 + 0.5 * 0.5) / math.sqrt(5 * 1))
    assert found["delta_r2"] == pytest.approx(1 - 2 / 5)
    assert found["rmse"] == pytest.approx(math.sqrt(2 / 4))
    assert found["delta_pearson_deg"] == pytest.approx(1)
    assert found["delta_r2_deg"] == pytest.approx(1 - 1 / 2)
    assert found["rmse_deg"] == pytest.approx(math.sqrt(1 / 2))
    assert found["mae"] == pytest.approx(1 / 2)
    # of the means themselves: 2, 0, 3, 1 (mean 3/2, squares 5) and 2, 1, 2, 1 (mean 3/2, squares 1)
    assert found["r2"] == pytest.approx(1 - 2 / 5)
    assert found["squared_pearson"] == pytest.approx(2**2 / 5)
    assert found["deg_recall"] == pytest.approx((1 + 0) / 2)  # changes 1, 0, 1, 0: genes 0 and 2 are first
    whole = ["delta_pearson", "delta_r2", "rmse", "mae", "r2", "squared_pearson"]
    assert list(score(truth, prediction, control)) == whole
    assert list(found) == [*whole, *(f"{name}_deg" for name in whole), "deg_recall"]


def test_the_truth_scores_best_and_no_genes_score_nothing() -> None:
    truth, control = np.array([2.0, 0.0, 3.0]), np.zeros(3)
    found = score(truth, truth, control, [])
    assert [found["delta_pearson"], found["delta_r2"], found["rmse"]] == pytest.approx([1, 1, 0])
    assert all(math.isnan(found[f"{name}_deg"]) for name in ("delta_pearson", "delta_r2", "rmse"))


def task(degs: int = 4, **settings: Any) -> evaluation._Task:
    _, cells = screen(**{"environments": 11, "genes": 20, "cells": 30, **settings})
    return evaluation._task(splits.by_environment(cells, fraction=0.6), degs, seed=0)


def test_a_task_scores_the_truth_best_and_swapped_labels_badly() -> None:
    asked = task()
    change = asked.truth - asked.control
    table = pd.DataFrame(asked.scores(change), columns=["environment", "metric", "value"])
    means = table.groupby("metric")["value"].mean()
    best = {"delta_pearson": 1, "delta_r2": 1, "rmse": 0, "mae": 0, "r2": 1, "squared_pearson": 1}
    best |= {f"{k}_deg": v for k, v in best.items()} | {"rank": 0, "discrimination": 1}
    recall = means.pop("deg_recall")  # the genes were called on the other cells
    assert means.to_dict() == pytest.approx(best, abs=1e-12)
    assert 0.3 < recall <= 1  # by chance 4 of 20
    swapped = pd.DataFrame(asked.scores(np.roll(change, 1, axis=0)), columns=["environment", "metric", "value"])
    assert swapped[swapped["metric"] == "rank"]["value"].mean() > 0.3
    assert swapped[swapped["metric"] == "delta_pearson"]["value"].mean() < 0.5
    assert table["environment"].unique().tolist() == list(asked.environments)


@pytest.mark.parametrize("recipe", ["ae", "environment_vae"])
def test_held_out_cells_are_scored_as_the_objective_does(recipe: str) -> None:
    _, cells = screen(cells=20)
    model, guide = recipes.make(recipe, cells.schema, latent=3)
    own = cells.of("env_2")
    found = evaluation._cell_scores(model, guide, own, len(cells), 1.0)
    objective = Objective(particles=400)
    torch.manual_seed(2)
    batch = own.batch()
    with torch.no_grad():
        loss = objective.loss(model.forward, guide.forward, batch) / len(own)
        z = query.abduct(guide.forward, batch)["z"]
        rebuilt = model.likelihoods[0].mean(z, batch)
    assert found["nll"] == pytest.approx(loss, rel=0.02)
    assert batch.x is not None
    assert found["reconstruction_rmse"] == pytest.approx(float((batch.x - rebuilt).square().mean().sqrt()), rel=1e-5)
    if recipe == "ae":  # no prior, no noise: minus the log-density of the cells at their code
        density = model.likelihoods[0].distribution(z, batch).log_prob(batch.x).mean().detach()
        assert found["nll"] == found["reconstruction"] == pytest.approx(-float(density), rel=1e-5)
    else:
        assert found["nll"] > found["reconstruction"]


def test_scores_of_cells_do_not_depend_on_the_size_of_the_training_set_or_of_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, cells = screen(cells=20, observation="negative-binomial")
    model, guide = recipes.make("ae", cells.schema, latent=3)
    own = cells.of("env_2")
    one = evaluation._cell_scores(model, guide, own, len(cells), 100.0)
    monkeypatch.setattr(evaluation, "_CHUNK", 7)
    assert evaluation._cell_scores(model, guide, own, 10 * len(cells), 100.0) == pytest.approx(one, rel=1e-5)
    batch = own.batch()
    assert batch.size is not None
    assert batch.x is not None
    with torch.no_grad():
        law = model.likelihoods[0].distribution(query.abduct(guide.forward, batch)["z"], batch)
        scale = (100 / batch.size)[:, None]
        rebuilt = torch.log1p(law.sample((3000,)) * scale).mean(0)
        error = (torch.log1p(batch.x * scale) - rebuilt).square().mean().sqrt()
    assert one["reconstruction_rmse"] == pytest.approx(float(error), rel=1e-2)


def test_sites_that_all_cells_share_are_shared_out_over_the_training_cells() -> None:
    class Level(nn.Module):
        latent = 3

        def forward(self, batch: Batch) -> Any:
            level = pyro.sample("level", pyro.distributions.Normal(0.0, 1.0))
            return pyro.distributions.Normal(level, 1.0).expand([len(batch), 3]).to_event(1)

    _, cells = screen(cells=20)
    model = LatentModel(Level(), recipes.make("vae", cells.schema, latent=3)[0].likelihoods[0])
    guide = amortise(model, cells.schema)
    own = cells.of("env_2")
    with torch.no_grad():
        level = guide.outside["level"]()
        share = float(torch.distributions.kl_divergence(level, torch.distributions.Normal(0.0, 1.0)))
    few, many = (evaluation._cell_scores(model, guide, own, total, 1.0)["nll"] for total in (20, 200))
    assert few - many == pytest.approx(share * (1 / 20 - 1 / 200), rel=1e-2)


# ---------------------------------------------------------------------- the protocol
def scores_of(comparison: Comparison, model: str, metric: str) -> dict[str, float]:
    table = comparison.scores
    own = table[(table["model"] == model) & (table["metric"] == metric)]
    return dict(zip(own["environment"], own["value"], strict=True))


def test_scores_are_those_computed_by_hand() -> None:
    _, cells = screen(environments=9, genes=20, cells=25, decoder="linear")
    split = splits.by_environment(cells, fraction=0.4, seed=1)
    comparison = compare(split, [], degs=5, seed=3)
    names = comparison.config["environments"]
    assert set(names) == set(split.held_out)

    x = np.asarray(cells.x, np.float64)

    def mean(part: EnvironmentDataset, name: str) -> NDArray[np.float64]:
        own = part.of(name)
        assert own.origin is not None
        return x[own.origin].mean(0)

    for_training, for_scoring = halves(split.train.of("control"), 3)
    for_degs, for_truth = halves(split.test, 3)
    train = split.train.subset(~np.isin(split.train.origin, for_scoring.origin))
    assert len(train) == len(split.train) - 12
    control = mean(for_scoring, "control")
    deltas = []
    for e in train.present[1:]:
        name = str(train.environments.index[e])
        deltas.append(mean(train, name) - mean(for_training, "control"))
    change = np.mean(deltas, axis=0)
    both = cells.subset(np.concatenate([for_degs.origin, for_training.origin]))
    genes = differential_genes(both, top=5)
    for name in names:
        truth = mean(for_truth, name)
        assert comparison.degs[name].tolist() == genes[name].tolist()
        expected = score(truth, control + change, control, genes[name])
        for metric, value in expected.items():
            assert scores_of(comparison, "training_mean", metric)[name] == pytest.approx(value, rel=1e-4), metric
    ranks = metrics.perturbation_rank(
        np.stack([mean(for_truth, name) for name in names]) - control,
        baselines.Ridge().fit(train).predict(names) - mean(for_training, "control"),
    )
    assert list(scores_of(comparison, "ridge", "rank").values()) == pytest.approx(ranks.tolist())
    assert set(scores_of(comparison, "no_change", "rank").values()) == {0.5}
    assert all(math.isnan(value) for value in scores_of(comparison, "no_change", "delta_pearson").values())


def test_a_screen_without_effects_scores_nothing() -> None:
    _, cells = screen(environments=21, genes=200, cells=30, decoder="linear", strength=1e-3, noise=20.0)
    split = splits.by_environment(cells, fraction=0.4)
    comparison = compare(split, [], degs=20)
    for metric in ("delta_pearson", "delta_pearson_deg"):
        assert abs(comparison.summary()[metric]["training_mean"]) < 0.2
    # what the protocol is for: with one control on both sides of the score the same baseline looks excellent
    names = [str(name) for name in split.held_out]
    control = baselines.controls(split.train, names)
    predicted = baselines.TrainingMean().fit(split.train).predict(names)
    truth = baselines.environment_means(split.test, 1.0)[0][split.test.environment_index(*names)]
    shared = [metrics.delta_pearson(*row) for row in zip(truth, predicted, control, strict=True)]
    assert np.mean(shared) > 0.5


def test_ridge_is_near_perfect_where_the_descriptors_hold_a_linear_effect() -> None:
    options = {"descriptors": 10, "descriptor_noise": 0.0, "decoder": "linear", "noise": 0.1}
    _, cells = screen(latent=4, genes=30, environments=40, cells=80, targets=3, cover=False, **options)
    comparison = compare(splits.by_environment(cells, fraction=0.25), [], degs=10)
    summary = comparison.summary()
    for metric in ("delta_pearson", "delta_r2", "delta_pearson_deg", "delta_r2_deg"):
        assert summary[metric]["ridge"] > 0.98
        assert summary[metric].idxmax() == "ridge"
    assert summary["rank"]["ridge"] < 0.02
    assert summary["rmse"].idxmin() == "ridge"


def test_no_cell_is_on_two_sides() -> None:
    asked = task()
    controls = asked.train.subset(asked.train.reference[asked.train.env])
    assert len(controls) == 15
    assert not set(np.asarray(asked.train.origin)) & set(np.asarray(asked.held_out.origin))


def few_cells(*counts: int) -> splits.Split:
    """Held-out environments env_1, env_2, ... of so many cells."""
    _, cells = screen(environments=11, genes=20, cells=12)
    names = [f"env_{e:02d}" for e in range(1, len(counts) + 1)]
    keep = np.ones(len(cells), bool)
    for name, count in zip(names, counts, strict=True):
        keep[np.flatnonzero(cells.env == cells.environment_index(name)[0])[count:]] = False
    return splits.by_environment(cells.subset(keep), held_out=names)


def test_environments_of_few_cells_have_no_differential_genes_and_single_cells_are_left_out() -> None:
    split = few_cells(1, 2, 3, 4, 12)
    comparison = compare(split, [], degs=3)
    assert comparison.config["environments"] == ["env_02", "env_03", "env_04", "env_05"]
    assert comparison.config["notes"] == [
        "not scored, for they have a single cell: 'env_01'",
        "differential genes need 4 cells and 2 controls: not called in 2 environments",
    ]
    assert set(comparison.degs) == {"env_04", "env_05"}
    missing = [name for name, v in scores_of(comparison, "training_mean", "rmse_deg").items() if math.isnan(v)]
    assert missing == ["env_02", "env_03"]
    summary = comparison.summary()
    assert (summary["environments"]["ridge"], summary["rmse_n"]["ridge"], summary["rmse_deg_n"]["ridge"]) == (4, 4, 2)
    # all cells make the truth where they are few
    asked = evaluation._task(split, 3, 0)
    np.testing.assert_allclose(asked.truth[0], np.asarray(split.test.of("env_02").x).mean(0), rtol=1e-5)
    second = halves(split.test.of("env_04", "env_05"), 0)[1]
    np.testing.assert_allclose(asked.truth[2], np.asarray(second.of("env_04").x).mean(0), rtol=1e-5)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no environment has 2 held-out cells or more"):
        compare(few_cells(1, 1), [])


def test_a_reference_of_one_cell_is_on_both_sides_and_says_so() -> None:
    split = few_cells(12, 12)
    lone = split.train.subset(
        np.flatnonzero(~split.train.reference[split.train.env] | (np.arange(len(split.train)) == 0))
    )
    assert lone.reference[lone.env].sum() == 1
    comparison = compare(replace(split, train=lone), [], degs=3)
    assert comparison.config["notes"] == [
        "references of one cell, both trained on and scored against: 'control'",
        "differential genes need 4 cells and 2 controls: not called in 2 environments",
    ]
    assert comparison.config["cells"]["training"] == len(lone)
    assert comparison.summary()["delta_pearson_deg"].isna().all()


WITHOUT_GENES = ["delta_pearson", "delta_r2", "rmse", "mae", "r2", "squared_pearson", "rank", "discrimination"]


def test_without_scanpy_there_are_no_scores_of_differential_genes(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "scanpy" else found(name, *a))
    comparison = compare(few_cells(12, 12), [])
    assert comparison.config["notes"] == [
        "no scores of differential genes: scanpy is not installed (pyro-scm[single-cell])"
    ]
    assert comparison.scores["metric"].unique().tolist() == WITHOUT_GENES
    assert comparison.degs == {}
    assert comparison.config["degs"] == 0


def test_differential_genes_are_left_out_on_demand() -> None:
    comparison = compare(few_cells(12, 12), [], degs=0)
    assert comparison.scores["metric"].unique().tolist() == WITHOUT_GENES
    assert comparison.config["notes"] == []


def test_counts_in_sparse_storage_are_compared_as_dense_ones() -> None:
    import scipy.sparse as sp

    _, cells = screen(environments=7, genes=20, cells=15, observation="negative-binomial")
    split = splits.by_environment(cells, fraction=0.4)
    sparse = replace(
        split,
        train=replace(split.train, x=sp.csr_matrix(split.train.x)),
        test=replace(split.test, x=sp.csr_matrix(split.test.x)),
    )
    one, two = compare(split, [], degs=4), compare(sparse, [], degs=4)
    assert {k: v.tolist() for k, v in one.degs.items()} == {k: v.tolist() for k, v in two.degs.items()}
    np.testing.assert_allclose(one.scores["value"], two.scores["value"], rtol=1e-3, atol=1e-5)
    assert (
        one.config["library_size"]
        == split.train.subset(
            np.isin(split.train.origin, evaluation._task(split, 0, 0).train.origin)
        ).schema.summary.depth
    )


def test_pairs_held_out_inside_an_environment_cannot_be_scored() -> None:
    adata, _ = screen(cells=20)
    adata.obs["donor"] = np.tile(["x", "y"], adata.n_obs // 2)
    cells = synthetic.dataset(adata)
    split = splits.by_combination(cells, covariate="donor", held_out=[("env_1", "x")])
    with pytest.raises(DataError, match=r"pairs of a perturbation and 'donor'.*'env_1' has cells on both sides: read"):
        compare(split, [])
    apart = EnvironmentDataset.from_anndata(adata, environment="perturbation", control="control", cell_line="donor")
    split = splits.by_combination(apart, covariate="cell_line", held_out=[("env_1", "x")])
    assert compare(split, [], degs=2).config["environments"] == ["env_1 x"]


def test_cells_held_out_of_trained_environments_are_scored_without_the_references() -> None:
    _, cells = screen(cells=30)
    comparison = compare(splits.by_row(cells, fraction=0.3), [], degs=3)
    assert comparison.config["environments"] == [f"env_{e}" for e in range(1, 6)]
    found = comparison.summary()["delta_pearson"]
    assert found["additive"] > 0.9 > 0.6 > found["training_mean"]  # each perturbation was seen


def test_single_effects_add_up_in_measured_pairs(data_folder: Path) -> None:
    cells = EnvironmentDataset.read(
        data_folder / "norman_k562" / "norman_k562_train_log1p.h5ad",
        environment="condition",
        control="control",
        counts=False,
        representation="multi-hot",
    )
    pairs = [str(name) for name in cells.environments.index if "+" in str(name)]
    comparison = compare(splits.by_environment(cells, held_out=pairs), [], degs=20)
    assert comparison.summary()["environments"]["additive"] == len(pairs) == 10
    added = scores_of(comparison, "additive", "delta_pearson")
    usual = scores_of(comparison, "training_mean", "delta_pearson")
    assert added["KLF1+MAP2K6"] > 0.9 > 0.6 > usual["KLF1+MAP2K6"]  # both singles are in training
    assert added["MAP2K3+MAP2K6"] > 0.5 > usual["MAP2K3+MAP2K6"]
    assert np.mean(list(added.values())) > np.mean(list(usual.values())) + 0.1


# ---------------------------------------------------------------------- the comparison
def test_a_comparison_of_two_models_with_two_seeds(fitted: tuple[AnnData, splits.Split, Comparison]) -> None:
    _, split, comparison = fitted
    table = comparison.scores
    assert table.columns.tolist() == ["model", "kind", "seed", "environment", "metric", "value"]
    assert table["model"].unique().tolist() == [*baselines.BASELINES, "environment_vae", "plain"]
    assert set(comparison.runs) == {"environment_vae", "plain"}
    assert comparison.runs["plain"].seeds == (0, 1)
    assert set(table[table["kind"] == "baseline"]["seed"]) == {-1}
    assert set(table[table["kind"] == "model"]["seed"]) == {0, 1}
    environments, deltas = len(split.held_out), 2 * 6 + 3
    sizes = table.groupby("model").size()
    assert set(sizes[list(baselines.BASELINES)]) == {environments * deltas}
    assert set(sizes[["environment_vae", "plain"]]) == {2 * environments * (deltas + 3)}
    assert not table[table["model"] == "environment_vae"]["value"].isna().any()
    plain = table[(table["model"] == "plain") & (table["metric"] == "rank")]["value"]
    assert set(plain) == {0.5}  # it predicts the same for all
    assert comparison.config["models"]["plain"] == {"recipe": "vae", "latent": 3, "hidden": ()}
    assert comparison.config["training"] == {"seeds": [0, 1], "epochs": 2}
    assert comparison.runs["plain"].settings.epochs == 2
    assert comparison.runs["plain"].schema.cells == comparison.config["cells"]["training"] == len(split.train) - 20


def test_a_model_s_scores_are_those_of_its_prediction(fitted: tuple[AnnData, splits.Split, Comparison]) -> None:
    _, split, comparison = fitted
    asked = evaluation._task(split, 5, 0)
    run = comparison.runs["environment_vae"]
    before = baselines.controls(asked.train, asked.environments)
    for k, seed in enumerate(run.seeds):
        change = predict_means(run, asked.train, asked.environments, cells=30)[k] - before
        table = comparison.scores
        own = table[(table["model"] == "environment_vae") & (table["seed"] == seed)]
        for environment, metric, value in asked.scores(change):
            row = own[(own["environment"] == environment) & (own["metric"] == metric)]["value"]
            assert row.tolist() == pytest.approx([value])
        name = asked.environments[1]
        cell = evaluation._cell_scores(*run.member(k), asked.held_out.of(name), len(asked.train), 1.0)
        row = own[(own["environment"] == name) & (own["metric"] == "nll")]["value"]
        assert row.tolist() == pytest.approx([cell["nll"]])


def test_validation_cells_choose_the_epoch() -> None:
    _, cells = screen(environments=9, cells=15)
    split = splits.by_environment(cells, fraction=0.3, validation_fraction=0.2)
    assert split.validation is not None
    comparison = compare(split, ["vae"], latent=2, degs=0, baselines=["no_change"], **FAST)
    assert "validation_loss" in comparison.runs["vae"].history
    assert comparison.config["cells"]["validation"] == len(split.validation)
    assert comparison.config["baselines"] == ["no_change"]


def test_a_comparison_can_be_repeated(fitted: tuple[AnnData, splits.Split, Comparison]) -> None:
    _, split, comparison = fitted
    again = compare(split, {"environment_vae": {}}, baselines=[], latent=3, degs=5, cells=30, **FAST)
    own = comparison.scores[comparison.scores["model"] == "environment_vae"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.scores, own)


def test_unknown_names_are_refused_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    split = few_cells(12, 12)
    monkeypatch.setattr(evaluation, "fit", lambda *a, **b: pytest.fail("trained"))
    with pytest.raises(ModelError, match=r"unknown baseline 'mean': use some of no_change, training_mean"):
        compare(split, [], baselines=["mean"])
    with pytest.raises(ModelError, match=r"unknown model 'vea'"):
        compare(split, ["vae", "vea"])
    with pytest.raises(ModelError, match=r"unknown model 'vea'"):
        compare(split, "vea")
    with pytest.raises(ModelError, match=r"model 'vae' has no option depth"):
        compare(split, {"vae": {}, "other": {"recipe": "vae", "depth": 2}})
    with pytest.raises(ModelError, match=r"'ridge' names a model and a baseline: rename the model"):
        compare(split, {"ridge": {"recipe": "vae"}})


def test_fitted_runs_are_scored_as_in_a_comparison(fitted: tuple[AnnData, splits.Split, Comparison]) -> None:
    _, split, comparison = fitted
    again = evaluation.evaluate(comparison.runs, split, degs=5, cells=30)
    pd.testing.assert_frame_equal(again.scores, comparison.scores)
    assert again.runs == comparison.runs
    assert again.config["training"]["plain"]["epochs"] == 2
    assert again.config["models"]["plain"] == {"name": "vae", "options": {"latent": 3, "hidden": ()}}
    assert again.config["cells"] == comparison.config["cells"]
    with pytest.raises(ModelError, match=r"unknown baseline 'mean'"):
        evaluation.evaluate({}, split, baselines=["mean"])
    fewer = replace(split, train=genes_of(split.train, 5), test=genes_of(split.test, 5))
    with pytest.raises(DataError, match=r"the run was fitted to 20 genes and the cells have 5, or others: give cells"):
        evaluation.evaluate(comparison.runs, fewer, degs=2)


def genes_of(cells: EnvironmentDataset, number: int) -> EnvironmentDataset:
    return replace(cells, x=cells.x[:, :number], var=cells.var.iloc[:number])


# ---------------------------------------------------------------------- summaries
def made(values: dict[tuple[str, str], Sequence[Sequence[float]]]) -> Comparison:
    """Scores of (model, metric): one row a seed, one column an environment; baselines go by their names."""
    rows = []
    for (model, metric), table in values.items():
        kind = "baseline" if model in baselines.BASELINES else "model"
        for s, row in enumerate(table):
            seed = -1 if kind == "baseline" else s
            rows += [(model, kind, seed, f"e{i}", metric, value) for i, value in enumerate(row)]
    return Comparison(pd.DataFrame(rows, columns=["model", "kind", "seed", "environment", "metric", "value"]))


NAN = float("nan")


def test_a_summary_is_the_median_over_seeds_of_the_mean_over_environments() -> None:
    comparison = made(
        {
            ("m", "delta_pearson"): [[0.1, 0.3], [0.5, 0.7], [0.9, 0.7]],
            ("m", "rmse"): [[1.0, NAN], [2.0, NAN], [6.0, NAN]],
            ("no_change", "delta_pearson"): [[NAN, NAN]],
            ("no_change", "rmse"): [[3.0, 4.0]],
        }
    )
    table = comparison.summary()
    assert table.index.tolist() == ["no_change", "m"]
    assert table.loc["m", ["kind", "seeds", "environments"]].tolist() == ["model", 3, 2]
    assert table.loc["no_change", ["kind", "seeds", "environments"]].tolist() == ["baseline", 0, 2]
    statistics = ["delta_pearson", "delta_pearson_sd", "delta_pearson_min", "delta_pearson_max", "delta_pearson_n"]
    spread = math.sqrt(((0.2 - 1.6 / 3) ** 2 + (0.6 - 1.6 / 3) ** 2 + (0.8 - 1.6 / 3) ** 2) / 2)
    assert table.loc["m", statistics].tolist() == pytest.approx([0.6, spread, 0.2, 0.8, 2])
    assert table.loc["m", ["rmse", "rmse_min", "rmse_max", "rmse_n"]].tolist() == [2, 1, 6, 1]
    assert table["delta_pearson"].isna().tolist() == [True, False]
    assert table.loc["no_change", "delta_pearson_n"] == 0
    assert table.loc["no_change", "rmse"] == 3.5
    assert math.isnan(table.loc["no_change", "rmse_sd"])
    assert comparison.summary(["rmse"]).columns[3:].tolist() == ["rmse", "rmse_sd", "rmse_min", "rmse_max", "rmse_n"]


def test_a_short_summary_is_for_reading() -> None:
    comparison = made(
        {
            ("m", "delta_r2"): [[0.1, 0.3], [0.5, 0.7]],
            ("m", "rmse"): [[1.0, 1.0], [2.0, 2.0]],
            ("no_change", "delta_r2"): [[NAN, NAN]],
            ("no_change", "rmse"): [[3.0, 4.0]],
        }
    )
    table = comparison.brief(["rmse", "delta_r2", "rank"])
    assert table.loc["m"].to_dict() == {
        "seeds": "2",
        "environments": "2",
        "rmse": "1.500 ± 0.707",
        "delta_r2": "0.400 ± 0.283",
    }
    assert table.loc["no_change", ["rmse", "delta_r2"]].tolist() == ["3.500", "–"]
    assert comparison.brief().columns.tolist() == ["seeds", "environments", "delta_r2"]


def verdicts(comparison: Comparison) -> dict[tuple[str, str], str]:
    table = comparison.verdict()
    return dict(zip(zip(table["model"], table["metric"], strict=True), table["verdict"], strict=True))


def test_a_verdict_is_a_paired_difference_from_the_best_baseline() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(size=12)  # environments differ by far more than models do
    noise = 0.02 * rng.normal(size=(6, 12))
    values = {
        ("ridge", "delta_r2"): [level],
        ("no_change", "delta_r2"): [level - 1],
        ("up", "delta_r2"): [level + 0.1 + noise[0], level + 0.2 + noise[1]],
        ("down", "delta_r2"): [level - 0.1 + noise[2]],
        ("same", "delta_r2"): [level + noise[3] - noise[3].mean()],
        ("ridge", "rmse"): [level + 2],
        ("no_change", "rmse"): [level],
        ("up", "rmse"): [level + 0.1 + noise[4]],
        ("down", "rmse"): [level - 0.1 + noise[5]],
    }
    comparison = made(values)
    assert verdicts(comparison) == {
        ("up", "delta_r2"): "better",
        ("down", "delta_r2"): "worse",
        ("same", "delta_r2"): "not different",
        ("up", "rmse"): "worse",  # a larger error
        ("down", "rmse"): "better",
        ("same", "rmse"): "not defined",
    }
    table = comparison.verdict().set_index(["model", "metric"])
    assert table["baseline"][("up", "delta_r2")] == "ridge"
    assert table["baseline"][("up", "rmse")] == "no_change"
    row = table.loc[("up", "delta_r2")]
    assert row["difference"] == pytest.approx(0.15 + noise[:2].mean())
    assert 0.1 < row["lower"] < row["difference"] < row["upper"] < 0.2
    assert row["environments"] == 12


def test_no_winner_where_predictions_are_equal_up_to_noise() -> None:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(100):
        level = rng.normal(size=10)
        seeds = [level + 0.3 * rng.normal(size=10) for _ in range(3)]
        comparison = made({("ridge", "delta_r2"): [level + 0.3 * rng.normal(size=10)], ("m", "delta_r2"): seeds})
        found.append(verdicts(comparison)["m", "delta_r2"])
    assert found.count("not different") >= 90  # 95 by design
    assert found.count("better") < 7
    assert found.count("worse") < 7
    same = made({("ridge", "delta_r2"): [level], ("m", "delta_r2"): [level, level]})
    assert verdicts(same)["m", "delta_r2"] == "not different"


@pytest.mark.parametrize("environments", [1, 2, 5])
def test_few_environments_give_no_verdict(environments: int) -> None:
    level = np.arange(float(environments))
    comparison = made({("ridge", "delta_r2"): [level], ("m", "delta_r2"): [level + 1]})
    assert verdicts(comparison) == {("m", "delta_r2"): "too few environments"}
    assert comparison.verdict()["difference"].tolist() == [1]


def test_a_verdict_needs_a_defined_baseline_and_pairs() -> None:
    values = {
        ("no_change", "delta_pearson"): [[NAN] * 8],
        ("ridge", "delta_pearson"): [[0.5] * 7 + [NAN]],
        ("m", "delta_pearson"): [[NAN] + [0.7] * 7],
        ("m", "nll"): [[1.0] * 8],
    }
    table = made(values).verdict()
    assert table["metric"].tolist() == ["delta_pearson"]  # baselines have no likelihood
    assert table["baseline"].tolist() == ["ridge"]
    assert table["environments"].tolist() == [6]
    assert table["verdict"].tolist() == ["better"]


# ---------------------------------------------------------------------- figure and files
def test_doses_of_one_perturbation_are_one_case() -> None:
    level = np.arange(12.0)
    comparison = made({("ridge", "delta_pearson"): [level / 20], ("m", "delta_pearson"): [level / 20 + 0.1]})
    assert comparison.gate()["verdict"].tolist() == ["better than every simple baseline"]
    doses = replace(comparison, config={"units": {f"e{i}": [f"drug {i // 3}"] for i in range(12)}})
    row = doses.gate().iloc[0]
    assert (row["environments"], row["units"], row["verdict"]) == (12, 4, "too few environments")


def test_units_and_leaks_are_told() -> None:
    cells = few_cells(12, 12)
    comparison = compare(cells, [], degs=0)
    assert set(comparison.config["units"]) == set(comparison.config["environments"])
    assert comparison.config["leaks"] == []
    seen = replace(cells, train=splits.by_row(few_cells(12, 12).train, 0.1).train)
    again = compare(seen, [], degs=0, protocol="perturbation")
    assert again.config["leaks"] == []
    leaky = replace(cells, validation=cells.test)
    told = compare(leaky, [], degs=0).config["notes"]
    assert any(note.startswith("leak (cell): ") and "among the validation cells" in note for note in told)


def test_the_figure_shows_seeds_and_baselines_first() -> None:
    comparison = made(
        {
            ("m", "delta_pearson"): [[0.4, 0.6], [0.8, 0.8]],
            ("m", "delta_r2"): [[0.2, 0.2], [-60.0, -80.0]],
            ("poor", "delta_pearson"): [[0.1, 0.1]],
            ("poor", "delta_r2"): [[-30.0, -32.0]],
            ("no_change", "delta_pearson"): [[NAN, NAN]],
            ("no_change", "delta_r2"): [[-0.1, -0.3]],
            ("ridge", "delta_pearson"): [[0.6, 0.6]],
            ("ridge", "delta_r2"): [[0.3, 0.3]],
        }
    )
    left, right = comparison.figure().axes
    labels = ["no_change", "ridge", "m", "poor"]
    assert [label.get_text() for label in left.get_yticklabels()] == labels
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first row is on top
    assert left.get_xlabel() == "delta_pearson, mean over 2 held-out environments"

    def points(axes: Any, row: int) -> list[float]:
        dots = [line for line in axes.lines if line.get_marker() == "o" and line.get_ydata()[0] == row]
        return [] if not dots else sorted(float(v) for v in dots[0].get_xdata())

    assert points(left, 2) == pytest.approx([0.5, 0.8])
    assert points(left, 0) == []
    assert [text.get_text() for text in left.texts] == ["not defined"]
    assert points(right, 0) == pytest.approx([-0.2])
    assert points(right, 2) == pytest.approx([-1, 0.2])  # off the scale
    assert [text.get_text() for text in right.texts] == ["-35", "-31"]
    assert right.get_xlim() == pytest.approx((-1.05, 1.02))
    dashed = [line for line in left.lines if line.get_linestyle() == "--"]
    assert [float(line.get_xdata()[0]) for line in dashed] == [0.6]  # the best baseline


def test_a_comparison_is_saved_whole(tmp_path: Path, fitted: tuple[AnnData, splits.Split, Comparison]) -> None:
    _, _, comparison = fitted
    folder = comparison.save(tmp_path / "new" / "folder")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "scores.csv", "summary.csv", "verdict.csv", "gate.csv", "differences.csv", "degs.json", "config.json",
        "figure.png",
    }  # fmt: skip
    gate = pd.read_csv(folder / "gate.csv", float_precision="round_trip", keep_default_na=False)
    assert gate["verdict"].tolist() == comparison.gate()["verdict"].tolist()
    read = pd.read_csv(folder / "scores.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(read, comparison.scores)
    summary = pd.read_csv(folder / "summary.csv", index_col="model", float_precision="round_trip")
    pd.testing.assert_frame_equal(summary, comparison.summary(), check_dtype=False)
    config = json.loads((folder / "config.json").read_text())
    assert config["environments"] == comparison.config["environments"]
    assert set(config["versions"]) == {"pyro-scm", "torch", "pyro-ppl", "numpy"}
    degs = json.loads((folder / "degs.json").read_text())
    assert {k: v.tolist() for k, v in comparison.degs.items()} == degs
    assert (folder / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    comparison = made({("m", "delta_pearson"): [[0.4, 0.6]], ("m", "delta_r2"): [[0.2, 0.2]]})
    (tmp_path / "figure.png").mkdir()
    with pytest.raises(CheckpointError, match=r"figure\.png: could not write \d+ bytes"):
        comparison.save(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------------- recovery
def known(adata: AnnData, cells: EnvironmentDataset, z: NDArray[Any] | None = None) -> Run:
    """The true model with a guide that knows z, or takes another z for the truth."""
    return run_of(synthetic.truth(adata), Exact(adata.X, adata.obsm["z"] if z is None else z), cells)


def test_the_truth_is_recovered_by_the_truth() -> None:
    adata, cells = screen(environments=9, cells=200, constant=True, strength=6.0, noise=0.5)
    row = recovery(known(adata, cells), cells, adata).iloc[0]
    assert row["seed"] == 7
    for name in ("mcc_z", "mcc_c", "linear_r2_z", "linear_r2_c", "target_precision", "target_recall", "target_f1"):
        assert row[name] == pytest.approx(1, abs=1e-5), name
    # shifts by 6 on one of three latents; the means of the other two are off by N(0, 2 / 200)
    assert 0.95 < row["concentration"] < 1


def test_order_sign_and_scale_are_free_and_a_rotation_is_not() -> None:
    adata, cells = screen(environments=9, cells=100, constant=True, strength=6.0, noise=0.5)
    z = np.asarray(adata.obsm["z"])
    same = recovery(known(adata, cells, z[:, [2, 0, 1]] * [-2.0, 3.0, 0.1]), cells, adata).iloc[0]
    assert same["mcc_z"] == pytest.approx(1, abs=1e-5)
    assert same["target_f1"] == pytest.approx(1)
    true = recovery(known(adata, cells), cells, adata).iloc[0]
    assert same["concentration"] == pytest.approx(true["concentration"], rel=1e-5)
    turned = recovery(known(adata, cells, z @ np.linalg.qr(np.arange(9.0).reshape(3, 3) + np.eye(3))[0]), cells, adata)
    assert turned["linear_r2_z"][0] == pytest.approx(1, abs=1e-4)
    assert turned["mcc_z"][0] < 0.95
    assert turned["target_f1"][0] < 0.9
    assert turned["concentration"][0] < true["concentration"] - 0.1


def test_the_shift_of_an_environment_belongs_to_its_noise() -> None:
    """A Translation VAE's z knows nothing of environments; with its shift it is the truth's."""
    adata, cells = screen(environments=9, cells=100, constant=True, strength=6.0, noise=0.5)
    truth = synthetic.truth(adata)
    shifts = torch.as_tensor(adata.uns["truth"]["shift"])

    class Table(nn.Module):
        def forward(self, batch: Batch) -> Tensor:
            return shifts[batch.env]

    model = LatentModel(StandardPrior(3), truth.likelihoods[0], scm=truth.scm, shift=Table()).eval()
    z = np.asarray(adata.obsm["z"]) - shifts.numpy()[cells.env]
    row = recovery(run_of(model, Exact(adata.X, z), cells), cells, adata).iloc[0]
    true = recovery(known(adata, cells), cells, adata).iloc[0]
    pd.testing.assert_series_equal(row, true, rtol=1e-4)


def test_targets_are_matched_by_the_names_of_environments() -> None:
    adata, cells = screen(environments=9, cells=100, constant=True, strength=6.0, noise=0.5)
    backwards = synthetic.dataset(adata[::-1].copy(), "descriptors")
    assert list(backwards.environments.index) != list(cells.environments.index)
    row = recovery(known(adata, backwards), backwards, adata).iloc[0]
    pd.testing.assert_series_equal(row, recovery(known(adata, cells), cells, adata).iloc[0], rtol=1e-4)


def test_recovery_of_a_part_of_the_cells_and_of_each_member(fitted: tuple[AnnData, splits.Split, Comparison]) -> None:
    adata, split, comparison = fitted
    table = recovery(comparison.runs["environment_vae"], split.train, adata)
    assert table["seed"].tolist() == [0, 1]
    assert len(table.columns) == 9
    assert table["mcc_z"].between(0, 1).all()
    rows = [adata.obs_names.get_loc(name) for name in split.train.cells]
    for k, found in enumerate(query.embed(comparison.runs["environment_vae"], split.train)["c"]):
        assert table["mcc_c"][k] == pytest.approx(metrics.mcc(np.asarray(adata.obsm["c"])[rows], found).score)


def test_recovery_needs_a_truth_and_cells_of_it() -> None:
    adata, cells = screen(environments=9)
    run = known(adata, cells)
    bare = AnnData(X=adata.X.copy(), obs=adata.obs.copy())
    with pytest.raises(DataError, match=r"no uns\['truth'\]: recovery is scored on a screen made by `simulate`"):
        recovery(run, cells, bare)
    with pytest.raises(DataError, match=r"'cell_40', .* are not cells of this screen"):
        recovery(run, cells, adata[:40].copy())
    with pytest.raises(DataError, match=r"recovery needs cells of the reference and of another environment"):
        recovery(run, cells.of("env_1", "env_2"), adata)
    with pytest.raises(DataError, match=r"recovery needs cells of the reference and of another environment"):
        recovery(run, cells.of("control"), adata)


def test_a_fitted_model_beats_chance_at_recovery() -> None:
    adata, cells = screen(environments=13, genes=30, cells=40, decoder="linear", constant=True, noise=0.3)
    model, guide = recipes.make("environment_vae", cells.schema, latent=3, hidden=(), scale=False)
    run = fit(model, guide, cells, epochs=15, lr=1e-2, progress=False)
    row = recovery(run, cells, adata).iloc[0]
    assert row["linear_r2_z"] > 0.8


def test_references_measured_apart_are_scored_against_and_all_others_trained_on() -> None:
    cells = synthetic.dataset(synthetic.simulate(latent=3, genes=8, environments=6, cells=20, seed=3), "oracle")
    split = splits.by_environment(cells, held_out=["env_1", "env_2"])
    control = np.flatnonzero(cells.env == 0)
    apart = cells.subset(control[:7])
    kept = replace(split, train=split.train.subset(~np.isin(split.train.origin, control[:7])))
    found = compare(kept, [], baselines=["training_mean"], references=apart, degs=0)
    assert found.config["cells"]["training"] == len(kept.train)
    depth = kept.train.schema.summary.depth
    mean = baselines.TrainingMean().fit(kept.train).predict(["env_1"])[0]
    change = mean - kept.train.x[kept.train.env == 0].mean(0)
    second = halves(cells.of("env_1"), 0)[1]
    true = np.asarray(second.normalised(depth)).mean(0) - apart.x.mean(0)
    rows = found.scores
    score = rows[(rows["environment"] == "env_1") & (rows["metric"] == "delta_pearson")]["value"].item()
    assert score == pytest.approx(np.corrcoef(true, change)[0, 1], abs=1e-5)
    with pytest.raises(DataError, match="references are among the training cells"):
        compare(split, [], baselines=["no_change"], references=apart)
    with pytest.raises(DataError, match="references has no reference cells"):
        compare(kept, [], baselines=["no_change"], references=cells.of("env_3"))


# ---------------------------------------------------------------------- distributions of cells
def test_the_true_model_s_cells_are_those_of_the_environment() -> None:
    adata, cells = screen(cells=600, interventions=("shift",), strength=6.0)
    own = cells.subset(cells.env == 0)
    run = run_of(synthetic.truth(adata), Exact(adata.X, adata.obsm["z"]), cells)
    for environment in ("env_2", "env_4"):
        found = predict_cells(run, own, environment, cells=600)[0]
        seen = np.asarray(cells.of(environment).x, np.float64)
        assert found.shape == seen.shape
        distance = metrics.energy_distance(seen, found, unbiased=True)
        assert abs(distance) < 0.05 * metrics.energy_distance(seen, np.asarray(own.x), unbiased=True)
        assert metrics.variance_r2(seen, found) > 0.8
    np.testing.assert_array_equal(
        predict_cells(run, own, "env_2", cells=50, seed=3), predict_cells(run, own, "env_2", cells=50, seed=3)
    )


def test_distributions_are_scored_on_demand(fitted: tuple[AnnData, splits.Split, Comparison]) -> None:
    _, split, comparison = fitted
    table = evaluation.evaluate(comparison.runs, split, degs=0, cells=20, distances=True).scores
    names = {"energy_distance", "mmd", "variance_r2"}
    assert names <= set(table["metric"])
    assert not names & set(comparison.scores["metric"])
    asked = evaluation._task(split, 0, 0)
    name = asked.environments[0]
    control = mean_predictions.reference_cells(asked.train, name, cells=20)
    true = np.asarray(asked.held_out.of(name).x, np.float64)
    own = table[(table["model"] == "no_change") & (table["environment"] == name)].set_index("metric")["value"]
    assert own["energy_distance"] == pytest.approx(metrics.energy_distance(true, control, unbiased=True))
    assert own["variance_r2"] == pytest.approx(metrics.variance_r2(true, control))
    drawn = predict_cells(comparison.runs["plain"], asked.train, name, cells=20)
    own = table[(table["model"] == "plain") & (table["environment"] == name) & (table["seed"] == 1)]
    value = own.set_index("metric")["value"]["mmd"]
    assert value == pytest.approx(metrics.mmd(true, drawn[1], [metrics.median_bandwidth(true)], unbiased=True))

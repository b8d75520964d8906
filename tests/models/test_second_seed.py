"""Every model of the second seed at the same face, on a small drug screen."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine

from guides import AmortisedGuide
from guides.encoders import Fresh, GaussianEncoder, PointEncoder, ProductEncoder, ReferenceEncoder
from pyro_scm import effects, query, recipes
from pyro_scm.attention import TargetedShift
from pyro_scm.composition import CompositionShift, DosedShift, MoleculeShift, ShiftedPrior, dosed
from pyro_scm.contracts import check
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError
from pyro_scm.infer import fit
from pyro_scm.likelihoods import Gaussian, GaussianPerCell, NegativeBinomialLikelihood, ProteinMixture
from pyro_scm.masks import LearntShare, MaskedEffects, MaskedPrior
from pyro_scm.model import LatentModel
from pyro_scm.posterior import to_arviz
from pyro_scm.priors import FlatPrior, NarrowPrior, StandardPrior
from pyro_scm.run import Run
from pyro_scm.shifts import EnvironmentShift
from tests.compositions import DIRECTIONS, GENES, cells
from tests.screens import SECOND_SEED

HELD_OUT = "A+B 10+10 uM"
EPOCHS = {False: 24, True: 4}
ADDITIVE = ("cpa", "multicpa", "sams_vae")


def data(name: str, counts: bool = False) -> EnvironmentDataset:
    """The screen with the representation that suits a model."""
    kinds: dict[str, Any] = {"chemcpa": "molecules", "svae_plus": "multi-hot"}
    return cells(kinds.get(name, "multi-dose" if name in ADDITIVE else "multi-hot"), counts)


def build(name: str, screen: EnvironmentDataset, **options: Any) -> tuple[LatentModel, AmortisedGuide]:
    torch.manual_seed(1)
    known = recipes.recipe(name).options
    own: dict[str, Any] = {"environment_hidden": (8,)} if "environment_hidden" in known else {}
    own |= {"covariates": ("cell_type",)} if "covariates" in known else {}
    own |= {"doser": "log-sigmoid"} if "doser" in known else {}
    return recipes.make(name, screen.schema, **{"latent": 4, "hidden": (16,), "guide_hidden": (16,), **own, **options})


@functools.cache
def fitted(name: str, counts: bool = False) -> Run:
    """Two members, trained without the combination."""
    screen = data(name, counts)
    training = screen.subset(screen.env != screen.environment_index(HELD_OUT)[0])
    model, guide = build(name, training)
    return fit(
        model, guide, training, objective=recipes.objective(name, model, training), seeds=(0, 1), epochs=EPOCHS[counts],
        batch_size=90, lr=0.02, progress=False, critic_steps=recipes.recipe(name).critic_steps,
    )  # fmt: skip


def covariates(name: str) -> dict[str, str] | None:
    return {"cell_type": "T"} if "covariates" in recipes.recipe(name).options else None


# ---------------------------------------------------------------------- one face
@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("name", SECOND_SEED)
def test_fit_predict_counterfactual_embed_and_back_from_disk(name: str, counts: bool, tmp_path: Path) -> None:
    run, screen = fitted(name, counts), data(name, counts)
    controls = screen.of("DMSO")
    losses = run.history.pivot(index="epoch", columns="member", values="loss")
    assert (losses.iloc[-1] < losses.iloc[0]).all()

    simulated = query.predict(run, HELD_OUT, covariates=covariates(name), cells=5)
    worlds = query.counterfactual(run, controls, environment=HELD_OUT, draws=2)
    codes = query.embed(run, controls)
    assert simulated.shape == (2, 5, GENES)
    assert worlds.x.shape == (2, 2, len(controls), GENES)
    assert codes["z"].shape == codes["c"].shape == (2, len(controls), 4)
    assert all(np.isfinite(v).all() for v in (simulated, worlds.x, codes["z"], codes["c"]))
    assert np.abs(worlds.effect).max() > 0.02

    run.save(tmp_path)
    loaded = recipes.load(tmp_path)
    np.testing.assert_array_equal(query.counterfactual(loaded, controls, environment=HELD_OUT, draws=2).x, worlds.x)
    again = query.predict(loaded, HELD_OUT, covariates=covariates(name), cells=5)
    np.testing.assert_array_equal(again, simulated)


@pytest.mark.parametrize("name", SECOND_SEED)
def test_inference_data(name: str) -> None:
    inferred = to_arviz(fitted(name), data(name).subset(range(5)), draws=3)
    assert inferred.posterior["c"].shape == (2, 3, 5, 4)
    assert next(iter(inferred.log_likelihood.data_vars.values())).shape == (2, 3, 5)
    assert np.isfinite(inferred.sample_stats["lp"]).all()


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("name", SECOND_SEED)
def test_the_contract(name: str, counts: bool) -> None:
    screen = data(name, counts)
    model, guide = build(name, screen)
    check(model, guide, screen[::15], recipes.objective(name, model, screen))


@pytest.mark.parametrize("name", [n for n in SECOND_SEED if n not in ("svae_plus", "scgen")])
def test_the_effect_of_a_drug_is_found_in_both_cell_types(name: str) -> None:
    """Controls put under drug A change as they truly do: in the first block of genes, upwards."""
    run, screen = fitted(name), data(name)
    effect = query.counterfactual(run, screen.of("DMSO"), environment="A 10 uM").effect.mean((0, 1, 2))
    truth = np.kron(DIRECTIONS["A"], [1.0, 0.8, -0.6, 0.5])
    assert np.corrcoef(effect, truth)[0, 1] > 0.9
    assert 0.3 < effect[:4] @ truth[:4] / (truth[:4] @ truth[:4]) < 1.4


# ---------------------------------------------------------------------- each is its composition
COMPOSITION: dict[str, tuple[type, type | None, type, type]] = {
    "cpa": (StandardPrior, DosedShift, Gaussian, GaussianEncoder),
    "chemcpa": (StandardPrior, MoleculeShift, GaussianPerCell, GaussianEncoder),
    "multicpa": (StandardPrior, DosedShift, Gaussian, GaussianEncoder),
    "scgen": (ShiftedPrior, None, Gaussian, GaussianEncoder),
    "sams_vae": (StandardPrior, MaskedEffects, Gaussian, GaussianEncoder),
    "svae_plus": (MaskedPrior, None, Gaussian, GaussianEncoder),
    "discrepancy_vae": (StandardPrior, TargetedShift, Gaussian, GaussianEncoder),
    "latent_additive": (StandardPrior, EnvironmentShift, Gaussian, ReferenceEncoder),
    "decoder_only": (NarrowPrior, EnvironmentShift, Gaussian, Fresh),
}


def test_cpa_takes_the_published_variance_of_each_cell() -> None:
    model, _ = build("cpa", data("cpa"), likelihood="normal-per-cell")
    assert isinstance(model.likelihoods[0], GaussianPerCell)


@pytest.mark.parametrize("name", SECOND_SEED)
def test_each_model_is_its_composition(name: str) -> None:
    prior, shift, likelihood, encoder = COMPOSITION[name]
    model, guide = build(name, data(name))
    assert type(model.prior) is prior
    own = model.shift.effects if isinstance(model.shift, CompositionShift) else model.shift
    assert type(own) is (shift or type(None))
    assert type(model.likelihoods[0]) is likelihood
    assert type(guide.local["z"]) is encoder
    counted, _ = build(name, data(name, counts=True))
    assert type(counted.likelihoods[0]) is NegativeBinomialLikelihood


def test_as_published_cpa_is_an_autoencoder_with_a_point_guide() -> None:
    screen = data("cpa")
    model, guide = build("cpa", screen, prior="flat", family="point", inputs=("x",))
    assert type(model.prior) is FlatPrior
    assert type(guide.local["z"]) is PointEncoder
    run = fit(model, guide, screen, epochs=2, progress=False)
    assert (run.history["kl"] == 0).all()
    with pytest.raises(ModelError, match="unknown prior 'wide': use 'flat' or 'standard'"):
        build("cpa", screen, prior="wide")


@pytest.mark.parametrize("doser", ["linear", "sigmoid", "log-sigmoid", "hill", "mlp"])
@pytest.mark.parametrize("name", ["cpa", "chemcpa"])
def test_every_doser_trains_in_an_ensemble(name: str, doser: str) -> None:
    screen = data(name)
    model, guide = build(name, screen, doser=doser)
    run = fit(model, guide, screen, seeds=(0, 1), epochs=2, progress=False)
    assert np.isfinite(run.history["loss"]).all()
    assert (query.counterfactual(run, screen.of("A 10 uM"), environment="DMSO").effect != 0).any()


# ---------------------------------------------------------------------- conditions outside the table, covariates
def test_conditions_that_nobody_measured_are_asked_for_by_their_doses() -> None:
    run, screen = fitted("cpa"), data("cpa")
    controls = screen.of("DMSO")
    table = query.counterfactual(run, controls, environment="A 10 uM").x
    same = query.counterfactual(run, controls, environment=dosed(run.schema, {"A": 10.0})).x
    np.testing.assert_allclose(same, table, rtol=1e-5, atol=1e-5)
    doses = [0.0, 0.3, 3.0, 30.0]
    curve = [query.counterfactual(run, controls, environment=dosed(run.schema, {"A": d})).effect.mean((0, 1, 2))[0]
             for d in doses]  # fmt: skip
    assert abs(curve[0]) < 1e-4
    assert (np.diff(curve) > 0).all()
    three = dosed(run.schema, {"A": 1.0, "B": 1.0, "C": 1.0})
    assert query.predict(run, three, covariates={"cell_type": "B"}, cells=3).shape == (2, 3, GENES)


def test_a_drug_that_is_in_no_table_is_predicted_from_its_molecule() -> None:
    run, screen = fitted("chemcpa"), data("chemcpa")
    table = screen.environments.loc[["DMSO", "A+B 10+10 uM"]].copy()
    table.loc["A+B 10+10 uM", "smiles"] = "CCCO..CCCCN"
    from pyro_scm.data.representations import represent

    r, names = represent(table, "molecules", bits=64)
    assert tuple(names) == run.schema.features
    found = query.predict(run, r[1], covariates={"cell_type": "T"}, cells=4, mean=True)
    assert np.isfinite(found).all()
    known = query.predict(run, HELD_OUT, covariates={"cell_type": "T"}, cells=4, mean=True)
    assert np.abs(found - known).max() > 1e-3


def test_a_cell_may_be_given_another_covariate() -> None:
    run, screen = fitted("cpa"), data("cpa")
    b = screen.subset((screen.env == 0) & (screen.covariates["cell_type"] == 0))
    assert screen.categories["cell_type"] == ("B", "T")
    worlds = query.counterfactual(run, b, covariates={"cell_type": "T"})
    effect = worlds.effect.mean((0, 1, 2))
    assert effect[8] > 0.7  # T cells are 2 further along the third latent
    assert np.abs(effect[:8]).max() < 0.7
    same = query.counterfactual(run, b, covariates={"cell_type": "B"})
    np.testing.assert_array_equal(same.x, same.factual_x)
    both = query.counterfactual(run, b, covariates={"cell_type": "T"}, environment="A 10 uM").effect.mean((0, 1, 2))
    assert both[0] > 1
    assert both[8] > 0.7


def test_covariates_must_exist_and_must_be_said_where_they_matter() -> None:
    run, screen = fitted("cpa"), data("cpa")
    with pytest.raises(DataError, match=r"this model has effects of 'cell_type': say which cells to simulate"):
        query.predict(run, "DMSO")
    with pytest.raises(DataError, match="no covariate 'donor': the cells have 'cell_type'"):
        query.predict(run, "DMSO", covariates={"donor": "1"})
    with pytest.raises(DataError, match="covariate 'cell_type' has no 'NK': it has 'B', 'T'"):
        query.counterfactual(run, screen, covariates={"cell_type": "NK"})


# ---------------------------------------------------------------------- what is particular
def test_scgen_adds_the_difference_of_mean_codes() -> None:
    screen = data("scgen")
    model, guide = build("scgen", screen, covariates=())
    run = fit(
        model, guide, screen, epochs=60, batch_size=100, lr=0.02, schedule="cosine", kl_weight=0.01, progress=False
    )
    codes = {e: query.embed(run, screen.of(e))["z"][0].mean(0) for e in ("DMSO", "C 10 uM")}
    controls = screen.of("DMSO")
    moved = query.counterfactual(run, controls, environment="C 10 uM")
    delta = (moved.c - moved.factual_c)[0, 0]
    np.testing.assert_allclose(delta, np.broadcast_to(delta[0], delta.shape), atol=1e-4)  # the same for every cell
    assert np.linalg.norm(delta[0] - (codes["C 10 uM"] - codes["DMSO"])) < 0.15 * np.linalg.norm(delta[0])


def test_a_decoder_only_model_says_the_same_of_all_cells_of_a_condition() -> None:
    run, screen = fitted("decoder_only"), data("decoder_only")
    t = screen.subset((screen.env == 0) & (screen.covariates["cell_type"] == 1))
    x = query.counterfactual(run, t, environment="A 10 uM").x[0, 0]
    np.testing.assert_allclose(x, np.broadcast_to(x[0], x.shape), rtol=1e-5, atol=1e-5)
    assert list(dict(build("decoder_only", screen)[1].named_parameters())) == []


def test_a_latent_additive_model_infers_the_state_of_controls_alone() -> None:
    screen = data("latent_additive")
    _, guide = build("latent_additive", screen)
    law = guide.local["z"](screen.batch()).base_dist
    control = torch.as_tensor(screen.env == 0)
    assert (law.loc[~control] == 0).all()
    assert (law.scale[~control] == 1).all()
    assert (law.loc[control] != 0).all()


def test_in_sams_vae_masks_and_effects_are_perturbations_not_cells() -> None:
    screen = data("sams_vae")
    model, _ = build("sams_vae", screen)
    trace = poutine.trace(model).get_trace(screen.batch().unobserved())
    assert trace.nodes["effect_noise"]["fn"].event_shape == (2, 3, 4)
    assert trace.nodes["effect_noise"]["fn"].batch_shape == ()
    assert trace.nodes["effect_noise"]["scale"] == 1
    run = fitted("sams_vae")
    moved = effects.mask(run).loc[0]
    one, other, both = (moved.loc[name].to_numpy() for name in ("A 10 uM", "B 10 uM", HELD_OUT))
    assert ((one > 0) & (one < 1)).all()
    np.testing.assert_allclose(both, 1 - (1 - one) * (1 - other), rtol=1e-5)  # either of them moves it
    assert (moved.loc["DMSO"] == 0).all()


@pytest.mark.parametrize("name", ["sams_vae", "svae_plus"])
def test_a_sweep_sees_the_most_likely_masks_not_some_that_are_drawn(name: str) -> None:
    run, some = fitted(name), data(name).of("A 10 uM").subset(range(4))
    one, other = (query.sweep(run, some, [0.0, 1.0]) for _ in range(2))
    np.testing.assert_array_equal(one["c"], other["c"])
    worlds = query.counterfactual(run, some, do={"c_1": 1.0})
    np.testing.assert_allclose(one["c"][:, 1, 1], worlds.c[:, 0], rtol=1e-5, atol=1e-5)


def test_the_shares_of_svae_plus_are_learnt() -> None:
    trained: Any = fitted("svae_plus").model
    assert type(trained.prior.mask) is LearntShare
    fresh = LearntShare(4)
    assert (trained.prior.mask.raw != fresh.raw).all()


# ---------------------------------------------------------------------- two modalities
def protein_error(run: Run, screen: EnvironmentDataset, given: EnvironmentDataset) -> float:
    """R2 over proteins and conditions of the mean predicted counts of cells."""
    predicted = query.counterfactual(run, given, site="y").factual_x[0, 0]
    assert screen.y is not None
    truth = np.array([screen.y[screen.env == e].mean(0) for e in screen.present])
    found = np.array([predicted[screen.env == e].mean(0) for e in screen.present])
    return float(1 - ((truth - found) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum())


@pytest.mark.parametrize("family", ["normal", "product"])
def test_proteins_are_predicted_with_either_fusion_and_where_they_are_missing(family: str) -> None:
    """A product of experts is no worse than both side by side: the published gap was of the code."""
    screen = cells(counts=True)
    assert screen.y is not None
    missing = screen.y.copy()
    missing[::3] = np.nan
    partly, without = replace(screen, y=missing), replace(screen, y=np.full_like(missing, np.nan))
    model, guide = build("multicpa", screen, family=family)
    run = fit(model, guide, partly, epochs=40, batch_size=105, lr=0.02, progress=False)
    assert type(guide.local["z"]) is (ProductEncoder if family == "product" else GaussianEncoder)
    assert protein_error(run, screen, screen) > 0.9
    assert protein_error(run, screen, without) > 0.8
    worlds = query.counterfactual(run, screen.of("DMSO"), environment="A 10 uM", site="y")
    assert worlds.genes == ("CD3", "CD4", "CD8", "CD19")
    assert worlds.effect.mean((0, 1, 2))[0] > 1  # the first protein follows the first latent
    assert query.predict(run, "DMSO", site="y", cells=3, covariates={"cell_type": "T"}).shape == (1, 3, 4)


def test_what_a_model_does_not_observe_cannot_be_asked_for() -> None:
    with pytest.raises(DataError, match="no observed site 'y': this model has x"):
        query.predict(fitted("cpa"), "DMSO", site="y", covariates={"cell_type": "T"})
    with pytest.raises(DataError, match="no observed site 'y': this model has x"):
        query.counterfactual(fitted("cpa"), data("cpa"), site="y")
    bare = replace(data("multicpa"), y=None, proteins=())
    with pytest.raises(ModelError, match=r"the cells have no proteins: name the obsm entry that holds them"):
        build("multicpa", bare)


def test_proteins_count_as_much_as_they_are_weighed() -> None:
    screen = data("multicpa")
    model, guide = build("multicpa", screen)
    batch = screen[::10]
    found = []
    for weight in (0.0, 1.0, 2.0):
        torch.manual_seed(0)
        objective = recipes.objective("multicpa", model, screen, protein_weight=weight)
        world = objective.world(model.forward, guide.forward, batch)
        found.append(float(objective.terms(world).reconstruction.detach()))
    assert found[2] - found[1] == pytest.approx(found[1] - found[0], rel=1e-4)
    assert found[1] > found[0]
    assert any(isinstance(likelihood, ProteinMixture) for likelihood in model.likelihoods)

"""Every verb on a small screen, against the same question asked in Python."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scm as ps
from pyro_scm import evaluation, recipes
from pyro_scm.cli.inputs import Memory
from pyro_scm.data import splits, synthetic
from pyro_scm.errors import DataError
from tests.cli.conftest import FIT, SMALL

Works = Callable[..., str]


@pytest.fixture(scope="module")
def cells(screen: Path) -> ps.EnvironmentDataset:
    return synthetic.dataset(anndata.read_h5ad(screen), "descriptors")


@pytest.fixture(scope="module")
def split(cells: ps.EnvironmentDataset) -> splits.Split:
    return splits.by_environment(cells, held_out=["env_4", "env_5"])


# ---------------------------------------------------------------------- models
def test_models_lists_every_recipe_with_its_program(works: Works) -> None:
    lines = works("models").splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(recipes.RECIPES)
    for line, (name, recipe) in zip(lines, recipes.RECIPES.items(), strict=True):
        assert recipe.summary in line, name
        assert recipe.section in line
        assert ", ".join(recipe.inputs) in line


def test_models_explains_one_with_the_defaults_of_all_its_options(works: Works) -> None:
    text = works("models", "structured_environment_vae")
    assert "Identified: the noise z as in the Environment VAE." in text
    shown = {words[0]: words[1] for words in map(str.split, text.splitlines()) if len(words) == 2}
    assert shown["hidden"] == "128"
    assert shown["depth"] == "4"
    assert shown["mechanism"] == "linear"
    assert shown["scale"] == "true"
    assert shown["guide_hidden"] == "128"
    assert shown["schedule"] == "constant"
    assert shown["patience"] == "none"
    assert "epochs" not in shown  # has a flag of its own
    for title in ("Options of the model", "Options of the guide", "Options of the training"):
        assert f"\n{title} (pyro-scm fit ... --" in text
    assert "The guide reads x, e and is of the family 'normal'." in text


# ---------------------------------------------------------------------- simulate
def test_simulate_writes_what_the_library_simulates(screen: Path) -> None:
    made = anndata.read_h5ad(screen)
    expected = ps.simulate(latent=3, genes=12, environments=6, cells=24, graph="growing", descriptors=4)
    assert np.array_equal(made.X, expected.X)
    assert np.array_equal(made.obsm["c"], expected.obsm["c"])
    assert made.uns["truth"]["screen"] == expected.uns["truth"]["screen"]
    pd.testing.assert_frame_equal(made.uns["descriptors"], expected.uns["descriptors"])


def test_simulate_passes_every_option_on(works: Works, tmp_path: Path) -> None:
    words = "--latent 3 --genes 5 --environments 4 --cells 6 --graph 0-1,0-2 --mechanism network --decoder linear"
    words += " --attachment 1 --interventions hard,scale --targets 2 --strength 2 --observation counts --noise 0.2"
    words += " --depth 300 --descriptors 2 --seed 5"
    printed = works("simulate", *words.split(), "--out", tmp_path / "new" / "s.h5ad")
    made = anndata.read_h5ad(tmp_path / "new" / "s.h5ad")
    screen = json.loads(made.uns["truth"]["screen"])
    given = {"graph": [[0, 1], [0, 2]], "mechanism": "network", "decoder": "linear", "attachment": 1.0, "seed": 5}
    given |= {"interventions": ["hard", "scale"], "targets": 2, "strength": 2.0, "noise": 0.2, "depth": 300.0}
    given |= {"observation": "negative-binomial", "descriptors": 2, "latent": 3, "genes": 5}
    assert {name: screen[name] for name in given} == given
    assert np.array_equal(made.X, np.round(made.X))
    assert "24 cells x 5 genes in 4 environments, counts expression" in printed
    assert "0 -> 1, 0 -> 2" in printed
    target = made.obs.loc[made.obs["perturbation"] == "env_1", "targets"].iloc[0]
    assert f"env_1 on {target}" in printed
    assert "--representation uns:descriptors" in printed


def test_quiet_simulation_prints_nothing(works: Works, tmp_path: Path) -> None:
    small = ("--cells", "2", "--genes", "3", "--environments", "2", "--latent", "1")
    assert works("--quiet", "simulate", *small, "--out", tmp_path / "s.h5ad") == ""
    assert works("simulate", *small, "--quiet", "--out", tmp_path / "s.h5ad") == ""


# ---------------------------------------------------------------------- fit
def test_fit_is_the_librarys_fit(run: Path, split: splits.Split) -> None:
    found = ps.load(run)
    model, guide = recipes.make("environment_vae", split.train.schema, latent=3)
    expected = ps.fit(model, guide, split.train, seeds=(0, 1), epochs=2, batch_size=64, device="cpu", progress=False)
    assert (found.seeds, found.best) == ((0, 1), 1)
    assert found.parameters.keys() == expected.parameters.keys()
    for name, value in expected.parameters.items():
        assert torch.equal(found.parameters[name], value), name
    assert found.losses == pytest.approx(expected.losses)
    trained = found.environments.table["trained"]
    assert list(trained.index[~trained]) == ["env_4", "env_5"]
    assert len(pd.read_csv(run / "history.csv")) == 4


def test_fit_remembers_how_it_was_asked(run: Path) -> None:
    memory = Memory.load(run)
    assert memory.data.environment == "perturbation"
    assert memory.data.control == ("control",)
    assert memory.data.representation == ("uns:descriptors",)
    assert memory.data.counts is False  # found out by looking
    assert memory.hold_out == ("env_4,env_5",)
    assert memory.model == "environment_vae"
    assert memory.options == {"latent": 3}
    assert memory.training == {"seeds": (0, 1), "epochs": 2, "batch_size": 64, "lr": 0.001}


def test_expression_of_a_large_file_stays_on_disk(
    works: Works, run: Path, screen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_scm.cli.inputs._LARGE", 0)
    monkeypatch.setattr("pyro_scm.data.dataset.read_h5ad", lambda path: pytest.fail("the file was read whole"))
    words = ["fit", screen, "--model", "environment_vae", *FIT, *SMALL, "--hold-out", "env_4,env_5", "--quiet"]
    works(*words, "--out", tmp_path / "run")
    there, here = ps.load(tmp_path / "run"), ps.load(run)
    for name, value in here.parameters.items():
        torch.testing.assert_close(there.parameters[name], value)
    works("embed", tmp_path / "run", screen, "--out", tmp_path / "e.h5ad")


def test_fit_prints_each_members_losses(works: Works, screen: Path, split: splits.Split, tmp_path: Path) -> None:
    held = ("--hold-out", "env_4", "--hold-out", "env_5")
    text = works("fit", screen, "--model", "environment_vae", *FIT, *SMALL, *held, "--out", tmp_path / "run")
    assert "training cells: 96 x 12 genes (continuous expression), 4 environments, each described by 4 numbers" in text
    assert "held-out cells: 48 of 2 environments" in text
    rows = [line.split() for line in text.splitlines()]
    start = rows.index(["seed", "epoch", "training", "held-out", "best"])
    members = [row[:4] for row in rows[start + 1 : start + 3]]
    model, guide = recipes.make("environment_vae", split.train.schema, latent=3)
    same = ps.fit(
        model, guide, split.train, validation=split.test, seeds=(0, 1), epochs=2, batch_size=64, progress=False
    )
    last = same.history[same.history["epoch"] == 2]
    for row, (_, expected) in zip(members, last.iterrows(), strict=True):
        assert int(row[0]) == expected["seed"]
        assert float(row[2]) == pytest.approx(expected["loss"], rel=1e-3)
        assert float(row[3]) == pytest.approx(expected["validation_loss"], rel=0.05)  # other draws of the noise
    assert [row[4:] for row in rows[start + 1 : start + 3]] == [[], ["*"]]  # by the training loss


@pytest.mark.parametrize(("flags", "progress"), [((), None), (("--quiet",), False)])
def test_progress_is_shown_unless_quiet(
    fails: Works,
    screen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    progress: object,
) -> None:
    """None shows it on terminals only."""
    asked: dict[str, object] = {}

    def instead(*_: object, **options: object) -> None:
        asked.update(options)
        raise DataError("enough")

    monkeypatch.setattr(ps, "fit", instead)
    fails("fit", screen, "--model", "vae", *FIT, *SMALL, *flags, "--checkpoint-every", "7", "--out", tmp_path / "run")
    assert (asked["progress"], asked["checkpoint_every"], asked["checkpoint"]) == (progress, 7, tmp_path / "run")


def test_options_reach_model_guide_and_training(works: Works, screen: Path, tmp_path: Path) -> None:
    words = ["--option", "sparsity=top-k", "--option", "k=2", "--option", "inputs=x", "--option", "conditioning=film"]
    words += ["--hidden", "8,4", "--likelihood", "student-t", "--training", "schedule=cosine", "--training", "clip=5"]
    words += ["--training", "temperature=1,0.1", "--validation-fraction", "0.25", "--training", "patience=3"]
    text = works("fit", screen, "--model", "environment_vae", *FIT, *SMALL, *words, "--lr", "0.01", "--out", tmp_path)
    assert "validation cells: 24 of 1 environments" in text
    assert "validation best" in text
    fitted = ps.load(tmp_path)
    options = {"latent": 3, "hidden": [8, 4], "likelihood": "student-t", "sparsity": "top-k", "k": 2}
    assert json.loads((tmp_path / "manifest.json").read_text())["model"]["options"] == options
    assert fitted.guide.spec == {"inputs": ["x"], "hidden": [8, 4], "conditioning": "film", "family": "normal"}
    settings = fitted.settings
    assert (settings.schedule, settings.clip, settings.temperature) == ("cosine", 5, (1.0, 0.1))
    assert (settings.patience, settings.lr) == (3, 0.01)


def test_resumed_training_is_that_of_one_go(works: Works, screen: Path, tmp_path: Path) -> None:
    words = ["fit", screen, "--model", "vae", *FIT, "--latent", "2", "--seeds", "1", "--training", "kl_warmup=0"]
    works(*words, "--epochs", "4", "--out", tmp_path / "whole")
    works(*words, "--epochs", "2", "--out", tmp_path / "halves")
    works("fit", screen, "--resume", "--epochs", "4", "--out", tmp_path / "halves")
    whole, halves = ps.load(tmp_path / "whole"), ps.load(tmp_path / "halves")
    assert halves.settings.epochs == 4
    for name, value in whole.parameters.items():
        assert torch.equal(value, halves.parameters[name]), name
    assert Memory.load(tmp_path / "halves").training["epochs"] == 4


def test_note_where_training_cannot_tell_of_held_out_environments(works: Works, screen: Path, tmp_path: Path) -> None:
    words = ["fit", screen, "--model", "vae", "--environment", "perturbation", *SMALL, "--hold-out", "env_3"]
    text = works(*words, "--out", tmp_path)
    assert "note: training tells nothing of 'env_3'" in text
    assert "note: there are no control cells" in text


def test_genes_are_chosen_on_training_cells(works: Works, screen: Path, run: Path, tmp_path: Path) -> None:
    from pyro_scm.data.single_cell import highly_variable

    counts = tmp_path / "counts.h5ad"
    words = ["--latent", "2", "--genes", "20", "--environments", "4", "--cells", "20", "--observation", "counts"]
    works("simulate", *words, "--out", counts)
    fit = ("--environment", "perturbation", "--control", "control", *SMALL, "--hold-out", "env_3", "--genes", "6")
    works("fit", counts, "--model", "vae", *fit, "--out", tmp_path / "run")
    chosen = ps.load(tmp_path / "run").schema.genes
    whole = synthetic.dataset(anndata.read_h5ad(counts))
    assert chosen == highly_variable(whole.subset(whole.environments.index[whole.env] != "env_3"), 6).genes
    works("embed", tmp_path / "run", counts, "--out", tmp_path / "e.h5ad")  # finds these genes among all 20


# ---------------------------------------------------------------------- evaluate
def test_evaluate_scores_baselines_and_members(works: Works, run: Path, screen: Path, tmp_path: Path) -> None:
    text = works("evaluate", run, screen, "--degs", "3", "--out", tmp_path / "scores.csv")
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert set(scores["environment"]) == {"env_4", "env_5"}
    assert set(scores.loc[scores["model"] == "environment_vae", "seed"]) == {0, 1}
    own = scores[scores["model"].isin(["ridge", "environment_vae"])]
    for model, rows in own[own["metric"] == "delta_r2"].groupby("model"):
        line = next(line for line in text.splitlines() if line.startswith(str(model)))
        assert f"{rows.groupby('seed')['value'].mean().median():.3f}" in line
    assert "environment_vae: too few environments (delta_pearson, against" in text
    pairs = text[text.index("delta_pearson, model - baseline") :].splitlines()[2:7]
    assert [line.split()[0] for line in pairs] == ["no_change", "training_mean", "additive", "ridge", "nearest"]
    assert "leak (reference): 'environment_vae' was fitted to" in text
    assert "no leaks found: perturbations are unseen" not in text
    assert text.endswith(f"scores saved in {tmp_path / 'scores.csv'}\n")


def test_evaluate_finds_what_compare_found(works: Works, screen: Path, tmp_path: Path) -> None:
    """A model that `compare` fitted, saved and scored has the same scores when it is loaded and evaluated."""
    words = ["compare", screen, "--models", "translation_vae", *FIT, *SMALL, "--degs", "3"]
    text = works(*words, "--hold-out", "env_2,env_5", "--out", tmp_path)
    assert "2 environments: env_2, env_5" in text
    assert "no leaks found: perturbations are unseen" in text
    names = {"no_change", "training_mean", "additive", "ridge", "nearest"}
    assert names <= {line.split()[0] for line in text.splitlines() if line}  # always, without being asked for
    again = works("evaluate", tmp_path / "translation_vae", screen, "--degs", "3", "--out", tmp_path / "again.csv")
    assert "leak" not in again.replace("no leaks found", "")  # it has not seen the controls that are scored against
    before, after = pd.read_csv(tmp_path / "scores.csv"), pd.read_csv(tmp_path / "again.csv")
    after = after[after["model"].isin(before["model"])].reset_index(drop=True)
    order = ["kind", "model", "seed", "environment", "metric"]
    before, after = (t[[*order, "value"]].sort_values(order, ignore_index=True) for t in (before, after))
    pd.testing.assert_frame_equal(before, after)


def test_evaluate_notes_environments_of_the_training(works: Works, run: Path, screen: Path) -> None:
    text = works("evaluate", run, screen, "--hold-out", "env_1", "--degs", "0", "--distances")
    assert "energy_distance" in text
    assert "note: the run was fitted to cells of 'env_1'" in text


def test_models_are_scored_recentred_where_asked(works: Works, run: Path, screen: Path, tmp_path: Path) -> None:
    for on in ("training_mean", "additive", "cell_line,time"):
        out = tmp_path / "scores.csv"
        works("evaluate", run, screen, "--degs", "0", "--recentre", on, "--out", out)
        table = pd.read_csv(out)
        assert {"environment_vae", "environment_vae, recentred"} <= set(table["model"]), on


def test_what_leaks_is_noted(works: Works, run: Path, screen: Path, tmp_path: Path) -> None:
    text = works("evaluate", run, screen, "--degs", "0", "--protocol", "environment", "--plate", "perturbation")
    assert "leak (plate)" not in text
    some = anndata.read_h5ad(screen)
    some.obs["plate"] = "P1"
    some.write_h5ad(tmp_path / "plates.h5ad")
    text = works("evaluate", run, tmp_path / "plates.h5ad", "--degs", "0", "--plate", "plate")
    assert "note: leak (plate): 'P1': " in text
    assert "hold out whole plates" in text


def test_few_cells_are_noted(works: Works, drug_run: Path, drug_screen: Path, tmp_path: Path) -> None:
    some = anndata.read_h5ad(drug_screen)
    alone = (some.obs["drug"] == "vorinostat") & (some.obs["uM"] == 1) & (some.obs["line"] == "MCF7")
    keep = ~alone | (np.cumsum(alone) <= 1)
    some[keep.to_numpy()].copy().write_h5ad(tmp_path / "some.h5ad")
    text = works("evaluate", drug_run, tmp_path / "some.h5ad", "--degs", "0")
    assert "note: not scored, for they have a single cell: 'vorinostat 1 uM MCF7'" in text


def test_one_environment_has_no_interval(works: Works, run: Path, screen: Path) -> None:
    lines = works("evaluate", run, screen, "--hold-out", "env_4", "--degs", "0").splitlines()
    told = [line for line in lines if line.startswith("environment_vae: ")]
    assert len(told) == 1
    assert "[" not in told[0]
    assert told[0].startswith("environment_vae: too few environments")
    assert told[0].endswith("over 1 environment)")


# ---------------------------------------------------------------------- compare
def test_compare_is_the_librarys_comparison(works: Works, screen: Path, split: splits.Split, tmp_path: Path) -> None:
    models = ("--models", "vae,environment_vae,baselines", "--hidden", "8", "--option", "sparsity=dense")
    works("compare", screen, *models, *FIT, *SMALL, "--degs", "3", "--hold-out", "env_4,env_5", "--out", tmp_path)
    shared = {"latent": 3, "hidden": (8,), "guide_hidden": (8,)}
    expected = evaluation.compare(
        split,
        {"vae": shared, "environment_vae": {**shared, "sparsity": "dense"}},
        seeds=(0, 1),
        epochs=2,
        batch_size=64,
        degs=3,
        progress=False,
    )
    found = pd.read_csv(tmp_path / "scores.csv")
    pd.testing.assert_frame_equal(found, expected.scores, check_dtype=False)
    for file in (
        "summary.csv",
        "gate.csv",
        "verdict.csv",
        "config.json",
        "figure.png",
        "vae/data.json",
        "vae/history.csv",
    ):
        assert (tmp_path / file).stat().st_size > 0, file
    assert Memory.load(tmp_path / "environment_vae").options == {**shared, "sparsity": "dense"}


def test_compare_draws_what_it_holds_out(
    works: Works, screen: Path, cells: ps.EnvironmentDataset, tmp_path: Path
) -> None:
    words = ["compare", screen, "--models", "baselines", *FIT, "--hold-out-fraction", "0.4", "--split-seed", "3"]
    text = works(*words, "--degs", "0", "--out", tmp_path)
    drawn = splits.by_environment(cells, fraction=0.4, seed=3).held_out
    assert f"2 environments: {', '.join(drawn)}" in text
    assert set(pd.read_csv(tmp_path / "scores.csv")["environment"]) == set(drawn)


# ---------------------------------------------------------------------- embed
def test_embed_writes_the_best_members_latents(
    works: Works, run: Path, screen: Path, cells: ps.EnvironmentDataset, tmp_path: Path
) -> None:
    text = works("embed", run, screen, "--all-members", "--out", tmp_path / "e.h5ad")
    found, before, fitted = anndata.read_h5ad(tmp_path / "e.h5ad"), anndata.read_h5ad(screen), ps.load(run)
    expected = ps.embed(fitted, cells)
    for name in ("z", "c"):
        assert np.allclose(found.obsm[name], expected[name][fitted.best], atol=1e-6)
        assert np.allclose(found.obsm[f"{name}_all"], expected[name].swapaxes(0, 1), atol=1e-6)
        assert np.array_equal(found.obsm[f"{name}_before"], before.obsm[name])  # the truth is kept
    assert np.array_equal(found.X, before.X)
    assert "of the best of 2 members (seed 1)" in text


def test_embed_writes_one_member_by_default(works: Works, run: Path, screen: Path, tmp_path: Path) -> None:
    works("embed", run, screen, "--out", tmp_path / "e.h5ad")
    assert set(anndata.read_h5ad(tmp_path / "e.h5ad").obsm) == {"z", "c", "z_before", "c_before"}


# ---------------------------------------------------------------------- predict
@pytest.mark.parametrize("mean", [False, True])
def test_predict_is_the_librarys_prediction(works: Works, run: Path, tmp_path: Path, mean: bool) -> None:
    words = ["predict", run, "--environment", "env_4", "--cells", "7", "--seed", "3", "--out", tmp_path / "p.h5ad"]
    text = works(*words, *(["--mean"] if mean else []))
    fitted, found = ps.load(run), anndata.read_h5ad(tmp_path / "p.h5ad")
    expected = ps.predict(fitted, "env_4", cells=7, seed=3, mean=mean)
    assert np.array_equal(found.X, expected.reshape(14, 12))
    assert found.obs["member"].tolist() == [0] * 7 + [1] * 7
    assert found.obs["seed"].tolist() == [0] * 7 + [1] * 7
    assert found.obs.loc[found.obs["best"], "member"].unique().tolist() == [fitted.best]
    assert set(found.obs["environment"]) == {"env_4"}
    assert tuple(found.var_names) == fitted.schema.genes
    assert "the run has not seen it" in text


def test_predict_says_when_an_environment_was_trained_on(works: Works, run: Path, tmp_path: Path) -> None:
    text = works("predict", run, "--environment", "env_1", "--cells", "2", "--out", tmp_path / "p.h5ad")
    assert "the run was fitted to cells of this environment" in text


# ---------------------------------------------------------------------- counterfactual
def test_do_asks_the_best_member(
    works: Works, run: Path, screen: Path, cells: ps.EnvironmentDataset, tmp_path: Path
) -> None:
    words = ["counterfactual", run, screen, "--do", "c_1=2.0", "--do", "c_0+=-1", "--out", tmp_path / "cf.h5ad"]
    text = works(*words)
    fitted, found = ps.load(run), anndata.read_h5ad(tmp_path / "cf.h5ad")
    expected = ps.counterfactual(fitted.member(fitted.best), cells, do={"c_1": 2.0, "c_0": lambda c: c - 1})
    assert np.allclose(found.layers["counterfactual"], expected.x[0, 0], atol=1e-5)
    assert np.allclose(found.X, expected.x[0, 0], atol=1e-5)
    assert np.allclose(found.layers["factual"], expected.factual_x[0, 0], atol=1e-5)
    assert np.allclose(found.obsm["c"][:, 1], 2.0)
    assert np.allclose(found.obsm["c"][:, 0], found.obsm["c_factual"][:, 0] - 1, atol=1e-6)
    assert tuple(found.obs_names) == cells.cells
    assert set(found.obs["environment_asked"]) == set(cells.environments.index)
    change = np.abs((expected.x - expected.factual_x).mean((0, 1, 2)))
    assert f"largest changes: gene_{change.argmax()} " in text


def test_environment_asks_all_members(
    works: Works, run: Path, screen: Path, cells: ps.EnvironmentDataset, tmp_path: Path
) -> None:
    words = ["counterfactual", run, screen, "--environment", "env_5", "--of", "control,env_1", "--draws", "3"]
    works(*words, "--seed", "4", "--out", tmp_path / "cf.h5ad")
    fitted, found = ps.load(run), anndata.read_h5ad(tmp_path / "cf.h5ad")
    some = cells.of("control", "env_1")
    expected = ps.counterfactual(fitted, some, environment="env_5", draws=3, seed=4)
    assert tuple(found.obs_names) == some.cells
    assert np.allclose(found.layers["counterfactual"], expected.x.mean((0, 1)), atol=1e-5)
    assert np.allclose(found.layers["counterfactual_sd"], expected.x.mean(1).std(0), atol=1e-5)
    assert np.allclose(found.obsm["c"], expected.c[fitted.best].mean(0), atol=1e-5)
    assert np.allclose(found.obsm["z"], expected.z[fitted.best].mean(0), atol=1e-5)
    assert set(found.obs["environment_asked"]) == {"env_5"}


def test_only_best_is_the_best_member(run: Path) -> None:
    fitted = ps.load(run)
    alone = fitted.only(fitted.best)
    model, _ = alone.member(0)
    expected, _ = fitted.member(fitted.best)
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (len(alone), alone.best, alone.losses) == (1, 0, (min(fitted.losses),))


# ---------------------------------------------------------------------- demo, data
def test_demo_passes_its_options_on(works: Works, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_scm import demo

    asked: dict[str, object] = {}

    def instead(out: Path, **options: object) -> Path:
        asked.update(options, out=out)
        options["say"]("done")  # type: ignore[operator]
        return out

    monkeypatch.setattr(demo, "demo", instead)
    assert works("demo", "--out", tmp_path / "d", "--quick", "--seeds", "2") == "done\n"
    assert (asked["out"], asked["quick"], asked["seeds"]) == (tmp_path / "d", True, (0, 1))
    assert works("demo", "--out", tmp_path / "d", "--quiet") == ""
    assert (asked["quick"], asked["seeds"], asked["progress"]) == (False, (0, 1, 2), False)


def test_data_list_shows_the_catalogue(works: Works) -> None:
    from pyro_scm.data.download import CATALOGUE

    text = works("data", "list")
    for source in CATALOGUE.values():
        assert f"{source.name}: {source.description}" in text
        assert all(file.name in text for file in source.files)
    assert "5,365.2 MB" in text


def test_data_get_fetches_what_matches(works: Works, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyro_scm.data import download

    asked: dict[str, object] = {}

    def instead(name: str, folder: Path, **options: object) -> list[Path]:
        asked.update(options, name=name)
        return [folder / "a.txt", folder / "b.txt"]

    monkeypatch.setattr(download, "get", instead)
    text = works("data", "get", "l1000-phase2", "--match", "*info*", "--out", tmp_path / "l1000", "--quiet")
    assert text == f"{tmp_path / 'l1000' / 'a.txt'}\n{tmp_path / 'l1000' / 'b.txt'}\n"
    assert asked == {"name": "l1000-phase2", "match": "*info*", "progress": False}

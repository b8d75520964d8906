"""The drug tables: their parts on data whose answer is known, and their smallest sizes on real data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from experiments import (
    chemcpa_tables,
    l1000_cell_lines,
    l1000_unseen_drugs,
    launch,
    pretraining_helps,
    tggates_doses,
)
from experiments.tables import protocol, questions, reports
from experiments.tables.models import MANY, suite
from experiments.tables.protocol import Sizes
from pyro_scm.comparison import COLUMNS, Comparison
from pyro_scm.data import chemcpa_files, splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError


def screen(cells: int = 4, genes: int = 30, noise: float = 0.1, seed: int = 0) -> EnvironmentDataset:
    """Six drugs at doses 1 and 10, whose effects are their own times the dose's; references apart."""
    rng = np.random.default_rng(seed)
    effect = rng.normal(size=(6, genes))
    rows, x = [("control", 0.0)] * 12, [noise * rng.normal(size=genes) for _ in range(12)]
    for drug in range(6):
        for dose in (1.0, 10.0):
            rows += [(f"d{drug}", dose)] * cells
            x += [np.log10(1 + dose) * effect[drug] + noise * rng.normal(size=genes) for _ in range(cells)]
    obs = pd.DataFrame(rows, columns=["drug", "dose"], index=[f"c{i}" for i in range(len(rows))])
    adata = AnnData(np.array(x, np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(genes)]))
    return EnvironmentDataset.from_anndata(
        adata, environment="drug", control="control", dose="dose", representation="multi-hot", counts=False
    )


def held_out(cells: EnvironmentDataset) -> splits.Split:
    names = [str(n) for n in cells.environments.index if cells.environments.loc[n, "dose"] == 10]
    return splits.by_environment(cells, held_out=names[:3])


# ---------------------------------------------------------------------- what is asked
def test_no_cell_is_trained_on_and_scored_and_genes_are_called_on_the_other_half() -> None:
    cells = screen()
    task = questions.asked(held_out(cells), top=5)
    assert len(task.train) == len(held_out(cells).train) - 6  # half of the controls
    scored = np.setdiff1d(np.arange(len(cells)), np.asarray(task.train.origin))
    assert np.abs(task.control - task.before).max() > 0
    assert len(scored) == 6 + 3 * 4
    # with one gene of an effect far above the noise it is the first
    assert task.genes.shape == (3, 5)
    largest = np.abs(task.truth - task.control).argmax(1)
    assert (np.isin(largest, task.genes)).all()


def test_the_truth_scores_best_and_the_offset_changes_r2_alone() -> None:
    task = questions.asked(held_out(screen()), top=5)
    change = task.truth - task.control
    perfect = pd.DataFrame(task.rows("m", "model", 0, change), columns=COLUMNS).groupby("metric")["value"].mean()
    assert perfect["delta_pearson"] == pytest.approx(1)
    assert perfect["r2"] == pytest.approx(1)
    assert perfect["rank"] == 0
    half = [
        pd.DataFrame(t.rows("m", "model", 0, 0.5 * change), columns=COLUMNS).groupby("metric")["value"].mean()
        for t in (task, replace(task, offset=np.linspace(0, 20, 30)))
    ]
    assert half[0]["delta_r2"] == pytest.approx(half[1]["delta_r2"])
    assert half[0]["r2"] < 0.8 < 0.95 < half[1]["r2"]  # what a published r2 owes to the genes' levels


def test_the_inner_question_keeps_controls_apart_too() -> None:
    """Were controls trained on and scored against, the inner scores of a screen without effects would be above 0."""
    rng = np.random.default_rng(0)
    scores = []
    for seed in range(8):
        cells = screen(cells=4, genes=300, noise=0.0, seed=seed)
        cells = replace(cells, x=rng.normal(size=cells.x.shape).astype(np.float32))
        task = questions.asked(held_out(cells))
        names = [str(n) for n in task.train.environments.index[task.train.present][-3:]]
        inside = questions.inner(task, names)
        scored_against = len(task.train.of("control")) - len(inside.train.of("control"))
        assert scored_against == len(task.train.of("control")) // 2
        scores.append(inside.pearson(questions.simple(inside, {}, ())[1]["training_mean"]))
    assert abs(np.mean(scores)) < 0.1


def test_the_inner_question_holds_out_training_conditions_only() -> None:
    task = questions.asked(held_out(screen()))
    names = [str(n) for n in task.train.environments.index[task.train.present][-2:]]
    inside = questions.inner(task, names)
    assert set(inside.names) == set(names)
    assert not set(names) & {str(n) for n in inside.train.environments.index[inside.train.present]}
    assert not set(task.names) & {str(n) for n in inside.train.environments.index[inside.train.present]}


def test_ridge_stands_beside_itself_recentred() -> None:
    question = questions.asked(held_out(screen(noise=0.5)))
    made, changes = questions.simple(question, {"mean of the dose": questions.alike("dose")}, ("mean of the dose",))
    ridge = made["ridge"]
    left = made["mean of the dose"].of_rest(ridge.predict(ridge.trained_names), question.names)
    assert np.abs(left).max() > 0
    whole = changes["ridge"] + left
    np.testing.assert_allclose(changes["ridge on mean of the dose"], whole)
    np.testing.assert_allclose(changes["ridge half on mean of the dose"], (whole + changes["mean of the dose"]) / 2)


def test_the_published_form_by_hand() -> None:
    rows: list[Any] = []
    for seed, shift in ((0, 0.0), (1, 0.2)):
        for environment, r2 in (("a", 0.5), ("b", -3.0), ("c", 0.1)):
            rows += [("m", "model", seed, environment, metric, r2 + shift) for metric in ("r2", "r2_deg", "delta_r2")]
            rows.append(("m", "model", seed, environment, "delta_pearson", r2 / 10 + shift))
    rows.append(("none", "baseline", -1, "a", "delta_pearson", float("nan")))
    rows += [("none", "baseline", -1, "a", metric, 0.3) for metric in ("r2", "r2_deg", "delta_r2")]
    table = reports.published(
        Comparison(pd.DataFrame(rows, columns=COLUMNS)), pd.Series({"a": 10.0, "b": 10.0, "c": 10.0})
    )
    own = table.loc[(10.0, "m")]
    assert own["E[r2] all"] == pytest.approx(np.mean([(0.5 + 0 + 0.1) / 3, (0.7 + 0 + 0.3) / 3]))
    assert own["median r2 DEGs"] == pytest.approx(np.mean([0.1, 0.3]))
    assert own["delta Pearson"] == pytest.approx((0.5 - 3 + 0.1) / 30 + 0.1)
    assert own["sd of seeds"] == pytest.approx(0.2 / 2**0.5)
    assert np.isnan(table.loc[(10.0, "none"), "delta Pearson"])
    assert table.loc[(10.0, "none"), "E[r2] all"] == pytest.approx(0.3)


def test_a_model_that_can_know_wins_and_is_chosen_on_training_conditions() -> None:
    cells = screen(cells=6, noise=0.3)
    question = questions.asked(held_out(cells), top=5)
    names = [str(n) for n in cells.environments.index if cells.environments.loc[n, "dose"] == 10][3:5]
    sizes = Sizes(seeds=(0, 1), kl_weights=(1.0,), epochs=40, batch_size=32, lr=0.02, hidden=32, cells=6)
    models = suite({"decoder_only": {}})
    found = protocol.compared(question, [questions.inner(question, names, 5)], sizes, models)
    scores = found.comparison.summary(["delta_pearson"])["delta_pearson"]
    assert scores["decoder_only"] > scores["training_mean"] + 0.05
    assert found.champion.startswith("decoder_only")
    assert scores[protocol.CHAMPION] == pytest.approx(scores[found.champion])
    assert scores[protocol.CEILING] > 0.9
    on = "decoder_only, on training_mean"
    assert {on, f"{on}{protocol.ENSEMBLE}"} <= set(found.comparison.scores["model"])
    np.testing.assert_allclose(found.changes[f"{on}{protocol.ENSEMBLE}"][0], found.changes[on].mean(0))
    assert (found.chosen["fit_cpu_s"] > 0).all()
    tables = reports.reported("doses", [found])
    assert tables["doses_gate"].loc[protocol.CHAMPION, "corrected_for"] == 1
    chosen = tables["doses_scores"].groupby("model")["value"].sum()
    assert chosen[f"decoder_only{reports.CHOSEN}"] == pytest.approx(chosen[found.champion])
    assert protocol.CHAMPION in reports.sentence([found])


def test_a_champion_is_chosen_by_the_inner_conditions_and_not_by_the_scores() -> None:
    """Two models, of which the one that fails on the held-out conditions is right on the inner ones."""
    cells = screen(cells=6, noise=0.3)
    question = questions.asked(held_out(cells), top=5)
    names = [str(n) for n in cells.environments.index if cells.environments.loc[n, "dose"] == 10][3:5]
    inside = questions.inner(question, names, 5)
    inside = replace(inside, truth=inside.control - (inside.truth - inside.control))  # the inner truth turned round
    sizes = Sizes(seeds=(0,), kl_weights=(1.0,), epochs=30, batch_size=32, lr=0.02, hidden=32, cells=6)
    models = suite({"vae": {}, "decoder_only": {}})
    found = protocol.compared(question, [inside], sizes, models, recentre=())
    assert found.champion == "vae, ensemble"  # says nothing, which is better than the opposite
    scores = found.comparison.summary(["delta_r2"])["delta_r2"]
    assert scores["decoder_only"] > scores["vae"]


def test_splits_are_joined_and_what_is_not_in_all_of_them_is_left_out() -> None:
    cells = screen(cells=6)
    names = [str(n) for n in cells.environments.index if cells.environments.loc[n, "dose"] == 10]
    parts = []
    for number, some in enumerate((names[:3], names[3:])):
        question = questions.asked(splits.by_environment(cells, held_out=some))
        part = protocol.compared(question, [], Sizes(), {}, recentre=())
        if number:
            rows = question.rows("late", "model", 0, question.truth - question.control)
            scores = pd.concat([part.comparison.scores, pd.DataFrame(rows, columns=COLUMNS)], ignore_index=True)
            part = replace(part, comparison=replace(part.comparison, scores=scores))
        parts.append(part)
    both = reports.joined(parts)
    assert set(both.scores["environment"]) == set(names)
    assert "late" not in set(both.scores["model"])
    assert {"ridge", protocol.CEILING} <= set(both.scores["model"])
    assert set(both.config["units"]) == set(names)


def test_models_are_fitted_to_at_most_so_many_cells_of_a_condition_and_to_all_references() -> None:
    kept = protocol.at_most(screen(), 3)
    counts = np.bincount(kept.env)
    assert sorted(counts[counts > 0]) == [3] * 12 + [12]


# ---------------------------------------------------------------------- hepatocytes
SMALL_DOSES: dict[str, Any] = {"models": ("decoder_only",), "bits": 64}


def hepatocytes(noise: float = 1.0, drugs: int = 40, genes: int = 50) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Arrays in TG-GATEs' layout; control arrays of a drug share a batch effect."""
    rng = np.random.default_rng(0)
    rows, x = [], []
    for drug in range(drugs):
        effect = rng.normal(size=genes)
        for time in (8.0, 24.0):
            batch = 3 * rng.normal(size=genes)
            for level, size in (("Control", 0.0), ("Middle", 0.5), ("High", 1.0)):
                for replicate in (1, 2):
                    rows.append((f"d{drug}", level, time, replicate, "C" * (drug % 9 + 1)))
                    x.append(batch + size * effect + noise * rng.normal(size=genes))
    obs = pd.DataFrame(rows, columns=["drug", "level", "time", "replicate", "smiles"])
    obs.index = pd.Index([f"a{i}" for i in range(len(obs))])
    return obs, pd.DataFrame(np.array(x), obs.index, [f"g{i}" for i in range(genes)])


def test_training_and_truth_of_a_drug_share_no_control() -> None:
    obs, x = hepatocytes()
    x[:] = np.where((obs["level"] == "Control").to_numpy()[:, None], x, 0.0)  # only the controls vary
    held = ((obs["level"] == "High") & (obs["time"] == 24) & obs["drug"].isin(["d0", "d1"])).to_numpy()
    table, values = tggates_doses.changes(obs, x, held)
    own = (table["drug"] == "d0") & (table["time"] == 24)
    train, test = (values[(own & (table["side"] == s)).to_numpy()] for s in ("train", "test"))
    controls = x[(obs["drug"] == "d0") & (obs["time"] == 24) & (obs["level"] == "Control")].to_numpy()
    np.testing.assert_allclose(train, -np.repeat(controls[:1], len(train), 0))
    np.testing.assert_allclose(test, -np.repeat(controls[1:], len(test), 0))
    # controls of a drug with a held-out condition at that time are on neither side as cells
    assert (table["side"] == "control").sum() == 2 * (2 * 40 - 2)
    assert not values[(table["side"] == "zero").to_numpy()].any()
    assert set(table.loc[table["side"].isin(["control", "zero"]), "drug"]) == {tggates_doses.CONTROL}


def test_the_ceiling_is_what_knowing_the_truth_reaches() -> None:
    obs, x = hepatocytes(drugs=200)
    held = (obs["level"] == "High").to_numpy() & (obs["time"] == 24).to_numpy()
    table, values = tggates_doses.changes(obs, x, held)
    cells = EnvironmentDataset.from_anndata(
        AnnData(values.astype(np.float32), table, pd.DataFrame(index=x.columns)),
        environment="drug", control="control", dose="dose", time="time", counts=False,
    )  # fmt: skip
    test = (table["side"] == "test").to_numpy()
    names = [str(n) for n in cells.environments.index[np.unique(cells.env[test])]]
    limit = tggates_doses.ceiling(obs, x, names, cells, "high").loc[(25.0, 24.0)]
    rng = np.random.default_rng(0)
    truth = [
        rng.normal(size=50) for _ in range(200)
    ]  # of `hepatocytes`, whose generator draws more: only the size counts
    assert np.std(truth) == pytest.approx(1, abs=0.05)
    assert limit["r, mean"] == pytest.approx(1 / 3, abs=0.03)  # signal 1, noise 1 + 1
    assert limit["ceiling"] == pytest.approx((1 / 2.5) ** 0.5, abs=0.03)  # truth: noise 1 / 2 + 1


def test_choices_share_no_control_with_what_they_are_made_from(data_folder: Path) -> None:
    """Held-out conditions are in neither the inner training nor its truth, and inner truths are from other controls."""
    config = tggates_doses.Doses(**SMALL_DOSES)
    made, choosing, _ = tggates_doses.question("high", config)
    train = choosing.train
    present = {str(train.environments.index[e]) for e in train.present}
    assert len(choosing.names) == 30
    assert not set(made.names) & (present | set(choosing.names))
    assert not set(choosing.names) & present
    # the mean of a drug's other doses, from another control, is no better than in the scored question
    drug = {"mean of the drug": questions.alike("perturbation")}
    inside, outside = (q.pearson(questions.simple(q, drug, ())[1]["mean of the drug"]) for q in (choosing, made))
    assert abs(inside - outside) < 0.12


# ---------------------------------------------------------------------- L1000
def test_mek_and_braf_inhibitors_share_one_feature() -> None:
    classes = {"trametinib": {"mek inhibitor"}, "vemurafenib": {"raf inhibitor"}, "other": {"hdac inhibitor"}}
    table = l1000_unseen_drugs.pathway_features(classes, list(classes))
    both = table.loc["trametinib"] * table.loc["vemurafenib"]
    assert both[both > 0].index.tolist() == ["mechanism MAPK pathway"]
    assert not (table.loc["other"] * table.loc["trametinib"]).any()


def test_features_of_lines_are_read_as_context() -> None:
    from pyro_scm.composition import Columns

    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        [(d, 10.0, 6.0, line, tissue) for d in ("a", "b") for line, tissue in (("L1", "skin"), ("L2", "skin"))],
        columns=["drug", "dose", "time", "line", "tissue"], index=list("wxyz"),
    )  # fmt: skip
    cells = l1000_cell_lines.read(obs, rng.normal(size=(4, 5)), list("ABCDE"))
    columns = Columns.of(cells.schema)
    assert set(columns.perturbations) == {"a", "b"}
    assert not columns.others
    assert [cells.features[i] for i in columns.context] == [
        "cell_line=L1", "cell_line=L2", "cell_line=tissue skin", "time / 24 h",
    ]  # fmt: skip
    perturbed = cells.representation[~cells.reference]
    np.testing.assert_allclose(perturbed[:, columns.perturbations["a"]].max(), np.log10(11))
    assert not cells.representation[cells.reference][:, :5].any()


# ---------------------------------------------------------------------- chemCPA's files
def test_simulated_files_have_the_published_layouts() -> None:
    sciplex, lincs = (chemcpa_files.standardise(adata) for adata in chemcpa_tables.simulated())
    shared = [g for g in sciplex.var_names if g in set(lincs.var_names)]
    assert 0 < len(shared) < sciplex.n_vars
    assert list(lincs.var_names) != shared
    a, b = (chemcpa_files.in_order(adata, shared) for adata in (sciplex, lincs))
    assert list(a.var_names) == list(b.var_names) == shared
    level = [np.asarray(x.X)[(x.obs["control"] & (x.obs["cell_line"] == "A549")).to_numpy()].mean(0) for x in (a, b)]
    assert np.corrcoef(*level)[0, 1] > 0.95  # the same genes, however the files order them
    with pytest.raises(DataError, match="'shared' or 'extended'"):
        chemcpa_tables.files(chemcpa_tables.Published(genes="all"))


def test_tables_of_chemcpa_run_on_files(tmp_path: Path) -> None:
    sciplex, lincs = chemcpa_tables.simulated()
    for name, adata in (("sciplex", sciplex), ("lincs", lincs)):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    argv = ["--preset", "smoke", "--models", "chemcpa", "--epochs", "2", "--genes", "extended", "--most", "6"]
    argv += ["--data", str(tmp_path / "sciplex.h5ad"), "--pretrain", str(tmp_path / "lincs.h5ad")]
    argv += ["--cells", "10", "--out", str(tmp_path / "out")]
    assert launch.launch("chemcpa_tables.py", chemcpa_tables.Published, chemcpa_tables.main, argv) == 0
    (folder,) = (tmp_path / "out" / "chemcpa_tables").iterdir()
    table = pd.read_csv(folder / "table_3_published.csv")
    assert set(table["group"]) == {1.0, 10.0}
    on = "chemcpa, on mean of the dose"
    assert {"training_mean", "chemcpa", "chemcpa, pre-trained", f"{on}, ensemble"} <= set(table["model"])
    score = table.groupby("model")["delta Pearson"].mean()
    # two epochs know nothing, and the common change is most of what there is
    assert score[on] > score["chemcpa"] + 0.1
    assert score[on] > 0.5


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (tggates_doses, tggates_doses.Doses),
        (l1000_cell_lines, l1000_cell_lines.Lines),
        (pretraining_helps, pretraining_helps.Pretraining),
    ],
)
def test_real_data_scripts_run_small(module: Any, config: Any, data_folder: Path, tmp_path: Path) -> None:
    argv = ["--preset", "smoke", "--models", "chemcpa", "--epochs", "1", "--cells", "5", "--out", str(tmp_path)]
    assert launch.launch(module.__file__, config, module.main, argv) == 0
    (folder,) = (tmp_path / Path(module.__file__).stem).iterdir()
    (path, *_) = sorted(folder.glob("*published.csv"))
    table = pd.read_csv(path)
    assert {"training_mean", "ridge"} <= set(table["model"])
    numbers = table[["E[r2] all", "median r2 DEGs", "delta r2"]].to_numpy()
    assert np.isfinite(numbers).all()
    assert (numbers <= 1).all()
    mean = table[table["model"] == "training_mean"]["delta Pearson"].mean()
    assert -0.1 < mean < 0.9


def test_mechanisms_are_told_to_models_that_can_read_them(data_folder: Path) -> None:
    config = l1000_unseen_drugs.L1000(bits=64)
    cells = l1000_unseen_drugs.mechanism_question(config).train
    for name, options in suite(MANY, l1000_unseen_drugs.UNSEEN).items():
        if name in l1000_unseen_drugs._BY_NAME:
            with pytest.raises(ModelError, match="multi-hot"):
                protocol.program(name, cells, config, options)
        else:
            protocol.program(name, cells, config, options)

"""Real screens whose answer is known: the scores on known truth, and every script at its smallest size."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scm as ps
from experiments import known_answers_crispr as crispr
from experiments import known_answers_l1000 as wells
from experiments import known_answers_pairs as pairs
from experiments import launch
from pyro_scm import directions, effects
from pyro_scm.errors import DataError
from pyro_scm.run import Run


def view(rows: dict[str, list[float]], inclusion: dict[str, list[float]] | None = None) -> crispr.View:
    """Effects by name; included wherever they are not 0 unless said."""
    table = pd.DataFrame.from_dict(rows, orient="index")
    p = (table != 0).astype(float) if inclusion is None else pd.DataFrame.from_dict(inclusion, orient="index")
    return crispr.View.of(table.to_numpy(float), list(table.index), p.loc[table.index].to_numpy(float))


PATHWAY = {
    "IFNGR1": [4.0, 0.0],
    "IFNGR2": [4.0, 0.0],
    "JAK2": [3.0, 0.0],
    "STAT1": [2.0, 0.5],
    "IRF1": [1.0, 0.0],
    "CAV1": [0.0, 0.0],
    "SMAD4": [0.0, 5.0],
}


@pytest.fixture(scope="module")
def short() -> tuple[Run, crispr.EnvironmentDataset]:
    """A fit of a few steps, with effects that are anything."""
    torch.set_num_threads(1)
    cells = crispr.dataset(crispr.simulated(cells=20))
    return crispr.fitted(cells, crispr.Crispr(seeds=(0, 1), steps=20, latent=3, hidden=4)), cells


# ---------------------------------------------------------------------- effects, their centre and their number
def test_the_robust_centre_is_where_most_are_and_turns_with_the_coordinates() -> None:
    rng = np.random.default_rng(0)
    values = 0.1 * rng.normal(size=(25, 4)) + 3.0
    values[:5] += 50.0
    centre = directions.centre(values)
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    assert np.abs(centre - 3.0).max() < 0.1
    assert np.abs(values.mean(0) - 3.0).min() > 5
    assert np.allclose(directions.centre(values @ turn), centre @ turn, atol=1e-4)


def test_the_sparse_basis_of_few_directions_keeps_the_rest_of_the_space() -> None:
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random((40, 3)) < 0.2, 3.0 * rng.normal(size=(40, 3)), 0.0)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    moved = np.hstack([sparse, np.zeros((40, 3))]) @ turn.T + 0.01 * rng.normal(size=(40, 6))
    basis = crispr.sparse_basis(moved, 3)
    r = np.abs(np.corrcoef(basis.effects[:, :3].T, sparse.T)[:3, 3:])
    assert (r.max(0) > 0.98).all()
    assert np.allclose(basis.matrix @ basis.matrix.T, np.eye(6), atol=1e-8)
    assert np.abs(basis.effects[:, 3:]).max() < 0.1


def test_effects_that_no_shift_has_yet_are_read_from_the_cells(short: tuple[Run, crispr.EnvironmentDataset]) -> None:
    run, cells = short
    z = ps.embed(run, cells)["z"][1]
    e = crispr.perturbed(run)[2]
    lag = z[cells.env == e].mean(0) - z[cells.reference[cells.env]].mean(0)
    assert np.allclose(crispr.embedded(run, cells)[1, e], crispr.shift_of(run)[1, e] + lag, atol=1e-4)
    whole = crispr.settled(run, cells, offset=False)
    assert np.allclose(crispr.shift_of(whole)[1, e], crispr.embedded(run, cells)[1, e], atol=1e-4)
    assert (crispr.shift_of(whole)[:, cells.reference] == 0).all()


def test_settled_effects_are_around_zero_and_turning_keeps_their_distances(
    short: tuple[Run, crispr.EnvironmentDataset],
) -> None:
    run, cells = short
    rows = crispr.perturbed(run)
    before, after = (
        crispr.shift_of(crispr.settled(r, cells))[:, rows] for r in (run, crispr.sparse_run(run, cells, 2))
    )
    weight = crispr.weights(cells, rows)
    assert np.abs([directions.centre(v, weight) for v in after]).max() < 1e-2
    distance = [np.linalg.norm(v[0][:, None] - v[0][None], axis=-1) for v in (before, after)]
    assert np.allclose(distance[0], distance[1], atol=1e-3)
    assert not np.allclose(before, after, atol=1e-2)


def test_probabilities_are_those_of_the_suite(short: tuple[Run, crispr.EnvironmentDataset]) -> None:
    run, _ = short
    rows = crispr.perturbed(run)
    own = effects.inclusion(run).loc[1].to_numpy()[rows]
    error = effects._errors(run.environments.table)[rows]
    assert np.allclose(effects.probabilities(crispr.shift_of(run)[1][rows], error), own)


def test_effects_can_be_put_into_a_run(short: tuple[Run, crispr.EnvironmentDataset]) -> None:
    run, _ = short
    wanted = np.zeros_like(crispr.shift_of(run))
    wanted[1, crispr.perturbed(run)[3], 2] = 7.0
    assert np.allclose(crispr.shift_of(crispr.with_effects(run, wanted)), wanted, atol=1e-5)


# ---------------------------------------------------------------------- scores of a view
def test_pathway_scores_by_hand() -> None:
    found = crispr.pathway_scores(view(PATHWAY))
    assert found["members on one latent"] == 4
    assert found["others on it"] == 1  # IRF1
    assert found["IRF1 latents within STAT1's"] == 1
    assert found["share of IRF1 along STAT1"] == pytest.approx(4 / 4.25)
    assert found["cosine of members"] == pytest.approx((3 + 3 * 2 / 4.25**0.5) / 6)
    assert found["CAV1 latents"] == 0
    assert found["share on"] == pytest.approx(7 / 14)


def test_a_negative_control_that_is_included_is_seen() -> None:
    rows = {**PATHWAY, "CAV1": [0.0, 2.0]}
    assert crispr.pathway_scores(view(rows))["CAV1 latents"] == 1


def test_containment_by_hand_and_its_order() -> None:
    contained = crispr.containment(view(PATHWAY))
    assert contained.loc["IRF1", "STAT1"] == 1
    assert contained.loc["STAT1", "IRF1"] == pytest.approx(1 / 2.5)
    assert contained.loc["SMAD4", "JAK2"] == 0
    assert crispr.order_scores(contained) == {"order right": 1.0, "order right, no IRF1": 1.0}
    reverse = {n: [1.0 + crispr.LEVEL[n], 0.0] for n in crispr.LEVEL} | {"CAV1": [0.0, 0.0]}
    assert crispr.order_scores(crispr.containment(view(reverse)))["order right"] == 0
    same = {n: [1.0, 0.0] for n in crispr.LEVEL}
    assert crispr.order_scores(crispr.containment(view(same)))["order right"] == 0.5


def test_effects_of_opposite_sign_are_not_contained() -> None:
    contained = crispr.containment(view({"a": [1.0], "b": [-1.0]}))
    assert contained.loc["a", "b"] == 0


def test_inclusion_f1_matches_latents_and_counts_what_has_no_partner() -> None:
    a = view(PATHWAY)
    swapped = view({n: v[::-1] for n, v in PATHWAY.items()})
    assert crispr.inclusion_f1(a, swapped) == 1
    assert crispr.matched_correlation(a, swapped) == pytest.approx(1)
    first = view({n: v[:1] for n, v in PATHWAY.items()})
    assert crispr.inclusion_f1(a, first) == pytest.approx(2 * 5 / (7 + 5))


def test_gene_agreement_finds_its_own_and_leaves_out_what_does_nothing() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 30))
    b = a + 0.1 * rng.normal(size=a.shape)
    b[3] = 0.0
    found = crispr.gene_agreement(a, b, ["STAT1", "x", "y", "z"])
    assert found["environments"] == 3
    assert found["correlation"] > 0.98
    assert found["rank of own"] == 0
    assert crispr.gene_agreement(a, b[[1, 2, 0, 3]], ["STAT1", "x", "y", "z"])["rank of own"] > 0.3


def test_differential_genes_of_a_null_and_of_a_shift() -> None:
    rng = np.random.default_rng(0)
    env = np.repeat([0, 1, 2], 100)
    x = rng.normal(size=(300, 20))
    x[env == 2, :5] += 2
    t, hit = crispr.differential(x, env, 0, [1, 2])
    assert hit[0].sum() == 0
    assert hit[1, :5].all()
    assert hit[1].sum() <= 6
    assert (t[1, :5] > 8).all()


# ---------------------------------------------------------------------- pairs
def test_what_can_be_predicted_from_what() -> None:
    found = pairs.tasks(["control", "A", "B", "C", "A+B", "C+D", "E+F"])
    assert found == {
        "A": [(("A+B",), ("B",))],
        "A+B": [(("A", "B"), ())],
        "B": [(("A+B",), ("A",))],
        "C+D": [(("C",), ())],
    }
    assert [pairs.kind(n, w) for n, w in found.items()] == [
        "single from a pair",
        "pair, both singles",
        "single from a pair",
        "pair, one single",
    ]


def test_additive_changes_by_hand() -> None:
    change = {"control": np.zeros(1), "A": np.array([1.0]), "B": np.array([10.0]), "A+B": np.array([100.0])}
    assert pairs.simple_guesses(change, "A+B", [(("A", "B"), ())])["additive"] == 11
    assert pairs.simple_guesses(change, "A", [(("A+B",), ("B",))])["additive"] == 90
    assert pairs.simple_guesses(change, "A", [(("A+B",), ("B",))])["mean of singles"] == 10


def test_parts_that_were_not_seen_do_nothing_and_the_controls_oddity_counts_once() -> None:
    config = pairs.Pairs(seeds=(0,), steps=10, latent=3, hidden=4)
    cells = pairs.dataset(pairs.simulated(cells=20), "multi-hot", pairs.CONTROL)
    run = crispr.fitted(cells, config)
    name = "model.shift.net.0"
    weight, bias = run.parameters[f"{name}.weight"], run.parameters[f"{name}.bias"]
    weight.zero_()
    bias[:] = torch.tensor([0.5, 0.0, 0.0])
    one, two = (cells.features.index(f"perturbation={n}") for n in ("S0", "S1"))
    weight[0, 0, one], weight[0, 1, two] = 3.0, 4.0
    weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    kept = pairs.only_parts(run, [True] * len(cells.features), rank=2)
    place = {str(n): i for i, n in enumerate(run.environments.table.index)}
    shown = crispr.shift_of(kept)[0]
    assert np.allclose(shown[place["S0+S1"]], [3.5, 4.0, 0.0], atol=0.1)
    assert np.allclose(shown[place["S0"]], [3.5, 0.0, 0.0], atol=0.1)
    blind = pairs.only_parts(run, [f != "perturbation=S0" for f in cells.features])
    assert np.allclose(crispr.shift_of(blind)[0][place["S0"]], [0.5, 0.0, 0.0], atol=1e-6)


def test_agreement_by_hand() -> None:
    found = pairs.agreement(np.array([3.0, 4.0]), np.array([0.0, 4.0]))
    assert found["error"] == pytest.approx(3 / 5)
    assert np.isnan(pairs.agreement(np.array([3.0, 4.0]), np.zeros(2))["correlation"])


# ---------------------------------------------------------------------- wells
def test_a_held_out_block_tells_the_rank() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 3)) @ rng.normal(size=(3, 80)) + 0.3 * rng.normal(size=(60, 80))
    assert wells.held_out_rank(values, draws=5, largest=8) == 3


def test_mechanisms_by_structure_then_by_name() -> None:
    obs = pd.DataFrame({"target": ["a", "Bee", "c", "control"], "pert_id": ["BRD-K00000001-003", "x", "y", "DMSO"]})
    table = pd.DataFrame(
        {
            "pert_id": ["BRD-K00000001", "BRD-K00000002", "DMSO"],
            "pert_iname": ["other", "bee", "control"],
            "MOA": ["MEK inhibitor; RAF inhibitor", "Mek inhibitor", "solvent"],
        }
    )
    assert wells.mechanisms(obs, [table]) == {"a": {"mek inhibitor", "raf inhibitor"}, "Bee": {"mek inhibitor"}}


def test_mechanism_scores_by_hand() -> None:
    vectors = pd.DataFrame([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 0.2]], list("abcde"))
    classes = {"a": {"m"}, "b": {"m"}, "c": {"n"}, "d": {"n"}, "e": {"alone"}}
    found = wells.mechanism_scores(vectors, classes)
    assert list(found.index) == ["a", "b", "c", "d"]
    assert found.loc["a"].tolist() == [1.0, 1.0]
    assert found.loc["b", "AUROC"] == pytest.approx(2 / 3 if found.loc["b", "nearest"] == 0 else 1.0)
    # what says nothing is chance
    assert (wells.mechanism_scores(vectors * 0, classes)["AUROC"] == 0.5).all()


def test_a_way_is_no_better_than_itself() -> None:
    table = pd.DataFrame({"AUROC": [0.2, 0.9, 0.7]})
    found = wells.bootstrapped(table, table)
    assert found["AUROC - raw low"] == found["AUROC - raw high"] == 0
    assert found["AUROC"] == pytest.approx(0.6)
    assert found["AUROC low"] < 0.6 < found["AUROC high"]


def test_the_shared_latent_is_chosen_without_braf_inhibitors() -> None:
    names = [*wells.MEK, *wells.BRAF, "other"]
    values = np.zeros((9, 2))
    values[:4, 0], values[4:8, 1] = 2.0, 5.0
    apart = wells.shared_latent(pd.DataFrame(values, names), coordinates=True)
    assert apart["on it: MEK"] == 1
    assert apart["on it: BRAF"] == 0
    assert apart["AUROC of BRAF"] == 0.5
    values[4:8] = [1.0, 0.0]
    together = wells.shared_latent(pd.DataFrame(values, names), coordinates=True)
    assert together["AUROC of BRAF"] == together["on it: BRAF"] == 1


def test_inclusions_in_the_latent_of_mek_inhibitors_are_counted() -> None:
    rows = {n: [1.0, 0.0] for n in wells.MEK} | {n: [1.0, 1.0] for n in wells.BRAF[:3]}
    rows |= {wells.BRAF[3]: [0.0, 1.0], "a": [1.0, 0.0], "b": [0.0, 0.0]}
    row = wells.joint_table({"sparse": [view(rows), view(rows)]}).loc["sparse"]
    assert row[["latents", "MEK", "BRAF", "others"]].tolist() == [2, 4, 3, 1]
    assert row["others sd"] == 0


def test_across_plates_by_hand() -> None:
    index = [f"{n}@{p}" for p in ("p", "q") for n in ("a", "b", "c")] + ["alone@p"]
    values = np.vstack([np.eye(3), np.eye(3)[[0, 2, 1]], np.ones((1, 3))])
    found = wells.across(pd.DataFrame(values, index))
    assert found["first"].tolist() == [1, 0, 0]
    assert found.loc["a", "rank"] == 0
    assert found["cosine"].tolist() == [1, 0, 0]


# ---------------------------------------------------------------------- the scripts
def run_smoke(name: str, tmp_path: Path, *more: str) -> Path:
    module = importlib.import_module(f"experiments.{name}")
    config = next(v for v in vars(module).values() if dataclasses.is_dataclass(v) and hasattr(v, "preset")
                  and v.__module__ == module.__name__)  # fmt: skip
    argv = ["--preset", "smoke", "--out", str(tmp_path), *more]
    assert launch.launch(module.__file__, config, module.main, argv) == 0
    (folder,) = (tmp_path / name).iterdir()
    return folder


def test_knock_outs_with_a_known_truth(tmp_path: Path) -> None:
    folder = run_smoke("known_answers_crispr", tmp_path)
    table = pd.read_csv(folder / "summary.csv", index_col=0)
    sparse = table.loc["sparse"]
    assert sparse["members on one latent"] == 4
    assert sparse["IRF1 latents within STAT1's"] == 1
    assert sparse["CAV1 latents"] == 0
    assert sparse["share on"] < 0.25
    assert table.loc["sparse, no offset", "CAV1 / STAT1 size"] > sparse["CAV1 / STAT1 size"]
    agreed = pd.read_csv(folder / "replicates.csv", index_col=0)
    assert agreed.loc["sparse", "inclusion F1"] > 0.6
    assert (folder / "effects.png").is_file()


def test_pairs_with_a_known_truth(tmp_path: Path) -> None:
    folder = run_smoke("known_answers_pairs", tmp_path)
    table = pd.read_csv(folder / "error.csv").set_index("held out")
    assert table.loc["S0+S1", "additive"] < 0.4
    assert table.loc["S0+S1", "sparse"] < 0.6
    assert table.loc["S0+S1", "sparse"] < table.loc["S0+S1", "mean of singles"]


def test_wells_with_a_known_truth(tmp_path: Path) -> None:
    folder = run_smoke("known_answers_l1000", tmp_path)
    classes = pd.read_csv(folder / "24h_mechanisms.csv", index_col=0)
    assert classes.loc["sparse, included", "AUROC"] > 0.8
    shared = pd.read_csv(folder / "24h_shared.csv", index_col=0)
    assert shared.loc["sparse, included", "AUROC of BRAF"] > 0.9
    assert shared.loc["sparse, included", "on it: BRAF"] > 0.8
    joint = pd.read_csv(folder / "24h_joint.csv", index_col=0).loc["sparse"]
    assert joint[["MEK", "BRAF"]].tolist() == [4, 4]
    assert joint["others"] < 6
    plates = pd.read_csv(folder / "shrna_across.csv", index_col=0)
    assert plates.loc["raw", "rank"] < 0.4
    assert plates.loc["sparse, included", "rank"] < 0.4


@pytest.mark.parametrize("module", [crispr, wells, pairs])
def test_missing_data_are_told(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRO_SCM_DATA", raising=False)
    with pytest.raises(DataError, match="PYRO_SCM_DATA is not set"):
        module.main({crispr: crispr.Crispr, wells: wells.L1000, pairs: pairs.Pairs}[module]())  # type: ignore[index,attr-defined]


def test_unknown_parts_and_panels_are_told() -> None:
    with pytest.raises(DataError, match="no part 'shRNA': use some of l1000, shrna"):
        wells.main(wells.L1000(parts=("shRNA",)))


def test_the_interferon_pathway_shares_a_latent_in_real_cells(data_folder: Path) -> None:
    config = crispr.Crispr(seeds=(0, 1), steps=300, draws=3, cells=8000)
    cells = crispr.dataset(crispr.papalexi(config))
    run = crispr.sparse_run(crispr.fitted(cells, config), cells, 3)
    found = pd.DataFrame([crispr.pathway_scores(v) for v in crispr.views(crispr.settled(run, cells), 3)])
    assert (found["members on one latent"] == 4).all()
    assert (found["others on it"] <= 1).all()
    assert (found["CAV1 latents"] == 0).all()


def test_real_activations_and_wells_can_be_read(data_folder: Path) -> None:
    adata = pairs.read(pairs.Pairs())
    possible = pairs.tasks(sorted(set(adata.obs["target"])))
    assert {n for n, w in possible.items() if pairs.kind(n, w) == "pair, both singles"} == {
        "KLF1+MAP2K6",
        "MAP2K3+MAP2K6",
    }
    plates = wells.hairpins(wells.L1000())
    assert (
        len(wells.across(pd.DataFrame(np.asarray(plates.X), plates.obs["target"]).loc[lambda t: t.index != "control"]))
        > 300
    )
    compounds, classes = wells.compounds("24h", wells.L1000())
    assert set(wells.MEK) | set(wells.BRAF) <= set(compounds.obs["target"])
    assert "mek inhibitor" in classes["trametinib"]

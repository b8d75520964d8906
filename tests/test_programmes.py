"""Programmes are the decoder's derivatives; enrichment and links find what is planted, and nothing else."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from experiments import launch
from pyro_scm import infer, query, recipes
from pyro_scm.data.synthetic import dataset, simulate
from pyro_scm.errors import DataError
from pyro_scm.programmes import Programmes, _rewirings, _tails, gene_programmes, jacobian

GENES = tuple(f"g{j}" for j in range(100))


def fitted(name: str, observation: str = "gaussian", **options: Any) -> tuple[Any, Any]:
    cells = dataset(simulate(latent=3, genes=12, cells=30, environments=4, observation=observation))
    model, guide = recipes.make(name, cells.schema, latent=3, guide_hidden=(8,), **options)
    return infer.fit(model, guide, cells, seeds=(0, 1), epochs=2), cells


def test_weights_of_a_linear_decoder_are_its_weights() -> None:
    run, cells = fitted("environment_vae", hidden=())
    found = gene_programmes(run, cells)
    c = query.embed(run, cells)["c"]
    for k in range(2):
        net = run.member(k)[0].likelihoods[0].net[0]
        expected = net.weight.detach().numpy().T * c[k].std(0)[:, None]
        assert np.allclose(found.weights[k], expected, atol=1e-5)
    assert found.spread is not None
    assert np.abs(found.spread).max() < 1e-3
    assert found.nodes == ("c_0", "c_1", "c_2")
    assert found.genes == cells.genes


@pytest.mark.parametrize(
    ("name", "observation"),
    [
        ("vae", "negative-binomial"),
        ("conditional_vae", "gaussian"),
        ("structured_environment_vae", "negative-binomial"),
    ],
)
def test_jacobians_are_those_of_each_cell_and_member(name: str, observation: str) -> None:
    run, cells = fitted(name, observation, hidden=(16,))
    found = jacobian(run, cells)
    assert found.shape == (2, len(cells), 3, 12)
    c = query.embed(run, cells)["c"]
    for k in range(2):
        likelihood = run.member(k)[0].likelihoods[0]
        for cell in (0, 77):
            batch = cells.batch(np.array([cell]))

            def decoded(one: torch.Tensor, batch: Any = batch, likelihood: Any = likelihood) -> torch.Tensor:
                if observation == "gaussian":
                    return (likelihood.mean(one[None], batch) / likelihood.spread)[0]
                counts = likelihood.mean(one[None], batch)[0] * likelihood.log_depth.exp() / batch.size
                return torch.log1p(counts) / likelihood.spread

            expected = torch.autograd.functional.jacobian(decoded, torch.as_tensor(c[k, cell]))
            assert np.allclose(found[k, cell], expected.numpy().T, atol=1e-4)
    programmes = gene_programmes(run, cells)
    assert np.allclose(programmes.weights, found.mean(1) * c.std(1)[..., None], atol=1e-4)
    assert np.allclose(programmes.spread, found.std(1) * c.std(1)[..., None], atol=1e-4)
    assert programmes.spread.max() > 1e-3


def test_a_jacobian_too_large_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run, cells = fitted("vae", hidden=())
    monkeypatch.setattr("pyro_scm.programmes._LARGEST_ANSWER", 1000)
    with pytest.raises(DataError, match=r"the answer would take 0\.0 GiB: ask about fewer cells"):
        jacobian(run, cells)


def planted(seed: int = 0, members: int = 1, size: int = 8) -> Programmes:
    """Genes 0..size-1 have large weights on latent 1; nothing else is anything."""
    weights = np.random.default_rng(seed).normal(size=(members, 3, 100)).astype(np.float32)
    weights[:, 1, :size] = 12 * np.where(np.arange(size) % 2, -1, 1)
    return Programmes(weights, GENES, ("a", "b", "c"))


def test_programmes_are_the_genes_of_high_weight() -> None:
    programmes = planted(size=5)
    found = programmes.genes_of("b")
    assert set(found.index) == {"g0", "g1", "g2", "g3", "g4"}
    assert found["g0"] > 2.5
    assert found["g1"] < -2.5
    assert found.equals(programmes.genes_of(1))
    table = programmes.table()
    assert table[table["latent"] == "b"]["gene"].tolist() == ["g0", "g1", "g2", "g3", "g4"]
    dead = Programmes(np.zeros((1, 1, 100), np.float32), GENES, ("a",))
    assert dead.genes_of(0).empty


def test_a_planted_gene_set_is_found() -> None:
    sets = {"true": GENES[:8], "other": GENES[20:40], "unmeasured": ("x", "y"), "small": GENES[:2]}
    table, overall = planted(size=6).enrichment(sets, permutations=200)
    assert set(table["gene_set"]) == {"true", "other"}
    row = table[(table["latent"] == "b") & (table["gene_set"] == "true")].iloc[0]
    assert (row["overlap"], row["set_size"]) == (6, 8)
    assert row["p"] == pytest.approx(stats.hypergeom.sf(5, 100, 8, row["programme_size"]))
    assert row["expected"] == pytest.approx(8 * row["programme_size"] / 100)
    assert row["q"] < 1e-4
    assert row["p_permutation"] == row["p_family"] == pytest.approx(1 / 201)
    assert table.drop(index=row.name)[["q", "p_family"]].min().min() > 0.05
    assert overall["found"].tolist() == [1]
    assert overall["p"].iloc[0] < 0.05
    assert overall["expected"].iloc[0] < 0.2


def test_random_weights_give_uniform_p_values() -> None:
    rng = np.random.default_rng(3)
    programmes = Programmes(rng.normal(size=(100, 1, 100)).astype(np.float32), GENES, ("a",), threshold=1.5)
    table, overall = programmes.enrichment({"set": GENES[:20]}, permutations=99)
    assert stats.kstest(table["p_permutation"], "uniform").pvalue > 0.01
    assert table["p_family"].equals(table["p_permutation"])  # one pair a member
    for level in (0.05, 0.2, 0.5):  # of a count: conservative
        assert (table["p"] <= level).mean() <= level + 3 * (level * (1 - level) / 100) ** 0.5
    assert (overall["p"] <= 0.05).mean() <= 0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5
    programmes = Programmes(rng.normal(size=(100, 4, 30)).astype(np.float32), GENES[:30], ("a", "b", "c", "d"))
    edges = [(GENES[i], GENES[j]) for i, j in rng.integers(30, size=(60, 2))]
    _, overall = programmes.links(edges, permutations=99)
    alike = overall[overall["links"] == "correlation of weights"]
    assert stats.kstest(alike["p_labels"], "uniform").pvalue > 0.01
    assert stats.kstest(alike["p_degrees"], "uniform").pvalue > 0.01


def test_the_largest_z_holds_for_all_pairs_of_a_member() -> None:
    rng = np.random.default_rng(1)
    programmes = Programmes(rng.normal(size=(60, 3, 100)).astype(np.float32), GENES, ("a", "b", "c"))
    sets = {str(i): [GENES[j] for j in rng.choice(100, 12, replace=False)] for i in range(10)}
    smallest = programmes.enrichment(sets, permutations=99)[0].groupby("member")[["p_permutation", "p_family"]].min()
    assert stats.kstest(smallest["p_family"], "uniform").pvalue > 0.01
    assert (smallest["p_permutation"] <= 0.05).mean() > 0.5  # of 30 pairs


def test_planted_links_are_found_with_both_kinds_of_chance() -> None:
    programmes = planted(size=5)
    rng = np.random.default_rng(0)
    background = [(GENES[i], GENES[j]) for i, j in rng.integers(100, size=(150, 2))]
    edges = [*background, *((GENES[i], GENES[j]) for i in range(5) for j in range(i))]
    each, overall = programmes.links(edges, permutations=200)
    row = each.set_index("latent").loc["b"]
    assert row["found"] >= 10
    assert row["p_labels"] < 0.01
    assert row["p_degrees"] < 0.01
    assert row["expected_labels"] < 1
    assert each.set_index("latent").loc["a", "p_labels"] > 0.05
    assert overall.set_index("links").loc["any programme", ["p_labels", "p_degrees"]].max() < 0.01


def test_hubs_are_no_evidence_once_degrees_are_kept() -> None:
    rng = np.random.default_rng(0)
    # every gene of the programme is linked to half of all genes, and to each other no more than that
    edges = [(GENES[i], GENES[j]) for i in range(5) for j in range(100) if i != j and rng.random() < 0.5]
    row = planted(size=5).links(edges, permutations=200)[0].set_index("latent").loc["b"]
    assert row["p_labels"] < 0.05
    assert row["p_degrees"] > 0.05


def test_rewiring_keeps_degrees_and_moves_links() -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice(20 * 20, 80, replace=False)
    pairs = np.stack([codes // 20, codes % 20], 1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    for other in _rewirings(pairs, 5, rng):
        for end in (0, 1):
            assert np.array_equal(np.bincount(other[:, end], minlength=20), np.bincount(pairs[:, end], minlength=20))
        assert len(np.unique(other, axis=0)) == len(pairs)
        assert (other[:, 0] != other[:, 1]).all()
        kept = set(map(tuple, other.tolist())) & set(map(tuple, pairs.tolist()))
        assert len(kept) < 0.6 * len(pairs)


def test_tails_are_hypergeometric() -> None:
    programme, size = np.array([0, 3, 17]), np.array([1, 9, 40])
    tail = _tails(50, programme, size)
    for i, n in enumerate(programme):
        for j, marked in enumerate(size):
            expected = stats.hypergeom.sf(np.arange(tail.shape[2]) - 1, 50, marked, n)
            assert np.allclose(tail[i, j], expected, atol=1e-12)


def test_figure_names_genes_and_latents() -> None:
    axes = planted(size=3).figure(genes=3).axes[0]
    assert {"g0", "g1", "g2"} <= {label.get_text() for label in axes.get_xticklabels()}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"weights have shape \(1, 2, 3\): expected \(K, 1 latents, 3 genes\)"):
        Programmes(np.zeros((1, 2, 3), np.float32), ("x", "y", "z"), ("a",))
    with pytest.raises(DataError, match="some weights are not finite"):
        Programmes(np.full((1, 1, 2), np.nan, np.float32), ("x", "y"), ("a",))
    with pytest.raises(DataError, match="no latent 'd': this model has 'a', 'b', 'c'"):
        planted().genes_of("d")
    with pytest.raises(DataError, match="none of 1 gene sets has 5 to 500 of the 100 genes"):
        planted().enrichment({"set": ("x", "y")})
    with pytest.raises(DataError, match="none of 2 links is between two of the 100 genes"):
        planted().links([("x", "g0"), ("g0", "g0")])


def test_table_is_tidy() -> None:
    assert isinstance(planted(members=2).table(), pd.DataFrame)
    assert set(planted(members=2).table()["member"]) == {0, 1}


def test_the_experiment_runs_small(data_folder: Path, tmp_path: Path) -> None:
    module = importlib.import_module("experiments.gene_programmes")
    argv = ["--preset", "smoke", "--out", str(tmp_path)]
    assert launch.launch(module.__file__, module.Validation, module.main, argv) == 0
    (folder,) = (tmp_path / "gene_programmes").iterdir()
    sets = pd.read_csv(folder / "sets.csv")
    assert set(sets["programmes"]) == {"PCA", "nonlinear", "linear"}
    assert sets[["p", "q", "p_permutation"]].stack().between(0, 1).all()
    # principal components of these cells are known to hold hallmark sets: the references are read as they should
    hallmark = sets[(sets["programmes"] == "PCA") & (sets["collection"] == "hallmark")]
    assert (hallmark["q"] < 0.05).any()
    links = pd.read_csv(folder / "links.csv")
    assert set(links["network"]) == {"TRRUST", "DoRothEA", "Replogle"}
    assert (folder / "papalexi_programmes.png").is_file()

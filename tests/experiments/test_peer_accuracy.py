"""Accuracy beside published programs: what a peer is given, and that its answers are scored as our own models are."""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import pyro_scm as ps
from experiments.benchmarks import peer_accuracy, peer_worker
from experiments.benchmarks.peer_accuracy import Places, Program, Question
from pyro_scm.data import splits, synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import PyroScmError

HERE = Places({"cpa": sys.executable, "sams-vae": sys.executable}, {})
# a peer that adds the mean changes of parts, from a decoder that is 1 too high everywhere; its latents are genes
FAKE = """
import json, sys
import numpy as np
job = json.loads(sys.argv[1])
if job["options"].get("do") == "crash":
    raise SystemExit("no such layer")
if job["options"].get("do") == "missing":
    print(json.dumps({"missing": "No module named cpa"}))
    raise SystemExit
cells = np.load(job["folder"] + "/cells.npz")
x, env, amounts = cells["x"], cells["env"], cells["amounts"]
control = x[cells["reference"][env]].mean(0)
seen = np.unique(env)
change = np.stack([x[env == e].mean(0) for e in seen]) - control
effects = np.linalg.lstsq(amounts[seen], change, rcond=None)[0]
arrays = {"means": control + 1 + amounts[cells["asked"]] @ effects, "start": control + 1}
arrays |= {"z": x[:, :2], "effects": effects[:, :2], "mask": (np.abs(effects[:, :2]) > 1).astype(np.float32)}
np.savez(job["folder"] + "/answer.npz", **arrays)
print("chatter")
print(json.dumps({"seconds": 2.5, "words": job["peer"], "versions": {}}))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(FAKE)
    monkeypatch.setattr(peer_accuracy, "CHILD", script)


def pairs() -> EnvironmentDataset:
    """Pairs that add, of four singles in five genes."""
    rng = np.random.default_rng(0)
    moves = {s: 3.0 * np.eye(5)[i] for i, s in enumerate("ABCD")}
    moves |= {"A+B": moves["A"] + moves["B"], "C+D": moves["C"] + moves["D"], "control": np.zeros(5)}
    name = np.repeat(list(moves), 40)
    x = (np.stack([moves[n] for n in name]) + 0.3 * rng.normal(size=(len(name), 5))).astype(np.float32)
    adata = AnnData(X=x, obs=pd.DataFrame({"target": name}, [f"c{i}" for i in range(len(name))]))
    return EnvironmentDataset.from_anndata(
        adata, environment="target", control="control", representation="multi-hot", counts=False
    )


def test_peer_is_given_parts_of_combinations_and_no_amount_in_the_control() -> None:
    cells = pairs()
    given = peer_accuracy.arrays(cells, ["A+B"])
    table = pd.DataFrame(given["amounts"], index=cells.environments.index, columns=list("ABCD"))
    assert table.loc["A+B"].tolist() == [1, 1, 0, 0]
    assert table.loc["C"].tolist() == [0, 0, 1, 0]
    assert table.loc["control"].tolist() == [0, 0, 0, 0]
    assert given["asked"].tolist() == [list(cells.environments.index).index("A+B")]
    assert "features" not in given


def test_doses_become_shares_of_the_largest_and_molecules_one_row_a_drug() -> None:
    pytest.importorskip("rdkit")
    obs = pd.DataFrame(
        {
            "drug": ["v", "v", "b", "b", "a", "a"],
            "dose": [0.0, 0.0, 2.0, 10.0, 10.0, 5.0],
            "smiles": [None, None, "CCO", "CCO", "c1ccccc1", "c1ccccc1"],
        },
        [f"c{i}" for i in range(6)],
    )
    cells = EnvironmentDataset.from_anndata(
        AnnData(X=np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), obs=obs),
        environment="drug", control="v", dose="dose", smiles="smiles", representation="molecules", bits=16,
        counts=False,
    )  # fmt: skip
    given = peer_accuracy.arrays(cells)
    found = {str(n): row.tolist() for n, row in zip(cells.environments.index, given["amounts"], strict=True)}
    assert found["b 2 uM"] == pytest.approx([0.0, 0.2])
    assert found["a 5 uM"] == pytest.approx([0.5, 0.0])
    assert given["features"].shape == (2, len(cells.features) - 1)  # all but the dose
    of_b = list(cells.environments.index).index("b 2 uM")
    assert np.array_equal(given["features"][1], cells.representation[of_b][:-1])


@pytest.mark.usefixtures("fake")
def test_peers_are_scored_as_baselines_and_ours_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question(splits.by_environment(pairs(), held_out=["A+B"]), fit={"epochs": 3})
    monkeypatch.setitem(peer_accuracy.QUESTIONS, "norman", lambda: question)
    monkeypatch.setitem(peer_accuracy.PEERS, "norman", (Program("CPA", "cpa", 1), Program("absent", "chemcpa", 1)))
    monkeypatch.setitem(peer_accuracy.OURS, "norman", {"small": ({"recipe": "cpa", "latent": 4}, {"lr": 0.01})})
    scores = peer_accuracy.unseen("norman", HERE, seeds=(0, 1), peer_seeds=(0, 3))
    table = peer_accuracy.summary(scores).set_index("program")
    assert table.loc[["CPA", "CPA, decoded"], "kind"].tolist() == ["peer", "peer"]
    assert "absent" not in table.index
    assert table.loc["CPA", "delta_pearson"] > 0.95
    # a decoder that is too high everywhere costs nothing where its own control is taken off, and 1 where it is not
    assert table.loc["CPA, decoded", "rmse"] > 0.9 > 0.3 > table.loc["CPA", "rmse"]
    assert table.loc["CPA", "seconds"] == 2.5
    assert sorted(scores.loc[scores["program"] == "CPA", "seed"].unique()) == [0, 3]
    assert table.loc["small", ["kind", "seeds"]].tolist() == ["model", 2]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("do", "said"), [("crash", "CPA failed: no such layer"), ("missing", "No module named cpa")])
def test_a_peer_that_fails_says_why(do: str, said: str) -> None:
    with pytest.raises(PyroScmError, match=said):
        peer_accuracy.ask(Program("CPA", "cpa", 1, {"do": do}), HERE, 0, peer_accuracy.arrays(pairs()))


def test_recovery_scores_are_perfect_for_the_truth_in_another_order_and_poor_for_mixed_latents() -> None:
    adata = ps.simulate("sams-vae", seed=0, cells=10, environments=31)
    cells = synthetic.dataset(adata)
    stored = adata.uns["truth"]
    order = np.random.default_rng(0).permutation(15)
    names = [str(n) for n in adata.obs["perturbation"].cat.categories]
    rows = [names.index(str(n)) for n in cells.environments["perturbation"]]
    targets, moved = stored["targets"][rows].astype(float), stored["shift"][rows]
    z = adata.obsm["z"]
    found = peer_accuracy.recovered(adata, cells, z[:, order], targets[:, order], moved[:, order])
    assert found["mcc_z"] == pytest.approx(1.0)
    assert (found["mask_f1"], found["effect_f1"]) == (1.0, 1.0)
    mix = np.linalg.qr(np.random.default_rng(1).normal(size=(15, 15)))[0]
    worse = peer_accuracy.recovered(adata, cells, z @ mix, targets, moved @ mix)
    assert worse["mcc_z"] < 0.8 < worse["linear_r2_z"]
    assert worse["effect_f1"] < 0.6


def test_rows_of_perturbations_find_their_environments() -> None:
    adata = ps.simulate("sams-vae", seed=0, cells=5, environments=12)
    cells = synthetic.dataset(adata)
    amounts = peer_accuracy.arrays(cells)["amounts"]
    values = np.arange(11, dtype=np.float32)[:, None] + 1
    assert np.array_equal(peer_accuracy._by_environment(values, cells), amounts @ values)


@pytest.mark.usefixtures("fake")
def test_recovery_of_a_peer_and_of_ours_stand_in_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peer_accuracy.PEERS, "recovery", (Program("SAMS-VAE", "sams-vae", 1),))
    rows = peer_accuracy.recovery(HERE, [0], (0,), (0,), cells=3, steps=2, epochs=1)
    assert rows.groupby("program").size().to_dict() == {
        "SAMS-VAE": 1, "sams_vae": 1, "svae_plus": 1, "translation_vae, unmixed and refined": 1
    }  # fmt: skip
    assert rows["mcc_z"].between(0, 1).all()
    assert peer_accuracy.recovery_summary(rows).set_index("program").loc["SAMS-VAE", "seconds"] == 2.5


def test_control_is_a_perturbation_of_its_own_for_cpa() -> None:
    cells = {"amounts": np.array([[0, 0], [1, 0]], np.float32), "reference": np.array([True, False])}
    assert peer_worker._with_control(cells).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.skipif("PYRO_SCM_DATA" not in os.environ, reason="PYRO_SCM_DATA is not set: needs the public data")
def test_held_out_drugs_and_their_controls_are_not_trained_on() -> None:
    question = peer_accuracy.tggates()
    train, test, references = question.split.train, question.split.test, question.references
    assert references is not None
    held_out = set(test.environments["perturbation"].iloc[np.unique(test.env)])
    assert len(held_out) == 20
    assert not held_out & set(train.environments["perturbation"].iloc[np.unique(train.env)])
    assert set(test.environments["dose"].iloc[np.unique(test.env)]) == {1.0}
    assert not set(references.cells) & set(train.cells)
    assert len(references) == 2 * 20

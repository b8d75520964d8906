"""The experiment on signalling proteins: its loader and scores by hand, and its smallest size on the public data."""

import os
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from experiments import launch, sachs
from pyro_scm.errors import DataError


def written(folder: Path, rows: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for target in sachs.TARGETS:
        table = pd.DataFrame(rng.normal(size=(rows, len(sachs.PROTEINS))), columns=list(sachs.PROTEINS))
        table.to_csv(folder / f"sachs_log_target_{target}.txt", index=False)
    return folder


def test_the_loader_reads_targets_off_file_names(tmp_path: Path) -> None:
    values, env, targets = sachs.load(written(tmp_path), cells=3)
    assert values.shape == (18, 11)
    assert np.bincount(env).tolist() == [3] * 6
    assert targets.sum(1).tolist() == [0, 1, 1, 1, 1, 1]
    assert [int(np.flatnonzero(row)[0]) for row in targets[1:]] == [1, 3, 4, 6, 8]


def test_missing_or_other_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sachs_log_target_none.txt: no such file"):
        sachs.load(tmp_path)
    folder = written(tmp_path)
    pd.DataFrame({"Raf": [1.0]}).to_csv(folder / "sachs_log_target_3.txt", index=False)
    with pytest.raises(DataError, match=r"sachs_log_target_3.txt: columns are Raf: expected Raf, Mek"):
        sachs.load(folder)


def test_the_consensus_is_a_dag_of_18_arcs_and_scores_itself() -> None:
    truth = sachs.consensus()
    assert truth.number_of_edges() == 18
    assert nx.is_directed_acyclic_graph(truth)
    own = sachs.scores(truth)
    assert (own["shd"], own["sid"], own["f1"], own["true edges"]) == (0, 0, 1, 18)
    assert sachs.scores(sachs.drawn(0, 0))["shd"] == 18


@pytest.mark.parametrize(
    ("true", "found", "distance"),
    [
        ("a>b", "a>b", 0),
        ("a>b", "b>a", 2),  # says that a does nothing, and that b acts on a
        ("a>b", "", 1),  # b's causes are not adjusted for: its effect on a is taken for one
        ("a>b b>c", "a>b b>c a>c", 0),  # too many edges in the right order adjust as well
        ("a>b a>c", "a>b b>c", 1),  # b and c have a cause in common, b's effect on c adjusts for it; c's on b does not
    ],
)
def test_intervention_distance_by_hand(true: str, found: str, distance: int) -> None:
    def graph(text: str) -> nx.DiGraph:
        result: nx.DiGraph = nx.DiGraph([tuple(edge.split(">")) for edge in text.split()])
        result.add_nodes_from("abc" if "c" in true else "ab")
        return result

    assert sachs.intervention_distance(graph(true), graph(found)) == distance


@pytest.mark.skipif("PYRO_SCM_DATA" not in os.environ, reason="PYRO_SCM_DATA names no folder of public data")
def test_the_smoke_preset_beats_chance_in_few_edges(tmp_path: Path) -> None:
    arguments = ["--preset", "smoke", "--out", str(tmp_path)]
    assert launch.launch(sachs.__file__, sachs.Sachs, sachs.main, arguments) == 0
    (folder,) = (tmp_path / "sachs").iterdir()
    scores = pd.read_csv(folder / "scores.csv").set_index("way")
    assert scores.loc["linear, hard interventions", "edges"] > 3
    assert (scores["shd"] <= 55).all()
    assert scores.loc["no edges", "shd"] == 18
    assert (folder / "edges.csv").is_file()


def test_without_data_the_script_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYRO_SCM_DATA", raising=False)
    assert launch.launch(sachs.__file__, sachs.Sachs, sachs.main, ["--preset", "smoke", "--out", str(tmp_path)]) == 2
    assert "PYRO_SCM_DATA is not set" in capsys.readouterr().err

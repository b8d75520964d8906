"""The experiment on hard interventions at its smallest size."""

from pathlib import Path

import pandas as pd
import pytest

from experiments import hard_interventions, launch


def test_hard_interventions_identify_the_graph_and_noise_does_not(tmp_path: Path) -> None:
    config, main = hard_interventions.HardInterventions, hard_interventions.main
    assert launch.launch(hard_interventions.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / "hard_interventions").iterdir()
    scores = pd.read_csv(folder / "scores.csv").set_index("design")
    assert scores.loc["hard, targets known", "shd"] == 0
    assert scores.loc["hard, targets unknown", "shd"] == 0
    assert scores["identified"].tolist() == [True, True, False]
    assert (scores["mcc_z"] > 0.95).all()
    assert (folder / "gain.png").is_file()


def test_the_summary_by_hand() -> None:
    rows = [
        {"design": "hard", "edges": 4, "shd": 0, "mcc_z": 0.9, "gain": 0.3, "identified": True},
        {"design": "hard", "edges": 6, "shd": 2, "mcc_z": 1.0, "gain": 0.1, "identified": False},
        {"design": "noise", "edges": 1, "shd": 1, "mcc_z": 0.5, "gain": 0.0, "identified": False},
    ]
    table = hard_interventions.summary(pd.DataFrame(rows))
    assert list(table.index) == ["hard", "noise"]
    hard = table.loc["hard"]
    assert (hard["edges"], hard["shd"], hard["share shd <= 1"]) == (5, 1, 0.5)
    assert hard["lowest mcc_z"] == pytest.approx(0.9)
    assert hard["gain"] == pytest.approx(0.2)
    assert hard["share gain >= 0.2"] == hard["share 'graph identified'"] == 0.5

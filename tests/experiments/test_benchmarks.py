"""The benchmarks run at small sizes, and their references learn what they are compared on."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.benchmarks import references, speed
from pyro_scm.data import synthetic


def test_hand_written_reference_trains_the_same_model() -> None:
    cells = synthetic.dataset(
        synthetic.simulate(latent=3, genes=12, environments=4, cells=60, decoder="linear"), "oracle"
    )
    losses = list(itertools.islice(references.hand_written(cells, 3, 16, 60), 400))
    usual = list(itertools.islice(references.usual_pyro(cells, 3, 16, 60), 400))
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 1
    assert np.mean(usual[-20:]) < np.mean(usual[:20]) - 1


def test_speed_prints_a_table_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.csv"
    words = ["--parts", "ensemble", "--members", "3", "--rounds", "1", "--out", str(out)]
    assert speed.main(words) == 0
    table = pd.read_csv(out)
    assert table["variant"].tolist() == ["usual Pyro, in turn", "fit, together"]
    assert table["ratio"].iloc[0] == 1
    assert (table["ms"] > 0).all()
    assert "3 small models" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        speed.main(["--parts", "nonsense"])

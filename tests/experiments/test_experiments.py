"""Every experiment runs at its smallest size and leaves the tables, figures and record that it promises."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import launch
from pyro_scm.errors import DataError

FOLDER = Path(launch.__file__).parent
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "launch"))


@dataclasses.dataclass(frozen=True)
class Toy:
    """One number and some seeds."""

    size: int = 3
    seeds: tuple[int, ...] = (0, 1)

    @classmethod
    def preset(cls, name: str) -> "Toy":
        return Toy(size={"smoke": 1, "quick": 3, "paper": 9}[name])


def toy(config: Toy) -> launch.Results:
    from matplotlib.figure import Figure

    table = pd.DataFrame({"seed": config.seeds, "value": [config.size * s for s in config.seeds]})
    return launch.Results({"values": table}, {"empty": Figure()}, "Two seeds.")


def test_launch_writes_tables_figures_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.launch("toy.py", Toy, toy, ["--out", str(tmp_path), "--size", "5", "--seeds", "2", "4"]) == 0
    (folder,) = (tmp_path / "toy").iterdir()
    assert pd.read_csv(folder / "values.csv")["value"].tolist() == [10, 20]
    assert {p.suffix for p in folder.iterdir()} == {".csv", ".png", ".svg", ".txt", ".json"}
    record = json.loads((folder / "config.json").read_text())
    assert record["config"] == {"size": 5, "seeds": [2, 4]}
    assert set(record["versions"]) >= {"torch", "pyro-ppl", "numpy"}
    assert "Two seeds." in capsys.readouterr().out


def test_launch_shows_a_finished_run_and_repeats_it_only_by_force(tmp_path: Path) -> None:
    runs = []

    def counted(config: Toy) -> launch.Results:
        runs.append(config)
        return toy(config)

    for argv in ([], [], ["--size", "4"], ["--force"]):
        launch.launch("toy.py", Toy, counted, ["--out", str(tmp_path), *argv])
    assert [c.size for c in runs] == [3, 4, 3]


def test_a_run_that_fails_leaves_nothing_that_looks_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(config: Toy) -> launch.Results:
        raise DataError("no cells: give some")

    assert launch.launch("toy.py", Toy, broken, ["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "toy.py: error: no cells: give some\n"
    assert not list(tmp_path.rglob("config.json"))


def test_presets_and_unknown_flags(tmp_path: Path) -> None:
    options, chosen = launch._parse(Toy, ["--preset", "paper", "--out", str(tmp_path)])
    assert chosen.size == 9
    assert options.out == str(tmp_path)
    with pytest.raises(SystemExit):
        launch._parse(Toy, ["--nonsense", "1"])


def test_data_folder_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRO_SCM_DATA", raising=False)
    with pytest.raises(DataError, match="PYRO_SCM_DATA is not set: point it to the folder"):
        launch.data_folder("papalexi_thp1")
    monkeypatch.setenv("PYRO_SCM_DATA", str(tmp_path))
    with pytest.raises(DataError, match="papalexi_thp1: no such folder"):
        launch.data_folder("papalexi_thp1")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_teaches_with_help(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"experiments.{script}")
    own = (v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__)
    config = next(v for v in own if dataclasses.is_dataclass(v) and hasattr(v, "preset"))
    with pytest.raises(SystemExit) as exit_:
        launch._parse(config, ["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert module.__doc__.strip().splitlines()[0] in text
    assert all(f"--{f.name.replace('_', '-')}" in text for f in dataclasses.fields(config))


@pytest.mark.parametrize("script", ["papalexi_thp1", "l1000_unseen_drugs"])
def test_real_data_scripts_run_small(script: str, data_folder: Path, tmp_path: Path) -> None:
    module = importlib.import_module(f"experiments.{script}")
    own = (v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__)
    config = next(v for v in own if dataclasses.is_dataclass(v) and hasattr(v, "preset"))
    assert launch.launch(module.__file__, config, module.main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    (folder,) = (tmp_path / script).iterdir()
    (path, *_) = folder.glob("*_scores.csv")
    scores = pd.read_csv(path)
    assert {"baseline", "model"} <= set(scores["kind"]) <= {"baseline", "model", "ceiling"}
    found = scores[scores["metric"] == "delta_r2"]["value"]
    assert np.isfinite(found).all()
    assert (found <= 1).all()


def test_pathway_table_by_hand() -> None:
    from experiments.papalexi_thp1 import pathway

    names = ["IFNGR1", "IFNGR2", "JAK2", "STAT1", "CAV1"]
    values = np.array([[2.0, 0.0], [2.0, 0.0], [4.0, 0.0], [3.0, 1.0], [0.0, 0.1]])
    index = pd.MultiIndex.from_product([[7], names], names=["seed", "knock_out"])
    row = pathway(pd.DataFrame(values, index=index, columns=["z_0", "z_1"])).loc[7]
    assert row["latent"] == "z_0"
    assert row["same latent"] == 4
    assert row["share STAT1"] == pytest.approx(0.75)
    # three pairs of equal effects, three with cosine 3 / sqrt(10)
    assert row["mean cosine"] == pytest.approx((3 + 3 * 3 / 10**0.5) / 6)
    assert row["|CAV1| / |STAT1|"] == pytest.approx(0.1 / 10**0.5)


def test_gene_set_features_bring_partners_together() -> None:
    from experiments.papalexi_thp1 import knock_out_features

    sets = {"a": {"A", "B"}, "b": {"A", "B"}, "c": {"C"}, "d": {"A", "B", "C"}}
    r = knock_out_features(["A", "B", "C", "D"], sets)
    assert np.allclose(r.loc["A"], r.loc["B"])
    assert np.allclose(np.linalg.norm(r.loc[["A", "C"]], axis=1), 1)
    assert np.allclose(r.loc["D"], 0)
    assert r.loc["A"] @ r.loc["C"] < 0.5

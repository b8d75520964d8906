"""The comparison with other programs: what a child says becomes a table, and a peer that is absent is reported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.benchmarks import peer_models, peers
from experiments.benchmarks.peers import Comparison, Places, Program

PLACES = Places({"scvi": sys.executable}, {})
FAKE = """
import json, sys
job = json.loads(sys.argv[1])
option = job["options"].get("do", "")
if option == "crash":
    print("Traceback", file=sys.stderr)
    raise SystemExit("no such layer")
print("a program's own chatter")
speed = {"scvi": 100.0}.get(job["peer"], 300.0) * job["batch"]
measured = {"cells_per_second": speed, "wall_cells_per_second": speed, "peak_rss_mb": 50.0, "parameters": 7,
            "architecture": job["source"] or "none", "versions": {"torch": "2"}}
print(json.dumps({"missing": "No module named scvi"} if option == "missing" else measured))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "child.py"
    script.write_text(FAKE)
    monkeypatch.setattr(peers, "CHILD", script)
    return script


def result(speed: float, memory: float = 100.0) -> dict[str, object]:
    return {
        "cells_per_second": speed,
        "wall_cells_per_second": speed / 2,
        "peak_rss_mb": memory,
        "parameters": 3,
        "architecture": "small",
        "versions": {"torch": "2.0"},
    }


def test_table_holds_medians_and_ratios_to_the_peer() -> None:
    like = Program("like", peers.OURS, {"precision": "float32"})
    other = Program("other", peers.OURS, {"precision": "float32", "more": 1})
    comparison = Comparison("pair", Program("peer", "scvi"), (like, other), 1.3)
    found = {
        peers.key(comparison.peer): [result(10.0, 200.0), result(100.0, 200.0), result(120.0, 500.0)],
        peers.key(like): [result(20.0), result(140.0), result(150.0)],
        peers.key(other): [result(5.0), {"failed": "out of memory"}, result(60.0)],
    }
    table = pd.DataFrame(peers.rows([comparison], ["float32"], 64, found))
    assert table["program"].tolist() == ["peer", "like, float32", "other, float32"]
    assert table["cells_per_second"].tolist()[:2] == [100.0, 140.0]
    assert table["status"].tolist() == ["measured", "measured", "failed: out of memory"]
    assert table["wall_cells_per_second"].iloc[0] == 50.0
    assert table["speed_ratio"].tolist() == [1.0, 1.4, 0.5]
    assert table["memory_ratio"].tolist() == [1.0, 0.5, 0.35]
    assert table["target"].fillna(0).tolist() == [0, 1.3, 0]
    assert set(table["batch"]) == {64}


@pytest.mark.usefixtures("fake")
def test_child_is_given_a_job_and_answers_in_its_last_line() -> None:
    sizes = {"cells": 4, "batch": 2, "epochs": 1}
    assert peers.measure(Program("p", "scvi"), PLACES, **sizes)["cells_per_second"] == 200.0
    ours = peers.measure(Program("p", peers.OURS), Places({}, {}), **sizes)
    assert (ours["cells_per_second"], ours["architecture"]) == (600.0, str(peers.ROOT))


@pytest.mark.usefixtures("fake")
def test_absent_and_broken_peers_are_reported_not_raised() -> None:
    sizes = {"cells": 4, "batch": 2, "epochs": 1}

    def said(do: str, places: Places = PLACES) -> dict[str, object]:
        return peers.measure(Program("p", "scvi", {"do": do}), places, **sizes)

    assert said("missing") == {"missing": "No module named scvi"}
    assert said("crash") == {"failed": "no such layer"}
    assert said("", Places({}, {})) == {"missing": "no interpreter given: --python scvi=PATH"}
    assert "/no/such/python: No such file" in str(said("", Places({"scvi": "/no/such/python"}, {}))["missing"])


@pytest.mark.usefixtures("fake")
def test_nothing_is_measured_beside_an_absent_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    measure = peers.measure
    monkeypatch.setattr(peers, "measure", lambda p, *a, **k: asked.append(p.name) or measure(p, *a, **k))
    like = Program("like", peers.OURS)
    absent = Comparison("absent", Program("absent", "scvi", {"do": "missing"}), (like,))
    here = Comparison("here", Program("here", "scvi"), (like,))
    peers.rounds([absent, here, here], PLACES, ["float32"], 2, cells=4, batch=2, epochs=1)
    assert asked == ["absent", "here", "like", "here", "here", "like", "here"]


@pytest.mark.usefixtures("fake")
def test_main_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "peers.csv"
    words = ["--python", f"scvi={sys.executable}", "--rounds", "1", "--batches", "8", "--out", str(out)]
    assert peers.main(words) == 0
    table = pd.read_csv(out).set_index("program")
    assert (table.loc["vae, normal, float32", "speed_ratio"] == 3).all()
    assert table.loc["chemCPA", "status"] == "not installed: no interpreter given: --python chemcpa=PATH"
    assert "not installed" in capsys.readouterr().out
    for wrong in (["--python", "scvi"], ["--source", "nonsense=/x"], ["--peers", "nonsense"]):
        with pytest.raises(SystemExit):
            peers.main(wrong)


def test_every_program_sees_the_same_cells() -> None:
    job = {"seed": 3, "cells": 600, "options": {}}
    screens = [peer_models.screen({**job, "peer": name}) for name in ("scvi", "pyro_scm")]
    assert (screens[0].x == screens[1].x).all()
    assert (screens[0].drug == screens[1].drug).all()
    counts = peer_models.screen({**job, "options": {"counts": True}}).x
    assert (counts == counts.round()).all()
    assert (screens[0].x == np.log1p(counts)).all()
    assert set(screens[0].drug) == set(range(peer_models.DRUGS))


def test_clock_leaves_out_what_precedes_the_end_of_the_first_epoch() -> None:
    clock = peer_models.Clock([(5.0, 50.0), (6.0, 52.0), (8.5, 57.0)])
    layer = torch.nn.Linear(2, 3)
    layer.bias.requires_grad_(False)
    found = clock.training((layer,), "words", ("numpy",))
    assert (found.cpu, found.wall, found.parameters) == (3.5, 7.0, 6)


def test_peak_memory_remembers_what_was_freed() -> None:
    before = peer_models.peak_rss_mb()
    np.ones(int(before * 1e6 / 8) + 2**24)  # larger than all that was there
    assert peer_models.peak_rss_mb() > before + 100


def test_child_trains_this_suite_and_names_a_peer_that_cannot_be_imported() -> None:
    job = {"seed": 0, "cells": 256, "batch": 128, "epochs": 1, "latent": 2, "hidden": 4, "source": str(peers.ROOT)}
    ours = next(c for c in peers.COMPARISONS if c.peer.peer == "chemcpa").ours[0]

    def answer(**more: object) -> dict[str, object]:
        words = [sys.executable, str(peers.CHILD), json.dumps({**job, **more})]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        said: dict[str, object] = json.loads(done.stdout)
        return said

    trained = answer(peer=peers.OURS, options={**ours.options, "precision": "float32"})
    assert {"cells_per_second", "cpu_seconds", "peak_rss_mb", "versions", "architecture"} <= set(trained)
    assert float(str(trained["peak_rss_mb"])) > 50
    assert "No module named" in str(answer(peer="sams-vae", options={})["missing"])

"""The ablation at its smallest size, and its paired differences by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import ablation, launch


def table(values: dict[str, list[float]]) -> pd.DataFrame:
    """delta_r2 and nll of two members on each screen, whose mean is the value; the other metrics are 0."""
    return pd.DataFrame(
        [
            {
                "part": part,
                "screen": s,
                "member": m,
                "delta_r2": v + m - 0.5,
                "nll": v + m - 0.5,
                "gap": 0.0,
                "mcc_z": 0.0,
            }
            for part, own in values.items()
            for s, v in enumerate(own)
            for m in (0, 1)
        ]
    )


def test_one_command_prints_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, main = ablation.Ablation, ablation.main
    assert launch.launch(ablation.__file__, config, main, ["--preset", "smoke", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(f"{part} against the base" in shown for part in ablation.PARTS if part != "base")
    (folder,) = (tmp_path / "ablation").iterdir()
    scores = pd.read_csv(folder / "scores.csv", index_col=0)
    fitted = scores[scores["member"] >= 0]
    assert set(fitted["part"]) == set(ablation.PARTS)
    assert np.isfinite(fitted[list(ablation.METRICS)]).all().all()
    assert fitted["mcc_z"].between(0, 1).all()
    # each part changes the fit: no switch is without effect
    base = fitted[fitted["part"] == "base"]["nll"].to_numpy()
    for part in ablation.PARTS:
        same = np.array_equal(fitted[fitted["part"] == part]["nll"].to_numpy(), base)
        assert same == (part == "base"), part
    # what knows nothing of the environment predicts no change
    assert scores[scores["part"] == "no_change"]["delta_r2"].abs().max() < 0.2
    assert (folder / "differences.png").is_file()


def test_held_out_environments_are_not_in_training_and_cover_the_latents() -> None:
    adata, _, split = ablation.screen(ablation.Ablation.preset("smoke"), 0)
    assert not set(split.train.present) & set(split.test.present)
    targets = adata.uns["truth"]["targets"][sorted(split.test.present)]
    assert targets.sum(0).tolist() == [1, 1]


def test_differences_are_paired_over_screens() -> None:
    rng = np.random.default_rng(0)
    base = 10 * rng.normal(size=8)
    better, noise = base + 1 + 0.1 * rng.normal(size=8), base + 0.1 * rng.normal(size=8)
    values = {"base": list(base), "better": list(better), "noise": list(noise - np.mean(noise - base))}
    found = ablation.differences(table(values), "base")
    assert "base" not in found.index.get_level_values("part")
    assert found.loc[("better", "delta_r2"), "difference"] == pytest.approx(np.mean(better - base))
    assert found.loc[("better", "delta_r2"), "verdict"] == "better"
    assert found.loc[("better", "nll"), "verdict"] == "worse"  # a larger loss
    assert found.loc[("noise", "delta_r2"), "verdict"] == "not different"
    one = ablation.differences(table({"base": [1.0], "other": [3.0]}), "base")
    assert one.loc[("other", "delta_r2"), "difference"] == 2
    assert one.loc[("other", "delta_r2"), "verdict"] == "one screen"


def test_the_summary_keeps_screens_and_seeds_apart() -> None:
    found = ablation.summary(table({"base": [1.0, 3.0]})).loc["base"]
    assert found["delta_r2"] == 2
    assert found["delta_r2 sd screens"] == pytest.approx(2**0.5)
    assert found["delta_r2 sd seeds"] == pytest.approx(0.5**0.5)

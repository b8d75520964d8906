"""EC50 of simulated drug screens: hierarchical Hill curves, one curve at a time, and what the model's own curves say.

Cells of each drug at seven doses (half-log steps from 0.01 to 10 uM) and of controls; a drug moves its own few genes by
Emax a^h / (a^h + EC50^h), on top of variation that all cells share. Expression is read along each drug's predicted
change; `pyro_scm.dose_response` fits all curves together. EC50 is within the doses, h log-normal, Emax from a third to
twice the cells' standard deviation along the drug's direction. Wells, where they differ, add the same noise to all
cells of a dose.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import anndata
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import pyro_scm as ps
from experiments.launch import Results, launch
from pyro_scm import recipes
from pyro_scm.doses import DoseResponse, dose_response
from pyro_scm.hill import curve, fit_hill
from pyro_scm.threads import few_threads

DOSES = 10 ** np.arange(-2, 1.01, 0.5)
POOLED, ALONE, MODEL = "all curves together", "one curve at a time", "half of the model's curve"
KNOWN = "all curves together, true directions"


@dataclass(frozen=True)
class DoseCurves:
    """Sizes."""

    drugs: int = 20
    cells: int = 200
    genes: int = 50
    wells: tuple[float, ...] = (0.0, 0.2)
    members: int = 3
    epochs: int = 30
    level: float = 0.9
    seeds: tuple[int, ...] = tuple(range(10))

    @classmethod
    def preset(cls, name: str) -> "DoseCurves":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return DoseCurves(drugs=5, cells=200, genes=20, wells=(0.0,), members=2, epochs=40, seeds=(0,))
        return DoseCurves() if name == "paper" else DoseCurves(seeds=(0, 1))


def simulated(config: DoseCurves, wells: float, seed: int) -> tuple[anndata.AnnData, pd.DataFrame, np.ndarray]:
    """Cells of a screen, EC50 and slope of its drugs, and their directions ``[drugs, G]``."""
    rng = np.random.default_rng([seed, 7])
    names = [f"drug_{m:02d}" for m in range(config.drugs)]
    truth = pd.DataFrame({"log_ec50": rng.uniform(-1.5, 0.5, config.drugs)}, index=pd.Index(names, name="drug"))
    truth["slope"] = np.exp(0.3 * rng.normal(size=config.drugs))
    truth["emax"] = rng.uniform(0.5, 3.0, config.drugs)
    shared = rng.normal(size=(4, config.genes)) / np.sqrt(config.genes) * 2
    rows, x, directions = [], [], []
    for name in ("DMSO", *names):
        direction = np.where(np.arange(config.genes) < 5, rng.normal(size=config.genes), 0)
        direction = rng.permutation(direction / np.linalg.norm(direction))
        directions.append(direction)
        for dose in (0.0,) if name == "DMSO" else DOSES:
            own = truth.loc[name] if dose else None
            rise = (
                0.0
                if own is None
                else dose ** own["slope"] / (dose ** own["slope"] + 10 ** (own["log_ec50"] * own["slope"]))
            )
            size = 0.0 if own is None else own["emax"] * rise + wells * rng.normal()
            z = rng.normal(size=(config.cells, 4))
            x.append(z @ shared + size * direction + rng.normal(size=(config.cells, config.genes)))
            rows += [(name, dose)] * config.cells
    obs = pd.DataFrame(rows, columns=["drug", "dose"], index=[f"cell_{i}" for i in range(len(rows))])
    var = pd.DataFrame(index=[f"g{i}" for i in range(config.genes)])
    return anndata.AnnData(np.concatenate(x).astype(np.float32), obs, var), truth, np.array(directions[1:])


def asked(adata: anndata.AnnData, config: DoseCurves, seed: int) -> DoseResponse:
    """Curves of a CPA ensemble and of the points."""
    cells = ps.EnvironmentDataset.from_anndata(
        adata, environment="drug", control="DMSO", dose="dose", representation="multi-dose"
    )
    options = {"latent": config.drugs + 4, "hidden": (), "guide_hidden": (64,), "doser": "hill"}
    model, guide = recipes.make("cpa", cells.schema, **options)
    seeds = tuple(range(100 * seed, 100 * seed + config.members))
    with few_threads():
        run = ps.fit(model, guide, cells, seeds=seeds, epochs=config.epochs, lr=0.01, batch_size=512, progress=False)
        return dose_response(run, cells, level=config.level, seed=seed)


def along(adata: anndata.AnnData, truth: pd.DataFrame, directions: np.ndarray) -> pd.DataFrame:
    """Points as `dose_response` makes them, along the true directions."""
    rows = []
    x, drugs, doses = np.asarray(adata.X), adata.obs["drug"].to_numpy(), adata.obs["dose"].to_numpy()
    for name, direction in zip(truth.index, directions, strict=True):
        for dose in (0.0, *DOSES):
            y = x[(drugs == (name if dose else "DMSO")) & (doses == dose)] @ direction
            rows.append((name, dose, y.mean(), y.std(ddof=1) / np.sqrt(len(y))))
    return pd.DataFrame(rows, columns=["perturbation", "dose", "mean", "error"])


def alone(points: pd.DataFrame) -> dict[str, float]:
    """log10 EC50 of each drug by weighted least squares on its own points."""
    import warnings

    import torch
    from scipy.optimize import OptimizeWarning, curve_fit

    def hill(dose: np.ndarray, emax: float, log_ec50: float, log_slope: float) -> np.ndarray:
        slope = torch.tensor(np.exp(np.clip(log_slope, -3, 3)))
        return emax * curve(torch.as_tensor(dose), torch.tensor(log_ec50), slope).numpy()

    found = {}
    for name, own in points.groupby("perturbation"):
        dose, mean, error = (own[c].to_numpy(np.float64) for c in ("dose", "mean", "error"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            try:
                start = [mean[-1], -0.5, 0.0]
                found[str(name)] = float(curve_fit(hill, dose, mean, start, sigma=error, maxfev=5000)[0][1])
            except RuntimeError:  # it did not converge
                found[str(name)] = float("nan")
    return found


def measured(config: DoseCurves) -> Iterator[pd.DataFrame]:
    """One row a drug and method."""
    for wells in config.wells:
        for seed in config.seeds:
            adata, truth, directions = simulated(config, wells, seed)
            found = asked(adata, config, seed)
            table = found.table().loc[truth.index]
            by_one = alone(found.points)
            known = fit_hill(along(adata, truth, directions), seed=seed).summary(config.level).loc[truth.index]
            said = {
                POOLED: (table["log_ec50"], table["log_ec50_low"], table["log_ec50_high"]),
                KNOWN: (known["log_ec50"], known["log_ec50_low"], known["log_ec50_high"]),
                MODEL: tuple(np.log10(table[c]) for c in ("half", "half_low", "half_high")),
                ALONE: (pd.Series(by_one).reindex(truth.index), np.nan, np.nan),
            }
            for method, (value, low, high) in said.items():
                own = pd.DataFrame({"wells": wells, "seed": seed, "drug": truth.index, "method": method})
                own["true"], own["emax"] = truth["log_ec50"].to_numpy(), truth["emax"].to_numpy()
                own["found"] = np.asarray(value, np.float64)
                own["low"], own["high"] = (np.asarray(v, np.float64) * np.ones(len(own)) for v in (low, high))
                own["error"] = (own["found"] - own["true"]).abs()
                own["inside"] = np.where(
                    own["low"].notna(), (own["low"] <= own["true"]) & (own["true"] <= own["high"]), np.nan
                )
                yield own


def main(config: DoseCurves) -> Results:
    """Fit, and measure errors and coverage."""
    drugs = pd.concat(list(measured(config)), ignore_index=True)
    by_seed = drugs.groupby(["wells", "method", "seed"])
    seeds = pd.DataFrame(
        {
            "median error": by_seed["error"].median(),
            "90 % error": by_seed["error"].quantile(0.9),
            "coverage": by_seed["inside"].mean(),
            "width": (drugs["high"] - drugs["low"]).groupby([drugs[c] for c in ("wells", "method", "seed")]).median(),
        }
    )
    summary = seeds.groupby(["wells", "method"]).agg(["mean", "min", "max"])
    summary.columns = [f"{a}, {b}" for a, b in summary.columns]
    summary["seeds"] = seeds.groupby(["wells", "method"]).size()
    best = summary.xs(POOLED, level="method")["median error, mean"]
    text = "Median |error| of log10 EC50 over drugs, mean over screens: " + "; ".join(
        f"{value:.3f} with wells of sd {wells:g}" for wells, value in best.items()
    )
    return Results({"drugs": drugs, "seeds": seeds, "summary": summary}, {"ec50": figure(drugs)}, text)


def figure(drugs: pd.DataFrame) -> Figure:
    """Found against true EC50, with intervals."""
    levels = sorted(drugs["wells"].unique())
    drawn = Figure(figsize=(4.2 * len(levels), 4), layout="constrained")
    for axes, wells in zip(drawn.subplots(1, len(levels), squeeze=False)[0], levels, strict=True):
        own = drugs[(drugs["wells"] == wells) & (drugs["method"] == POOLED)]
        gaps = [own["found"] - own["low"], own["high"] - own["found"]]
        axes.errorbar(own["true"], own["found"], gaps, fmt="o", markersize=3, linewidth=0.5, color="#1f5fa8")
        axes.plot([-1.6, 0.6], [-1.6, 0.6], color="#6e7781", linewidth=0.8)
        axes.set(xlabel="true log10 EC50", ylabel="found, with its interval", title=f"wells of sd {wells:g}")
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, DoseCurves, main))

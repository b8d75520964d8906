"""Adversarial Prior autoencoder (seed section 4.10): does attention find what moves, and what is then z_count?

Screens of four latents, one of them moved in each of four environments beside a control; linear decoder.

Attention: share of environments whose attended learnt latent is the one that was moved, after learnt latents are
matched one to one to true ones by correlation (chance: one in four). Options are tried one at a time. A fit may be
repeated from other initial values; the restart that is kept is the one whose adversary knows least at the end of the
training, which needs no truth.

Probe: a classifier trained on some cells and scored on others (balanced accuracy), on the code z and on z_count.

Counterfactuals: cells decoded from z_count beside the same cells in the true model, whose noise is known, under (i) the
noise intervention that draws the target's noise anew from N(0, 1), with the code's own draw or another, and (ii)
abduction, action, prediction: the same cell, its noise kept, without its environment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pyro import distributions as dist

import pyro_scm as ps
from experiments.launch import Results, launch
from pyro_scm import metrics, recipes
from pyro_scm.attention import counterfactual_code
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.effects import attention
from pyro_scm.objectives import adversarial_prior
from pyro_scm.run import Run

Array = NDArray[Any]

NAME, GENES, CRITIC_STEPS = "adversarial_prior_ae", 20, 5
LAST = 10  # epochs over which the adversary's loss is averaged


@dataclass(frozen=True)
class Variant:
    """How a fit differs from the base: a guide of x, weight 2, 5 critic steps, T = 1, a classifier, shifts of 5 sd."""

    inputs: tuple[str, ...] = ("x",)
    weight: float = 2.0
    temperature: float | tuple[float, float] = 1.0
    target: str = "env"
    variational: bool = False
    strength: float = 5.0
    longer: int = 1


VARIANTS = {
    "base": Variant(),
    "guide of x and e": Variant(inputs=("x", "e")),
    "twice as long": Variant(longer=2),
    "weight 8": Variant(weight=8.0),
    "T = 0.3": Variant(temperature=0.3),
    "T from 1 to 0.1": Variant(temperature=(1.0, 0.1)),
    "variational": Variant(variational=True),
    "shifts of 10 sd": Variant(strength=10.0),
    "regression adversary": Variant(target="r"),
}


@dataclass(frozen=True)
class AdversarialPrior:
    """Sizes.

    Args:
        screens: each with targets, signs and decoder of its own.
        seeds: of each screen; a result is a pair of screen and seed.
        restarts: of each seed.
        cells: in each environment.
        epochs: of training.
        latent: d, and d environments beside the control.
        variants: names in VARIANTS.
        variant_screens: screens of those that are not examined, with one seed each.
        examined: the variant whose codes are probed and decoded.
        permutations: of the probe's level of chance.
    """

    screens: int = 2
    seeds: int = 1
    restarts: int = 10
    cells: int = 200
    epochs: int = 150
    latent: int = 4
    variants: tuple[str, ...] = ("T = 0.3",)
    variant_screens: int = 2
    examined: str = "T = 0.3"
    permutations: int = 3

    @classmethod
    def preset(cls, name: str) -> "AdversarialPrior":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(screens=1, seeds=1, restarts=2, cells=80, epochs=60, latent=2, permutations=2)
        return cls(screens=5, seeds=2, variants=tuple(VARIANTS)) if name == "paper" else cls()


# ---------------------------------------------------------------------- one screen
@dataclass(frozen=True)
class Fit:
    """Members of one variant on one screen.

    Args:
        adata: the screen.
        cells: its cells.
        run: the members.
        z: ``[K, n, d]`` codes.
        alpha: ``[K, E, d]`` attention.
        hidden: ``[K]`` loss of the adversary, in nats per cell: the larger, the better environments are hidden.
    """

    adata: AnnData
    cells: EnvironmentDataset
    run: Run
    z: Array
    alpha: Array
    hidden: Array
    matchings: list[metrics.Matching] = field(default_factory=list)

    def hits(self, k: int) -> Array:
        """Which of the environments attend to the latent that they move, the control left out."""
        targets = self.adata.uns["truth"]["targets"][1:].argmax(1)
        found: Array = self.matchings[k].permutation[targets] == self.alpha[k, 1:].argmax(1)
        return found


def train(config: AdversarialPrior, variant: Variant, screen: int, members: int) -> Fit:
    """A screen and an ensemble on it."""
    adata = synthetic.simulate(
        latent=config.latent, genes=GENES, environments=config.latent + 1, cells=config.cells, graph="empty",
        decoder="linear", strength=variant.strength, constant=True, seed=screen,
    )  # fmt: skip
    cells = synthetic.dataset(adata)
    law = {"prior": "standard", "family": "normal"} if variant.variational else {}
    model, guide = recipes.make(
        NAME, cells.schema, latent=config.latent, hidden=(), environment_hidden=(), guide_hidden=(32,),
        inputs=variant.inputs, **law,
    )  # fmt: skip
    objective = adversarial_prior(model, cells, hidden=(32,), target=variant.target, weight=variant.weight)
    run = ps.fit(
        model, guide, cells, objective=objective, seeds=range(members), epochs=config.epochs * variant.longer,
        batch_size=250, lr=5e-3, critic_steps=CRITIC_STEPS, temperature=variant.temperature, progress=False,
    )  # fmt: skip
    z = ps.embed(run, cells)["z"]
    recent = run.history[run.history["epoch"] > run.history["epoch"].max() - LAST]
    return Fit(
        adata=adata,
        cells=cells,
        run=run,
        z=z,
        alpha=attention(run).to_numpy().reshape(members, config.latent + 1, config.latent),
        hidden=-recent.groupby("member")["adversary"].mean().to_numpy() / variant.weight,
        matchings=[metrics.mcc(adata.obsm["z"], own) for own in z],
    )


def chosen(hidden: Array, restarts: int) -> list[int]:
    """Of each group of so many members, the one whose adversary has the largest loss."""
    groups = np.asarray(hidden).reshape(-1, restarts)
    return [int(g * restarts + k) for g, k in enumerate(groups.argmax(1))]


def found(fit: Fit, restarts: int) -> list[dict[str, Any]]:
    """Top-1 of every member by itself, and of the one of each group that is kept."""
    members = [("single", k) for k in range(len(fit.hidden))]
    members += [("restarts", k) for k in chosen(fit.hidden, restarts)]
    return [
        {
            "seed": k // restarts,
            "choice": choice,
            "member": k,
            "top-1": float(fit.hits(k).mean()),
            "mcc": fit.matchings[k].score,
            "largest attention": float(fit.alpha[k, 1:].max(1).mean()),
            "adversary's loss": float(fit.hidden[k]),
        }
        for choice, k in members
    ]


# ---------------------------------------------------------------------- codes of one member
def probes(fit: Fit, k: int, permutations: int, seed: int) -> list[dict[str, Any]]:
    """Balanced accuracy of both probes on z and z_count, beside chance."""
    alpha = torch.as_tensor(fit.alpha[k][fit.cells.env])
    z = torch.as_tensor(fit.z[k]).to(alpha)
    epsilon = torch.as_tensor(np.random.default_rng(seed).normal(size=z.shape)).to(alpha)
    codes = {"z": z, "z_count": counterfactual_code(z, epsilon, alpha)}
    rows = []
    for name, code in codes.items():
        for kind in ("linear", "network"):
            probe = metrics.environment_probe(
                code.numpy(), fit.cells.env, kind=kind, permutations=permutations, seed=seed
            )  # type: ignore[arg-type]
            rows.append({"code": name, "probe": kind, "accuracy": probe.accuracy, "chance": probe.chance})
    return rows


def counterfactuals(fit: Fit, k: int, seed: int) -> list[dict[str, Any]]:
    """Distances of decoded codes to the true counterfactuals, of each environment but the control.

    All expression is E[x | c]. Distances between distributions are unbiased: 0 on average for equal ones.
    """
    model, _ = fit.run.member(k)
    rng, rows, hits = np.random.default_rng(seed), [], fit.hits(k)
    control = fit.z[k][fit.cells.env == 0]
    for e, name in enumerate(fit.adata.obs["perturbation"].cat.categories):
        if e == 0:
            continue
        own = np.flatnonzero(fit.cells.env == e)
        some = fit.cells.subset(own)
        target = int(fit.adata.uns["truth"]["targets"][e].argmax())
        attended = int(fit.alpha[k, e].argmax())
        z, epsilon = fit.z[k][own], rng.normal(size=(len(own), fit.z.shape[-1])).astype(np.float32)
        hard = np.eye(z.shape[1], dtype=np.float32)[attended]
        without = z - hard * (z.mean(0) - control.mean(0))
        codes = {
            "z (nothing done)": z,
            "z_count": _code(z, epsilon, fit.alpha[k, e].astype(np.float32)),
            "z_count, all attention on one": _code(z, epsilon, hard),
            "z, attended latent less its shift": without,
        }
        sign = fit.matchings[k].sign[target] or 1
        true = worlds(fit.adata, some, target, sign * epsilon[:, attended], seed + e)
        with torch.no_grad():
            decoded = {n: model.likelihoods[0].mean(torch.as_tensor(c), some.batch()).numpy() for n, c in codes.items()}
        decoded |= {"true (i)": true["same"], "true (ii)": true["abducted"]}
        bandwidth = [metrics.median_bandwidth(true["other"])]
        for label, x in decoded.items():
            rows.append(
                {
                    "environment": str(name),
                    "attention": "right" if hits[e - 1] else "wrong",
                    "cells from": label,
                    "rmse (i), same draw": _rmse(x, true["same"]),
                    "rmse (i), other draw": _rmse(x, true["other"]),
                    "rmse (ii)": _rmse(x, true["abducted"]),
                    "energy (i)": metrics.energy_distance(true["other"], x, unbiased=True),
                    "energy (ii)": metrics.energy_distance(true["abducted"], x, unbiased=True),
                    "mmd (i)": metrics.mmd(true["other"], x, bandwidth, unbiased=True),
                    "mmd (ii)": metrics.mmd(true["abducted"], x, bandwidth, unbiased=True),
                }
            )
    return rows


def worlds(adata: AnnData, cells: EnvironmentDataset, target: int, draw: Array, seed: int) -> dict[str, Array]:
    """E[x | c] ``[n, G]`` of cells in the true model.

    Args:
        adata: the screen, of a graph without edges: c_j = z_j.
        cells: some of it.
        target: j, what their environment moves.
        draw: ``[n]`` noise that takes the place of z_j.
        seed: of another draw.

    Returns:
        ``same``: noise intervention with this draw; ``other``: with another; ``abducted``: their own noise in the
        control environment.
    """
    truth = synthetic.known(adata, cells)
    site = truth[0].sites[target]
    same = ps.counterfactual(truth, cells, do={site: torch.as_tensor(draw)}).x[0, 0]
    other = ps.counterfactual(truth, cells, noise={site: dist.Normal(0.0, 1.0)}, seed=seed).x[0, 0]
    abducted = ps.counterfactual(truth, cells, environment=synthetic.CONTROL).x[0, 0]
    return {"same": same, "other": other, "abducted": abducted}


def _code(z: Array, epsilon: Array, alpha: Array) -> Array:
    value: Array = counterfactual_code(
        torch.tensor(z), torch.tensor(epsilon), torch.tensor(alpha).expand(z.shape)
    ).numpy()
    return value


def _rmse(x: Array, y: Array) -> float:
    return float(np.sqrt(np.mean((x - y) ** 2)))


# ---------------------------------------------------------------------- the experiment
def main(config: AdversarialPrior) -> Results:
    tops: list[dict[str, Any]] = []
    probed: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    for name in dict.fromkeys((config.examined, *config.variants)):
        for screen in range(config.screens if name == config.examined else config.variant_screens):
            seeds = config.seeds if name == config.examined else 1
            fit = train(config, VARIANTS[name], screen, seeds * config.restarts)
            tops += [{"variant": name, "screen": screen, **row} for row in found(fit, config.restarts)]
            if name != config.examined:
                continue
            for seed, k in enumerate(chosen(fit.hidden, config.restarts)):
                label = {"screen": screen, "seed": seed}
                probed += [{**label, **row} for row in probes(fit, k, config.permutations, seed)]
                compared += [{**label, **row} for row in counterfactuals(fit, k, seed)]
        print(f"{name}: {_mean(tops, name):.2f}", flush=True)
    fits, probe_rows, counts = pd.DataFrame(tops), pd.DataFrame(probed), pd.DataFrame(compared)
    by_probe = probe_rows.groupby(["code", "probe"], sort=False)[["accuracy", "chance"]]
    probe_table = by_probe.agg(["mean", "std", "min", "max"])
    probe_table.columns = [" ".join(c) for c in probe_table.columns]
    numbers = [c for c in counts.columns if c.split()[0] in ("rmse", "energy", "mmd")]
    by_code = counts.groupby(["attention", "cells from"], sort=False)[numbers].mean()
    counted = counts.groupby(["attention", "cells from"], sort=False).size()
    table = by_code.assign(environments=counted)
    summary = attention_table(fits)
    return Results(
        tables={
            "attention": summary,
            "probe": probe_table,
            "counterfactuals": table,
            "fits": fits,
            "probes": probe_rows,
            "counterfactuals_each": counts,
        },
        figures={"attention": figure(fits)},
        text=sentence(summary, config.examined),
    )


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([r["top-1"] for r in rows if r["variant"] == name and r["choice"] == "restarts"]))


def attention_table(fits: pd.DataFrame) -> pd.DataFrame:
    """Top-1 of each variant, of all members by themselves and of those kept: mean, spread and range."""
    grouped = fits.groupby(["variant", "choice"], sort=False)
    table: pd.DataFrame = grouped["top-1"].agg(mean="mean", sd="std", smallest="min", largest="max", results="size")
    others = grouped[["mcc", "largest attention", "adversary's loss"]].mean()
    result: pd.DataFrame = table.join(others).assign(**{"top-1 >= 0.9": table["mean"] >= 0.9})
    return result


def sentence(summary: pd.DataFrame, examined: str) -> str:
    """The numbers that the goal asks for."""
    rows: dict[Any, Any] = summary.to_dict("index")
    single, kept = rows[(examined, "single")], rows[(examined, "restarts")]
    best = max(rows, key=lambda key: rows[key]["mean"])
    return (
        f"Attended latent is the moved one, {examined}: {single['mean']:.2f} of environments in single fits, "
        f"{kept['mean']:.2f} (sd {kept['sd']:.2f}) with restarts chosen without the truth. Best of those tried: "
        f"{best[0]}, {best[1]}, {rows[best]['mean']:.2f}."
    )


def figure(fits: pd.DataFrame) -> Figure:
    """Top-1 of every result, and the adversary's loss against it."""
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    names = list(fits["variant"].unique())
    for offset, (choice, part) in enumerate(fits.groupby("choice", sort=False)):
        place = part["variant"].map(names.index) + 0.25 * offset
        left.plot(part["top-1"] + np.linspace(-0.02, 0.02, len(part)), place, ".", alpha=0.6, label=str(choice))
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("top-1 of the attention")
    left.legend()
    classifier = fits[fits["variant"] != "regression adversary"]
    right.plot(classifier["adversary's loss"], classifier["top-1"], ".", alpha=0.5)
    right.set(xlabel="adversary's loss, nats per cell", ylabel="top-1")
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, AdversarialPrior, main))

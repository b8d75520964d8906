"""What each part of the method is worth on unseen environments: adversary, sparsity, graph, FiLM and IRM, on and off.

Synthetic screens in which every latent is moved by some training environments and by held-out ones, known by noisy
descriptors; a graph of linear equations between the latents. The base is the Translation VAE with a sparse shift. Each
row changes one part of it:

- no sparsity: a dense shift instead of the sparse softmax;
- adversary: a critic must not read the environment from z;
- graph: a layered linear causal layer (structured Translation VAE);
- FiLM: the encoder is conditioned by FiLM instead of by concatenation;
- IRM: the penalty on the decoder, at two weights.

One command prints the table: means over screens and seeds, and paired differences to the base (of screens, whose seeds
are averaged, with bootstrap intervals).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import pyro_scm as ps
from experiments.launch import Results, launch
from pyro_scm import evaluation, metrics, recipes
from pyro_scm.data import splits, synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp
from pyro_scm.objectives import IRM, Adversary, Objective

METRICS = {"delta_r2": 1.0, "nll": -1.0, "gap": -1.0, "mcc_z": 1.0}
"""Name -> 1 where larger is better."""


@dataclass(frozen=True)
class Part:
    """What a row changes.

    Args:
        name: of the recipe.
        options: of the recipe.
        penalty: (model, cells) -> penalties by name.
    """

    name: str = "translation_vae"
    options: tuple[tuple[str, Any], ...] = ()
    penalty: Callable[[LatentModel, EnvironmentDataset], dict[str, Any]] | None = None


def _adversary(model: LatentModel, cells: EnvironmentDataset) -> dict[str, Any]:
    return {"adversary": Adversary(mlp(model.latent, (32,), len(cells.environments)), weight=1.0)}


def _irm(weight: float) -> Callable[[LatentModel, EnvironmentDataset], dict[str, Any]]:
    return lambda model, cells: {"irm": IRM(weight, warmup=0.3)}


PARTS = {
    "base": Part(),
    "no sparsity": Part(options=(("sparsity", "dense"),)),
    "adversary": Part(penalty=_adversary),
    "graph": Part("structured_translation_vae"),
    "FiLM": Part(options=(("conditioning", "film"),)),
    "IRM, weight 0.01": Part(penalty=_irm(0.01)),
    "IRM, weight 1": Part(penalty=_irm(1.0)),
}


@dataclass(frozen=True)
class Ablation:
    """Sizes.

    Args:
        screens: with graph, decoder and shifts of their own.
        members: seeds of each model on each screen, an ensemble.
        latent: of the screens and the models.
        cells: in each environment.
        epochs: of training.
        hidden: units of encoder and decoder.
        parts: names in PARTS, the first of which the others are compared to.
    """

    screens: int = 3
    members: int = 5
    latent: int = 4
    cells: int = 60
    epochs: int = 40
    hidden: int = 32
    parts: tuple[str, ...] = tuple(PARTS)

    @classmethod
    def preset(cls, name: str) -> "Ablation":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(screens=1, members=2, latent=2, cells=40, epochs=3, hidden=8)
        return cls(screens=10) if name == "paper" else cls()


def screen(config: Ablation, number: int) -> tuple[Any, EnvironmentDataset, splits.Split]:
    """Five environments a latent beside the control; the last ones, one a latent, are held out."""
    adata = synthetic.simulate(
        latent=config.latent, genes=6 * config.latent, environments=5 * config.latent + 1, cells=config.cells,
        graph="multi-growing", noise=0.3, strength=3.0, descriptors=3 * config.latent, descriptor_noise=0.05,
        seed=number,
    )  # fmt: skip
    cells = synthetic.dataset(adata, "descriptors")
    names = [str(n) for n in adata.obs["perturbation"].cat.categories]
    return adata, cells, splits.by_environment(cells, held_out=names[-config.latent :])


def fit(config: Ablation, part: Part, cells: EnvironmentDataset) -> Any:
    """An ensemble of the model with one part changed."""
    model, guide = recipes.make(
        part.name, cells.schema, latent=config.latent, hidden=(config.hidden,), environment_hidden=(config.hidden,),
        guide_hidden=(config.hidden,), **dict(part.options),
    )  # fmt: skip
    penalties = {} if part.penalty is None else part.penalty(model, cells)
    return ps.fit(
        model, guide, cells, objective=Objective(penalties=penalties), seeds=range(config.members), lr=1e-2,
        schedule="cosine", epochs=config.epochs, batch_size=256, progress=False,
    )  # fmt: skip


def scores(config: Ablation, number: int) -> list[dict[str, Any]]:
    """One row a part and member: prediction of held-out environments, their loss, its gap to training, latents."""
    adata, cells, split = screen(config, number)
    order = np.random.default_rng(number).permutation(len(split.train))
    inside, train = (split.train.subset(np.sort(rows)) for rows in np.split(order, [len(order) // 5]))
    held_out = replace(split, train=train)
    runs = {name: fit(config, PARTS[name], train) for name in config.parts}
    compared = evaluation.evaluate(runs, held_out, baselines=("no_change", "ridge"), degs=0).scores
    means = compared.groupby(["model", "kind", "seed", "metric"], sort=False)["value"].mean().unstack("metric")
    baselines = means.xs("baseline", level="kind")
    rows = [
        {"screen": number, "part": str(name), "member": -1, "delta_r2": float(row["delta_r2"])}
        for (name, _), row in baselines.iterrows()
    ]
    for name, run in runs.items():
        found = evaluation.recovery(run, cells, adata).set_index("seed")
        for k, seed in enumerate(run.seeds):
            own = means.loc[(name, "model", seed)]
            seen = loss(*run.member(k), inside)
            rows.append(
                {
                    "screen": number,
                    "part": name,
                    "member": seed,
                    "delta_r2": float(own["delta_r2"]),
                    "nll": float(own["nll"]),
                    "gap": float(own["nll"]) - seen,
                    "mcc_z": float(found["mcc_z"].loc[seed]),
                }
            )
    return rows


def loss(model: Any, guide: Any, cells: EnvironmentDataset) -> float:
    """-ELBO in nats per cell of unseen cells of training environments, mean over environments."""
    each = []
    for e in cells.present:
        batch = cells.subset(np.flatnonzero(cells.env == e)).batch()
        torch.manual_seed(0)
        with torch.no_grad():
            each.append(float(Objective().terms(Objective().world(model, guide, batch)).loss()) / len(batch))
    return float(np.mean(each))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation over screens (of means of seeds) and over seeds (of one screen)."""
    rows = {}
    for name, own in table.groupby("part", sort=False):
        by_screen = own.groupby("screen")
        rows[name] = {
            key: value
            for metric in METRICS
            for key, value in {
                metric: by_screen[metric].mean().mean(),
                f"{metric} sd screens": by_screen[metric].mean().std(),
                f"{metric} sd seeds": float(np.sqrt((by_screen[metric].std() ** 2).mean())),
            }.items()
        }
    return pd.DataFrame(rows).T.rename_axis("part")


def differences(table: pd.DataFrame, base: str) -> pd.DataFrame:
    """Each part minus the base in pairs of screens, seeds averaged; interval of the mean and what it says."""
    means = table[table["member"] >= 0].groupby(["part", "screen"], sort=False)[list(METRICS)].mean()
    rows = []
    for name in means.index.unique("part"):
        if name == base:
            continue
        for metric, sign in METRICS.items():
            one, other = means.loc[name, metric].align(means.loc[base, metric])
            if len(one) < 2:
                found = (float(one.iloc[0] - other.iloc[0]), float("nan"), float("nan"))
            else:
                pair = metrics.paired_difference(one, other, seed=0)
                found = (pair.estimate, pair.lower, pair.upper)
            verdict = "not different" if len(one) > 1 else "one screen"
            if found[1] > 0 or found[2] < 0:
                verdict = "better" if sign * found[0] > 0 else "worse"
            rows.append(
                {"part": name, "metric": metric, "difference": found[0], "low": found[1], "high": found[2],
                 "screens": len(one), "verdict": verdict}
            )  # fmt: skip
    return pd.DataFrame(rows).set_index(["part", "metric"])


def main(config: Ablation) -> Results:
    rows: list[dict[str, Any]] = []
    for number in range(config.screens):
        rows += scores(config, number)
        print(f"screen {number + 1} of {config.screens}", flush=True)
    table = pd.DataFrame(rows)
    paired = differences(table, config.parts[0])
    return Results(
        tables={"summary": summary(table), "differences": paired, "scores": table},
        figures={"differences": figure(paired)},
        text=sentence(paired),
    )


def sentence(paired: pd.DataFrame) -> str:
    """Which parts help and which harm."""
    lines = []
    for part, own in paired.groupby(level=0, sort=False):
        said = [
            f"{metric} {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] ({row['verdict']})"
            for (_, metric), row in own.iterrows()
        ]
        lines.append(f"{part} against the base: " + ", ".join(said))
    return "\n".join(lines)


def figure(paired: pd.DataFrame) -> Figure:
    """Paired differences with their intervals."""
    drawn = Figure(figsize=(2.6 * len(METRICS), 2.8), layout="constrained")
    axes = np.ravel(drawn.subplots(1, len(METRICS), sharey=True))
    for axis, metric in zip(axes, METRICS, strict=True):
        own = paired.xs(metric, level="metric")
        place = np.arange(len(own))
        axis.hlines(place, own["low"], own["high"], color="C0")
        axis.plot(own["difference"], place, "o", color="C0")
        axis.axvline(0, color="0.7", lw=1)
        axis.set_yticks(place, list(own.index))
        axis.set_xlabel(f"{metric}, difference to the base")
    axes[0].invert_yaxis()
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Ablation, main))

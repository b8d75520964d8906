"""Is what the posterior says of its own error true? Guides against exact posteriors, and intervals against the truth.

1. A linear decoder, Gaussian noise, the generating parameters given: the posterior of z is known in closed form. Only
   the guide is trained, and compared with it: its means (in posterior standard deviations), its scales, and by
   simulation-based calibration. With orthogonal columns of the decoder the posterior has independent latents, which is
   what the guide can be; with random columns it has not, and the checks have to say so.
2. A screen with known counterfactuals: models are fitted, and control cells asked what they would have been in other
   environments. How often do 50, 80 and 95 % intervals of expression hold the true counterfactual: of environments that
   were seen and of ones that were not, of single members and of all together; and intervals of expected expression,
   without the noise of measurement.
"""

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import pyro_scm as ps
from experiments.launch import Results, launch
from guides import amortise
from pyro_scm import criticism
from pyro_scm.chance import forked
from pyro_scm.criticism.ranks import distances
from pyro_scm.data import splits, synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.model import LatentModel
from pyro_scm.posterior import to_arviz
from pyro_scm.query import isolated
from pyro_scm.threads import few_threads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

DECODERS = ("orthogonal", "random")
OBSERVATIONS = ("gaussian", "negative-binomial")
LEVELS = criticism.LEVELS


@dataclass(frozen=True)
class Calibration:
    """Sizes of the experiment.

    Args:
        seeds: guides of each known posterior, members of each fitted model.
        screens: of each kind of observation.
        observations: kinds.
        latent: of all screens.
        genes: of all screens.
        cells: in each environment.
        environments: of the fitted screens.
        guide_epochs: of training against a known posterior.
        epochs: of training a model.
        draws: of each cell's posterior.
        simulated: cells for simulation-based calibration.
    """

    seeds: int = 3
    screens: int = 1
    observations: tuple[str, ...] = OBSERVATIONS
    latent: int = 4
    genes: int = 30
    cells: int = 60
    environments: int = 25
    guide_epochs: int = 300
    epochs: int = 100
    draws: int = 100
    simulated: int = 1000

    @classmethod
    def preset(cls, name: str) -> "Calibration":
        """Sizes of a preset."""
        if name == "smoke":
            return cls(
                seeds=2, observations=("gaussian",), genes=12, cells=30, environments=9, guide_epochs=40, epochs=15,
                draws=40, simulated=200,
            )  # fmt: skip
        return cls(seeds=10, screens=3, epochs=150) if name == "paper" else cls()


# ---------------------------------------------------------------------- a posterior that is known
def known_screen(decoder: str, config: Calibration) -> tuple[LatentModel, EnvironmentDataset]:
    """A linear-Gaussian model and cells that it made; posterior standard deviations of about a half.

    Args:
        decoder: ``"orthogonal"`` or ``"random"``.
        config: sizes.
    """
    adata = synthetic.simulate(
        latent=config.latent, genes=config.genes, environments=1 + config.latent, cells=4 * config.cells,
        graph="empty", decoder="linear", noise=1.0, strength=2.0, seed=11,
    )  # fmt: skip
    model: Any = synthetic.truth(adata)
    weight = np.random.default_rng(11).normal(size=(config.genes, config.latent))
    if decoder == "orthogonal":
        weight = np.linalg.qr(weight)[0]
    else:
        weight[:, 1] = weight[:, 0] + 0.7 * weight[:, 1]  # two latents that act alike
    weight *= 1.8 / np.linalg.norm(weight, axis=0)
    with torch.no_grad():
        model.likelihoods[0].net.weight.copy_(torch.as_tensor(weight))
    cells = synthetic.dataset(adata)
    with isolated(), forked():
        torch.manual_seed(11)
        x = model(cells.batch().unobserved())["x"]
    return model, replace(cells, x=x.numpy())


def exact(model: Any, cells: EnvironmentDataset) -> tuple[Array, Array]:
    """Mean ``[n, d]`` and covariance ``[d, d]`` of the posterior of z; c = z and prior scales of 1 are assumed."""
    likelihood, prior = model.likelihoods[0], model.prior
    w = likelihood.net.weight.double().numpy()
    psi = likelihood.scale.double().numpy() ** 2
    precision = np.eye(w.shape[1]) + (w.T / psi) @ w
    loc = prior.loc.double().numpy()[cells.env]
    right = (cells.x - likelihood.net.bias.double().numpy()) / psi @ w + loc
    return np.linalg.solve(precision, right.T).T, np.linalg.inv(precision)


def against_exact(decoder: str, config: Calibration) -> list[dict[str, Any]]:
    """A row for each seed: errors of the guide, simulation-based calibration and k-hat."""
    model, cells = known_screen(decoder, config)
    guide = amortise(model, cells, hidden=())
    run = ps.fit(
        model, guide, cells, seeds=range(config.seeds), objective=ps.Objective(particles=4), kl_warmup=0.0, lr=3e-2,
        schedule="cosine", epochs=config.guide_epochs, batch_size=256, progress=False, device="cpu",
    )  # fmt: skip
    mean, covariance = exact(model, cells)
    sd = np.sqrt(np.diag(covariance))
    z, _, labels, _ = criticism.sbc_ranks(run, cells, draws=config.draws, most_cells=config.simulated)  # type: ignore[misc]
    found = distances(z)
    rows = []
    for k in range(len(run)):
        _, own = run.member(k)
        with isolated():
            q = own.local["z"](cells.batch()).base_dist  # type: ignore[index, operator, union-attr]
        error = (q.loc.double().numpy() - mean) / sd
        scale = np.log(q.scale.double().numpy() / sd)
        columns = [i for i, label in enumerate(labels) if label.startswith(f"member {k}:")]
        rows.append(
            {
                "decoder": decoder,
                "seed": run.seeds[k],
                "error of means, sd": float(np.sqrt((error**2).mean())),
                "error of log scales": float(np.abs(scale).mean()),
                "narrower by": float(1 - np.exp(scale.mean())),
                "sbc distance": float(found[columns].max()),
                "sbc band": criticism.verdicts.ks_band(len(z), len(columns)),
            }
        )
    data = to_arviz(run, cells.subset(np.arange(0, len(cells), max(1, len(cells) // 200))), draws=200, particles=0)
    k_hat = criticism.guide_khat(data)
    for row in rows:
        row["k-hat, 95 % quantile"] = k_hat.value
    return rows


# ---------------------------------------------------------------------- counterfactuals that are known
def fitted_screen(observation: str, screen: int, config: Calibration) -> tuple[Any, splits.Split, Any]:
    """A run, its split by environment, and the AnnData that knows the truth."""
    adata = synthetic.simulate(
        latent=config.latent, genes=config.genes, environments=config.environments, cells=config.cells, graph="empty",
        decoder="linear", observation=observation, noise=0.5, strength=2.0, descriptors=8, descriptor_noise=0.02,
        seed=screen,
    )  # fmt: skip
    split = splits.by_environment(synthetic.dataset(adata, "descriptors"), fraction=0.25, seed=screen)
    linear = observation == "gaussian"
    model = ps.models.environment_vae(
        split.train.schema, latent=config.latent, hidden=() if linear else (32,), environment_hidden=(),
        sparsity="dense", scale=False,
    )  # fmt: skip
    guide = amortise(model, split.train, hidden=() if linear else (32,))
    run = ps.fit(
        model, guide, split.train, seeds=range(config.seeds), epochs=config.epochs, lr=3e-2 if linear else 1e-2,
        schedule="cosine", batch_size=128, progress=False, device="cpu",
    )  # fmt: skip
    return run, split, adata


def counterfactual_ranks(
    run: Any, controls: EnvironmentDataset, truth: Any, environment: str, draws: int, sample: bool
) -> tuple[Array, Array]:
    """Where the true counterfactual expression lies among draws: of each member ``[K, n, G]``, of all ``[n, G]``.

    Args:
        run: an ensemble.
        controls: cells.
        truth: as a fitted model.
        environment: that they are put in.
        draws: of each member.
        sample: expression as it is measured, or as it is expected given the latents.
    """
    true = ps.counterfactual(truth, controls, environment=environment, sample=sample, seed=1).x[0, 0]
    drawn = ps.counterfactual(run, controls, environment=environment, sample=sample, draws=draws, seed=2).x
    each = np.stack([criticism.pit(true, d, seed=k) for k, d in enumerate(drawn)])
    return each, criticism.pit(true, drawn.reshape(-1, *drawn.shape[2:]), seed=len(drawn))


def counterfactual_coverage(run: Any, split: splits.Split, adata: Any, draws: int) -> list[dict[str, Any]]:
    """A row for each member (and all), kind of environment, kind of expression and level."""
    controls = split.train.subset(split.train.reference[split.train.env])
    truth = synthetic.known(adata, controls)
    names = split.train.environments.index
    rows = []
    for kind, cells in (("seen", split.train), ("unseen", split.test)):
        environments = [str(names[e]) for e in cells.present if not cells.reference[e]]
        for what, sample in (("measured", True), ("expected", False)):
            found = [counterfactual_ranks(run, controls, truth, e, draws, sample) for e in environments]
            members = [np.stack([each[k] for each, _ in found]) for k in range(len(run))]
            everybody = np.stack([pooled for _, pooled in found])
            for who, ranks in [*((str(s), m) for s, m in zip(run.seeds, members, strict=True)), ("all", everybody)]:
                rows += [
                    {"environments": kind, "expression": what, "members": who, "level": level,
                     "coverage": float((np.abs(2 * ranks - 1) <= level).mean())}
                    for level in LEVELS
                ]  # fmt: skip
    return rows


# ---------------------------------------------------------------------- tables, figures
def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean coverage over screens and members, with its spread, single members and all of them apart."""
    rows = rows.assign(members=np.where(rows["members"] == "all", "all", "one"))
    keys = ["observation", "environments", "expression", "members", "level"]
    return rows.groupby(keys)["coverage"].agg(["mean", "std", "min", "max", "count"])


def figure(rows: pd.DataFrame) -> "Figure":
    """Coverage against level, a panel for each kind of observation."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(rows["observation"]))
    drawn = Figure(figsize=(4.2 * len(kinds), 3.8), layout="constrained")
    for ax, kind in zip(drawn.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        own = rows[(rows["observation"] == kind) & (rows["members"] == "all")]
        for (places, what), group in own.groupby(["environments", "expression"]):
            mean = group.groupby("level")["coverage"].mean()
            ax.plot(mean.index, mean, "o-", label=f"{what}, {places} environments")
        ax.plot([0, 1], [0, 1], color="#888", linewidth=0.8)
        ax.set(title=kind, xlabel="nominal level", ylabel="coverage of true counterfactuals", ylim=(0, 1.02))
        ax.spines[["top", "right"]].set_visible(False)
    drawn.axes[0].legend(fontsize=7)
    return drawn


def text(exact_rows: pd.DataFrame, found: pd.DataFrame) -> str:
    """What was seen, in sentences."""
    own = exact_rows[exact_rows["decoder"] == "orthogonal"]
    other = exact_rows[exact_rows["decoder"] == "random"]
    lines = [
        f"Known posterior with independent latents, {len(own)} guides: means off by "
        f"{own['error of means, sd'].mean():.4f} sd (worst {own['error of means, sd'].max():.4f}), log scales by "
        f"{own['error of log scales'].mean():.4f} (worst {own['error of log scales'].max():.4f}); "
        f"{(own['sbc distance'] <= own['sbc band']).sum()} of {len(own)} inside the band of SBC.",
        f"With latents that are dependent: log scales off by {other['error of log scales'].mean():.3f}; "
        f"{(other['sbc distance'] <= other['sbc band']).sum()} of {len(other)} inside the band.",
    ]
    for key, row in found.xs(0.95, level="level").iterrows():
        observation, places, what, who = key  # type: ignore[misc]
        lines.append(
            f"95 % intervals of {what} counterfactual expression, {observation}, {places} environments, members: {who}:"
            f" {row['mean']:.3f} ({row['min']:.3f} to {row['max']:.3f} over {row['count']:.0f})."
        )
    return "\n".join(lines)


def main(config: Calibration) -> Results:
    rows, measured = [], []
    with few_threads():
        known = pd.DataFrame([row for decoder in DECODERS for row in against_exact(decoder, config)])
        for observation, screen in itertools.product(config.observations, range(config.screens)):
            place = {"observation": observation, "screen": screen}
            run, split, adata = fitted_screen(observation, screen, config)
            rows += [{**place, **row} for row in counterfactual_coverage(run, split, adata, config.draws)]
            data = to_arviz(run, split.test, draws=config.draws, particles=0)
            measured.append(criticism.interval_coverage(data, conformal=True).reset_index().assign(**place))
    table = pd.DataFrame(rows)
    keys = ["observation", "level"]
    recalibrated = (
        pd.concat(measured).groupby(keys)[["coverage", "coverage_conformal", "width", "width_conformal"]].mean()
    )
    short = summary(table)
    tables = {
        "exact": known.set_index(["decoder", "seed"]),
        "counterfactual": short,
        "held_out": recalibrated,
        "counterfactual_rows": table,
    }
    return Results(tables, {"coverage": figure(table)}, text(known, short))


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Calibration, main))

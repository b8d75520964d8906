"""The choices in unmixing dense effects, measured where the truth is known.

Dense fits of the Translation VAE to screens with unknown targets, and on the same fits:

- contrasts: every contrast, by rotations and oblique, beside FastICA of scikit-learn on the same matrix of effects;
- offsets: the same effects plus one vector that all environments share, with and without `offset`;
- members: does an unsupervised number tell the better of several restarts (loss, contrast, stability), and does the
  agreement of a latent between members tell how well it was recovered?
- numbers: fits with too few and too many latents: how much of them is stable, and a fit with as many latents as are
  stable in the largest;
- priors: training on from the unmixed start with a Student-t prior or a spike and slab on effects, and which
  probabilities of targets are right;
- scales: screens whose environments change scales, with and without the covariances of embedded cells.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import pyro_scm as ps
from experiments.launch import Results, briefly, launch
from experiments.recover_truth import aligned, calibration_error
from guides import amortise
from pyro_scm import effects, metrics
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.directions import CONTRASTS, sparse_directions
from pyro_scm.errors import CheckpointError
from pyro_scm.metrics.recovery import detection
from pyro_scm.objectives.sparsity import EffectSpikeSlab
from pyro_scm.run import Run
from pyro_scm.unmixing import STABLE, directions, fold, refine, stability, unmix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

LATENTS = {"five-latents": (5, (7, 10)), "sams-vae": (15, (12, 20, 30))}
"""True number of latents of each screen, and others that models are given."""

SCALES = {"scale": ("scale",), "shift or scale": ("shift", "scale"), "shift": ("shift",)}


@dataclass(frozen=True)
class UnmixingChoices:
    """Sizes of the experiment.

    Args:
        screens: names of `LATENTS`.
        parts: of the experiment.
        repeats: screens of each name, each of a seed of its own.
        restarts: of each model on each screen.
        epochs: passes over 50,000 cells; smaller screens take as many steps. At least 2 over their own cells.
        cells: in each environment.
        fits: folder to keep dense fits in and to take them from; none if empty.
    """

    screens: tuple[str, ...] = ("five-latents",)
    parts: tuple[str, ...] = ("contrasts", "offsets", "members", "numbers", "priors", "scales")
    repeats: int = 1
    restarts: int = 3
    epochs: int = 10
    cells: int = 100
    fits: str = ""

    @classmethod
    def preset(cls, name: str) -> "UnmixingChoices":
        """Sizes of a preset."""
        if name == "smoke":
            return cls(restarts=2, epochs=0, cells=10)
        if name == "paper":
            return cls(screens=tuple(LATENTS), repeats=2, restarts=4, epochs=60, cells=200)
        return cls()


@dataclass(frozen=True, eq=False)
class Case:
    """A dense fit, and the truth of its cells.

    Args:
        label: names and numbers of the case.
        run: dense.
        cells: of the screen.
        z: ``[n, d]`` true noise.
        targets: ``[E, d]``.
        config: of the experiment.
    """

    label: dict[str, Any]
    run: Run
    cells: EnvironmentDataset
    z: Array
    targets: NDArray[np.bool_]
    config: UnmixingChoices


# ---------------------------------------------------------------------- fits
def case(
    name: str, number: int, latent: int, config: UnmixingChoices, interventions: tuple[str, ...] = ("shift",)
) -> Case:
    """The dense fit of a number of latents to a screen."""
    adata = ps.simulate(name, seed=number, cells=config.cells, interventions=interventions)
    cells = synthetic.dataset(adata)
    order = [str(n) for n in adata.obs["perturbation"].cat.categories]
    own = [order.index(str(n)) for n in cells.environments["perturbation"]]
    sizes = (latent, number, config.restarts, config.epochs, config.cells)
    run = kept(config.fits, "_".join([name, *map(str, sizes), *interventions]), cells, latent, config)
    label = {"screen": name, "number": number, "latent": latent}
    return Case(label, run, cells, adata.obsm["z"], np.asarray(adata.uns["truth"]["targets"], bool)[own], config)


def fitted(cells: EnvironmentDataset, latent: int, config: UnmixingChoices) -> Run:
    """The Translation VAE with dense effects, all restarts together: hasty fits, on which ways of unmixing differ."""
    model = ps.models.translation_vae(
        cells.schema, latent=latent, hidden=(100, 100), environment_hidden=(), sparsity="dense", shortcut=True
    )
    batch = min(512, max(128, len(cells) // 100))
    steps = config.epochs * 50_000 / 512
    return ps.fit(
        model, amortise(model, cells, hidden=(100, 100) if len(cells.genes) > 50 else (100,)), cells,
        seeds=range(config.restarts), epochs=max(2, round(steps * batch / len(cells))), batch_size=batch, lr=2e-3,
        schedule="cosine", device="cpu", progress=False,
    )  # fmt: skip


def kept(fits: str, name: str, cells: EnvironmentDataset, latent: int, config: UnmixingChoices) -> Run:
    """A fit from the folder of fits; else made, and put there."""
    if not fits:
        return fitted(cells, latent, config)
    try:
        return ps.load(Path(fits) / name)
    except CheckpointError:
        run = fitted(cells, latent, config)
        run.save(Path(fits) / name)
        return run


def noise(run: Run, cells: EnvironmentDataset) -> Array:
    """``[K, n, d]`` noise of every cell, with the shift of its environment."""
    z: Array = ps.embed(run, cells)["z"].astype(np.float64)
    table = effects.shifts(run)
    shift = table.to_numpy(np.float64).reshape(len(run), -1, table.shape[1])
    return z + shift[:, cells.env]


# ---------------------------------------------------------------------- scores
def scores(own: Case, z: Array, probability: Array) -> dict[str, float]:
    """Of one member: noise ``[n, k]`` and probabilities of targets ``[E, k]``."""
    matched = metrics.mcc(own.z, z)
    asked = ~own.cells.reference
    here = matched.permutation >= 0
    if here.all():
        truth, found = aligned(own.targets, probability, matched.permutation)
    else:  # fewer latents than true ones: the others are not found
        truth, found = own.targets, np.where(here, probability[:, matched.permutation], 0.0)
    detected = detection(truth[asked], found[asked] > 0.5)
    return {
        "mcc_z": matched.score,
        "f1": detected.f1,
        "precision": detected.precision,
        "recall": detected.recall,
        "calibration error": calibration_error(truth[asked], found[asked]),
    }


def fast_ica(e: Array, seed: int = 0) -> Array:
    """Unmixing ``[d, d]``, rows of unit length, by FastICA over environments as samples."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica = FastICA(whiten="unit-variance", max_iter=1000, random_state=seed).fit(e)
    found: Array = ica.components_
    return found / np.linalg.norm(found, axis=1, keepdims=True)


# ---------------------------------------------------------------------- parts
def contrasts(own: Case) -> Iterator[dict[str, Any]]:
    """Every way of turning the same effects of each member."""
    asked = ~own.cells.reference
    table = effects.shifts(own.run)
    for k, z in enumerate(noise(own.run, own.cells)):
        e = table.loc[k].to_numpy(np.float64)[asked]
        ways: dict[str, Any] = {"as fitted": lambda e: np.eye(e.shape[1]), "FastICA": fast_ica}
        for name in CONTRASTS:
            ways[f"{name}, rotation"] = lambda e, name=name: sparse_directions(e, contrast=name).matrix
            if name != "varimax":
                ways[f"{name}, oblique"] = lambda e, name=name: sparse_directions(e, contrast=name, oblique=0.3).matrix
        ways["log-cosh, rotation, offset"] = lambda e: sparse_directions(e, offset=True).matrix
        for name, way in ways.items():
            started = time.perf_counter()
            m = way(e)
            seconds = time.perf_counter() - started
            matched = metrics.mcc(own.z, z @ m.T)
            f1 = metrics.target_scores(own.targets[asked], e @ m.T, matched.permutation).f1
            row = {"way": name, "member": k, "mcc_z": matched.score, "f1": f1, "seconds": seconds}
            yield {**own.label, **row}


def offsets(own: Case) -> Iterator[dict[str, Any]]:
    """An offset in a random direction, of 0, 1 and 3 times the mean length of the effects."""
    asked = ~own.cells.reference
    table = effects.shifts(own.run)
    for k, z in enumerate(noise(own.run, own.cells)):
        e = table.loc[k].to_numpy(np.float64)[asked]
        along = np.random.default_rng(k).normal(size=e.shape[1])
        along *= np.linalg.norm(e, axis=1).mean() / np.linalg.norm(along)
        for size in (0, 1, 3):
            for taken in (False, True):
                found = sparse_directions(e + size * along, offset=taken)
                matched = metrics.mcc(own.z, z @ found.matrix.T)
                f1 = metrics.target_scores(own.targets[asked], found.effects, matched.permutation).f1
                row = {"size": size, "taken off": taken, "member": k, "mcc_z": matched.score, "f1": f1}
                yield {**own.label, **row}


def member_choice(own: Case) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row a member, and a row a latent."""
    found = directions(own.run, own.cells)
    after = fold(own.run, own.cells, found)
    table, probability = stability(after), effects.inclusion(after)
    rows, latents = [], []
    for k, z in enumerate(noise(after, own.cells)):
        agreement = table.loc[k]["agreement"].to_numpy()
        row = {"member": k, "loss": own.run.losses[k], "contrast": found[k].score, "agreement": agreement.mean()}
        rows.append({**own.label, **row, **scores(own, z, probability.loc[k].to_numpy())})
        best = np.abs(np.corrcoef(own.z.T, z.T)[: own.z.shape[1], own.z.shape[1] :]).max(0)
        latents += [
            {**own.label, "member": k, "agreement": a, "correlation": c} for a, c in zip(agreement, best, strict=True)
        ]
    return rows, latents


def numbers(own: Case, choice: str) -> Iterator[dict[str, Any]]:
    """What is stable of a fit with any number of latents, and how good all and the stable latents are."""
    found = directions(own.run, own.cells, rank="auto")
    after = unmix(own.run, own.cells)
    table, probability = stability(after), effects.inclusion(after)
    for k, z in enumerate(noise(after, own.cells)):
        agreement = table.loc[k]["agreement"].to_numpy()
        stable = agreement > STABLE
        own_scores = {"all": scores(own, z, probability.loc[k].to_numpy())}
        if stable.any():
            own_scores["stable"] = scores(own, z[:, stable], probability.loc[k].to_numpy()[:, stable])
        row = {"member": k, "loss": own.run.losses[k], "rank": found[k].rank, "stable latents": int(stable.sum())}
        row |= {"agreement": agreement.mean()}
        row |= {f"{n} {kind}": own_scores.get(kind, {}).get(n, np.nan) for kind in ("all", "stable")
                for n in ("mcc_z", "f1", "precision", "recall")}  # fmt: skip
        yield {**own.label, "choice": choice, **row}


def priors(own: Case) -> Iterator[dict[str, Any]]:
    """Probabilities of targets after unmixing, and after training on with either prior."""
    after = unmix(own.run, own.cells)
    runs = {"unmixed": after}
    for prior in ("student-t", "spike-slab"):
        weight = {"student-t": 2.0, "spike-slab": 1.0}[prior]
        runs[prior] = refine(
            after, own.cells, prior=prior, weight=weight, **briefly(own.run), device="cpu", progress=False
        )
    for name, run in runs.items():
        included = effects.inclusion(run)
        for k, z in enumerate(noise(run, own.cells)):
            given = {"two groups": included.loc[k].to_numpy()}
            if name == "spike-slab":
                given["its own"] = responsibility(run, k)
            for kind, probability in given.items():
                row = {"way": name, "probability": kind, "member": k, "loss": run.losses[k]}
                yield {**own.label, **row, **scores(own, z, probability)}


def responsibility(run: Run, member: int) -> Array:
    """Probabilities of targets ``[E, d]`` under the spike and slab that a run was refined with."""
    prior = EffectSpikeSlab(run.model, 1, least=0.1)
    shift = torch.as_tensor(effects.shifts(run).loc[member].to_numpy(np.float32))
    with torch.no_grad():
        prior.raw.copy_(run.parameters["penalties.effects.raw"][member])
        found: Array = prior.inclusion(shift).double().numpy()
    found[run.environments.table["is_reference"].to_numpy(bool)] = 0.0
    return found


def scale_interventions(number: int, config: UnmixingChoices) -> Iterator[dict[str, Any]]:
    """Screens whose environments change scales, unmixed by means alone and by means and covariances."""
    for kind, interventions in SCALES.items():
        own = case("five-latents", number, 5, config, interventions=interventions)
        for way, scales in {"as fitted": None, "means": False, "means and covariances": True}.items():
            run = own.run if scales is None else unmix(own.run, own.cells, scales=scales)
            for k, z in enumerate(noise(run, own.cells)):
                row = {"interventions": kind, "way": way, "member": k, "loss": own.run.losses[k]}
                row |= {"mcc_z": metrics.mcc(own.z, z).score, "linear_r2_z": metrics.linear_r2(own.z, z)}
                yield {**own.label, **row}


# ---------------------------------------------------------------------- the experiment
def main(config: UnmixingChoices) -> Results:
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in config.screens:
        true, others = LATENTS[name]
        for number in range(config.repeats):
            own = case(name, number, true, config)
            if "contrasts" in config.parts:
                rows.setdefault("contrasts", []).extend(contrasts(own))
            if "offsets" in config.parts:
                rows.setdefault("offsets", []).extend(offsets(own))
            if "members" in config.parts:
                of_members, of_latents = member_choice(own)
                rows.setdefault("members", []).extend(of_members)
                rows.setdefault("latents", []).extend(of_latents)
            if "numbers" in config.parts:
                given = {latent: case(name, number, latent, config) for latent in others}
                found = [row for fit in (own, *given.values()) for row in numbers(fit, "given")]
                most = max(others)
                counted = round(np.median([row["stable latents"] for row in found if row["latent"] == most]))
                if counted > 1:  # as many as are stable of the most
                    found += numbers(case(name, number, counted, config), f"stable of {most}")
                rows.setdefault("numbers", []).extend(found)
            if "priors" in config.parts:
                rows.setdefault("priors", []).extend(priors(own))
            print(name, number, flush=True)
    if "scales" in config.parts:
        for number in range(config.repeats):
            rows.setdefault("scales", []).extend(scale_interventions(number, config))
    raw = {f"raw_{name}": pd.DataFrame(values) for name, values in rows.items()}
    tables = {name: SUMMARIES[name](pd.DataFrame(values)) for name, values in rows.items()}
    figures = {"stability": figure(raw["raw_latents"])} if "latents" in rows else {}
    text = f"{config.repeats} screens of each name, {config.restarts} restarts, {config.epochs} epochs."
    return Results({**tables, **raw}, figures, text)


def medians(by: list[str], of: list[str]) -> Any:
    """Table -> medians over screens and members."""
    return lambda table: table.groupby(by, sort=False)[of].median()


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over screens of what each rule for choosing a member gets, and the mean and best member."""
    groups = table.groupby(["screen", "number"], sort=False)
    picked = {
        "lowest loss": groups["loss"].idxmin(),
        "lowest contrast": groups["contrast"].idxmin(),
        "highest agreement": groups["agreement"].idxmax(),
        "best (needs the truth)": groups["mcc_z"].idxmax(),
    }
    parts = {rule: table.loc[rows].groupby("screen")[["mcc_z", "f1"]].mean() for rule, rows in picked.items()}
    parts["mean of members"] = groups[["mcc_z", "f1"]].mean().groupby("screen").mean()
    return pd.concat(parts, names=["rule"]).swaplevel().sort_index(level=0, sort_remaining=False)


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Correlation with a true latent of latents by their agreement between members."""
    bins = pd.cut(table["agreement"], [0, 0.5, STABLE, 0.9, 1.0001], right=False)
    groups = table.groupby(["screen", bins], observed=True)["correlation"]
    rank = table.groupby("screen")[["agreement", "correlation"]].corr("spearman").iloc[0::2, 1].droplevel(1)
    found = groups.agg(latents="size", median="median", lowest="min").reset_index("agreement")
    return found.assign(agreement=found["agreement"].astype(str), rank_correlation=rank)


SUMMARIES: dict[str, Any] = {
    "contrasts": medians(["screen", "way"], ["mcc_z", "f1", "seconds"]),
    "offsets": medians(["screen", "size", "taken off"], ["mcc_z", "f1"]),
    "members": chosen,
    "latents": agreement,
    "numbers": medians(
        ["screen", "choice", "latent"],
        ["loss", "rank", "agreement", "stable latents", "mcc_z all", "f1 all", "mcc_z stable", "f1 stable",
         "precision stable", "recall stable"],
    ),
    "priors": medians(["screen", "way", "probability"], ["mcc_z", "f1", "precision", "recall", "calibration error"]),
    "scales": medians(["interventions", "way"], ["mcc_z", "linear_r2_z"]),
}  # fmt: skip


def figure(latents: pd.DataFrame) -> "Figure":
    """Agreement of every latent between members, and its correlation with the truth."""
    from matplotlib.figure import Figure

    names = list(latents["screen"].unique())
    drawn = Figure(figsize=(3.2 * len(names) + 0.5, 3))
    for axis, name in zip(drawn.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        part = latents[latents["screen"] == name]
        axis.plot(part["agreement"], part["correlation"], ".", ms=4)
        axis.set(title=name, xlabel="agreement between members", ylabel="correlation with a true latent")
        axis.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, UnmixingChoices, main))

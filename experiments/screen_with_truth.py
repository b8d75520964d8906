"""Every model of the suite on screens whose truth is known: latents, unseen pairs, and what each cell would have been.

A simulated screen of single perturbations and of pairs whose shifts add; pairs are never trained on. Scored are

- the latents of single cells: MCC (one to one) and linear R2 (up to a linear map) of the noise z, see `ps.recovery`;
- the change of mean expression in held-out pairs, and whether predictive intervals of these means cover them;
- counterfactuals of single cells against those of the generating model, which knows each cell's noise: held-out control
  cells put into unseen pairs, and held-out cells of one perturbation put under another, seen, one;
- interventions do(c_j := v) on each true latent that has a match (|r| > 0.7) among the model's, in units of the match.

R2 of individual effects is against no effect. ``own`` is against the true *mean* effect of each environment, given to
every cell alike: above 0 a model knows of a cell what no mean says.

All models are told the true number of latents; none is told anything else. MultiCPA needs proteins: see
held_out_proteins.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine

import pyro_scm as ps
from experiments.launch import Results, briefly, launch
from pyro_scm import evaluation, metrics, recipes
from pyro_scm.baselines import BASELINES, controls, environment_means
from pyro_scm.chance import forked
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.synthetic import Screen
from pyro_scm.errors import PyroScmError
from pyro_scm.mean_predictions import predict_cells
from pyro_scm.run import Fitted, Run
from pyro_scm.sites import C, X, Z

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

FloatArray: TypeAlias = NDArray[np.float64]

LEVELS = (0.5, 0.8, 0.95)
MATCHED = 0.7
_RESAMPLES = 40

SCREENS = {
    # a growing network of latents with linear equations, genes that are small networks of some of them
    "causal": Screen(latent=5, genes=30, strength=4.0, constant=True, spread=0.5),
    # SAMS-VAE's simulator, smaller: independent latents, a deep decoder, several targets
    "sparse": Screen(
        latent=8, genes=60, graph="empty", decoder="deep", layers=2, width=40, noise_share=0.2, most_targets=3,
        cover=False, strength=4.0, constant=True, spread=0.5,
    ),
    # sVAE+'s, smaller: counts
    "counts": Screen(
        latent=8, genes=60, graph="empty", decoder="deep", layers=2, width=40, observation="negative-binomial",
        depth=1e4, dispersion=20.0, most_targets=3, cover=False, strength=4.0, constant=True, spread=0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A model of the tables.

    Args:
        recipe: see `recipes.make`.
        options: of it.
        after: what is done to the fitted run: nothing, ``"unmix"``, or ``"refine"`` after that.
    """

    recipe: str
    options: tuple[tuple[str, Any], ...] = ()
    after: str = ""


_DENSE = (("sparsity", "dense"), ("shortcut", True), ("effect_rate", 10.0), ("environment_hidden", ()))
_NO_SCALE = (("scale", False),)
MODELS: dict[str, Row] = {name: Row(name) for name in recipes.RECIPES if name != "multicpa"} | {
    "chemcpa": Row("chemcpa", (("molecule", "embedding"),)),
    "environment_vae": Row("environment_vae", _NO_SCALE),
    "structured_environment_vae": Row("structured_environment_vae", _NO_SCALE),
    "translation_vae, dense": Row("translation_vae", _DENSE),
    "translation_vae, unmixed": Row("translation_vae", _DENSE, "unmix"),
    "translation_vae, refined": Row("translation_vae", _DENSE, "refine"),
    "cpa, unmixed": Row("cpa", (("shortcut", True),), "unmix"),
}


@dataclass(frozen=True)
class ScreenWithTruth:
    """Sizes.

    Args:
        screens: of `SCREENS`.
        models: of `MODELS`; all if empty.
        seeds: members of each model on each screen.
        singles: perturbed environments that are trained on.
        pairs: held out.
        cells: in each environment.
        steps: of training, of batches of 128 cells; `refine` adds half as many.
        lr: of training, falling to 0.
        hidden: units of the hidden layers of decoder and encoder; the truth has two on the sparse screen.
        asked: held-out cells of each environment that counterfactuals are asked of.
    """

    screens: tuple[str, ...] = ("sparse",)
    models: tuple[str, ...] = ("vae", "cpa", "environment_vae", "translation_vae, unmixed", "decoder_only")
    seeds: int = 2
    singles: int = 20
    pairs: int = 6
    cells: int = 60
    steps: int = 400
    lr: float = 3e-3
    hidden: tuple[int, ...] = (64, 64)
    asked: int = 15

    @classmethod
    def preset(cls, name: str) -> "ScreenWithTruth":
        """Sizes of a preset."""
        if name == "smoke":
            return cls(
                screens=("causal",), models=("vae", "translation_vae, refined"), singles=8, pairs=2, cells=40,
                steps=120, lr=1e-2, hidden=(16,), asked=4,
            )  # fmt: skip
        if name == "paper":
            return cls(
                screens=tuple(SCREENS), models=(), seeds=3, singles=30, pairs=10, cells=200, steps=3000,
                hidden=(128, 128),
            )  # fmt: skip
        return cls()


# ---------------------------------------------------------------------- a screen with pairs
def with_pairs(screen: Screen, pairs: int, seed: int = 0) -> "AnnData":
    """A screen of which the last `pairs` environments are pairs of two others, whose shifts add.

    Args:
        screen: settings; of its environments the first is the reference.
        pairs: number of pairs, at most that of the singles' pairs.
        seed: of the pairs.

    Returns:
        As `simulate` makes it; pairs are named "A+B" and their truth is in ``uns["truth"]`` like any other's.
    """
    from anndata import AnnData

    adata = ps.simulate(screen)
    names = [str(n) for n in adata.obs["perturbation"].cat.categories]
    first = len(names) - pairs
    rng = np.random.default_rng([seed, 2])
    every = list(itertools.combinations(range(1, first), 2))
    chosen = [every[i] for i in np.sort(rng.choice(len(every), pairs, replace=False))]
    model: Any = synthetic.truth(adata)
    stored = adata.uns["truth"]
    targets, shift = np.array(stored["targets"]), np.array(stored["shift"])
    for row, (a, b) in enumerate(chosen, first):
        names[row] = f"{names[a]}+{names[b]}"
        targets[row] = targets[a] | targets[b]
        shift[row] = shift[a] + shift[b]
        model.prior.loc[row] = model.prior.loc[a] + model.prior.loc[b]
    codes = adata.obs["perturbation"].cat.codes.to_numpy()
    size = rng.lognormal(np.log(screen.depth), 0.3, len(codes)) if screen.observation != "gaussian" else None
    with forked(), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(screen.seed)
        trace = poutine.trace(model).get_trace(synthetic.world(len(names), codes, size=size))
    x, z, c = (trace.nodes[site]["value"].numpy() for site in (X, Z, C))
    labels = ["+".join(str(model.scm.nodes[j]) for j in np.flatnonzero(row)) for row in targets]
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(np.array(names)[codes], categories=pd.Index(names)),
            "targets": pd.Categorical(np.array(labels)[codes]),
        },
        index=adata.obs_names,
    )
    result = AnnData(X=x.astype(np.float32), obs=obs, var=adata.var.copy())
    result.obsm["z"], result.obsm["c"] = z, c
    parameters = {name: value.numpy() for name, value in model.state_dict().items()}
    result.uns["truth"] = {**stored, "targets": targets, "shift": shift, "parameters": parameters}
    return result


@dataclass(frozen=True, eq=False)
class Task:
    """A screen, what is trained on, and what is asked.

    Args:
        adata: with its truth.
        train: cells of the reference and the singles, without those kept aside.
        aside: a fifth of these cells.
        pairs: all cells of the pairs.
        truth: the generating model with each cell's noise, for all cells.
    """

    adata: "AnnData"
    train: EnvironmentDataset
    aside: EnvironmentDataset
    pairs: EnvironmentDataset

    @property
    def names(self) -> list[str]:
        """Of the pairs."""
        return [str(self.pairs.environments.index[e]) for e in self.pairs.present]

    @property
    def depth(self) -> float:
        """Counts that a cell is scaled to."""
        return self.train.schema.summary.depth

    def questions(self, asked: int) -> Iterator[tuple[str, EnvironmentDataset, str]]:
        """(kind, cells, environment to put them in)."""
        names = [str(n) for n in self.aside.environments.index]
        source = self.of(self.aside, names[0], asked)
        for pair in self.names:
            yield "pair", source, pair
        singles = [names[e] for e in self.aside.present if e != 0]
        for i in range(min(len(singles), len(self.names))):
            yield "single", self.of(self.aside, singles[i], asked), singles[(i + 1) % len(singles)]

    def of(self, cells: EnvironmentDataset, name: str, most: int) -> EnvironmentDataset:
        """The first cells of an environment."""
        own = cells.of(name)
        return own.subset(np.arange(min(most, len(own))))


def task(name: str, config: ScreenWithTruth) -> Task:
    """Simulate a screen and split it."""
    screen = replace(SCREENS[name], environments=1 + config.singles + config.pairs, cells=config.cells)
    adata = with_pairs(screen, config.pairs)
    cells = synthetic.dataset(adata, "multi-hot")
    pair = np.array(["+" in str(n) for n in cells.environments.index])[cells.env]
    order = np.arange(len(cells)) % config.cells
    aside = ~pair & (order < config.cells // 5)
    return Task(adata, cells.subset(~pair & ~aside), cells.subset(aside), cells.subset(pair))


# ---------------------------------------------------------------------- models
def trained(row: Row, t: Task, config: ScreenWithTruth) -> Run:
    """All seeds together."""
    latent = t.adata.obsm["z"].shape[1]
    known = recipes.recipe(row.recipe)
    options = dict(row.options) | {"latent": latent, "hidden": config.hidden}
    if "environment_hidden" in known.options:
        options.setdefault("environment_hidden", config.hidden[:1])
    model, guide = recipes.make(row.recipe, t.train.schema, guide_hidden=config.hidden, **options)
    return ps.fit(
        model, guide, t.train, seeds=range(config.seeds), objective=recipes.objective(row.recipe, model, t.train),
        critic_steps=known.critic_steps, epochs=max(2, round(config.steps * 128 / len(t.train))), batch_size=128,
        lr=config.lr, schedule="cosine", device="cpu", progress=False,
    )  # fmt: skip


def fitted(row: Row, t: Task, config: ScreenWithTruth, kept: dict[Row, Run]) -> Run:
    """The run of a row; what it starts from is fitted once and kept."""
    start = Row(row.recipe, row.options)
    if row not in kept:
        if row == start:
            kept[row] = trained(row, t, config)
        elif row.after == "unmix":
            kept[row] = ps.unmix(fitted(start, t, config, kept), t.train)
        else:
            run = fitted(replace(row, after="unmix"), t, config, kept)
            kept[row] = ps.refine(run, t.train, **briefly(run), device="cpu", progress=False)
    return kept[row]


# ---------------------------------------------------------------------- scores
def effects(fitted: Fitted, cells: EnvironmentDataset, depth: float, **action: Any) -> FloatArray:
    """``[K, n, G]`` individual effects of an action on expected (log-normalised) expression."""
    worlds = ps.counterfactual(fitted, cells, **action)
    after, before = worlds.x[:, 0].astype(np.float64), worlds.factual_x[:, 0].astype(np.float64)
    if cells.counts:
        factor = (depth / cells.size)[:, None]
        after, before = np.log1p(after * factor), np.log1p(before * factor)
    return np.asarray(after - before)


def explained(true: Sequence[FloatArray], found: Sequence[FloatArray]) -> tuple[float, float]:
    """R2 of individual effects against none, and against the mean effect of each question.

    Args:
        true: of each question ``[n, G]``.
        found: likewise.
    """
    error = sum(float(((t - f) ** 2).sum()) for t, f in zip(true, found, strict=True))
    none = sum(float((t**2).sum()) for t in true)
    mean = sum(float(((t - t.mean(0)) ** 2).sum()) for t in true)
    return 1 - error / max(none, 1e-12), 1 - error / max(mean, 1e-12)


def answers(fitted: Fitted, t: Task, config: ScreenWithTruth) -> dict[str, list[FloatArray]]:
    """Effects ``[K, n, G]`` of every question, by kind."""
    found: dict[str, list[FloatArray]] = {}
    for kind, cells, name in t.questions(config.asked):
        found.setdefault(kind, []).append(effects(fitted, cells, t.depth, environment=name))
    return found


def true_answers(t: Task, config: ScreenWithTruth) -> dict[str, list[FloatArray]]:
    """The truth's, ``[n, G]``."""
    found: dict[str, list[FloatArray]] = {}
    for kind, cells, name in t.questions(config.asked):
        own = effects(synthetic.known(t.adata, cells), cells, t.depth, environment=name)
        found.setdefault(kind, []).append(own[0])
    return found


def interventions(run: Run, t: Task, config: ScreenWithTruth) -> list[dict[str, float]]:
    """R2 of do(c_j := mean + 2 sd) on held-out control cells, of each member: true latents that have a match."""
    cells = t.of(t.aside, synthetic.CONTROL, config.asked)
    c = np.asarray(t.adata.obsm["c"], np.float64)[t.train.origin]
    levels = c.mean(0) + 2 * c.std(0)
    sites = synthetic.truth(t.adata).sites
    known = synthetic.known(t.adata, cells)
    true = [effects(known, cells, t.depth, do={s: float(v)})[0] for s, v in zip(sites, levels, strict=True)]
    rows = []
    for k, own in enumerate(ps.embed(run, t.train)["c"].astype(np.float64)):
        member, matched = run.member(k), metrics.mcc(c, own)
        chosen = [j for j in range(len(sites)) if matched.correlations[j] > MATCHED]
        found = []
        for j in chosen:
            partner = own[:, matched.permutation[j]]
            slope = np.cov(c[:, j], partner)[0, 1] / c[:, j].var(ddof=1)
            level = float(partner.mean() + slope * (levels[j] - c[:, j].mean()))
            site = member[0].sites[matched.permutation[j]]  # type: ignore[operator, index]
            found.append(effects(member, cells, t.depth, do={str(site): level})[0])
        r2 = explained([true[j] for j in chosen], found)[0] if chosen else float("nan")
        rows.append({"matched": len(chosen) / len(sites), "do r2": r2})
    return rows


def covered(run: Run, t: Task, seed: int = 0) -> dict[str, float]:
    """Coverage of intervals for the means of held-out pairs, from all members together.

    A draw is the mean of as many simulated cells as the pair has, so that it has the noise of the true mean.
    """
    rng = np.random.default_rng(seed)
    found = []
    for name in t.names:
        cells = t.pairs.of(name)
        truth = environment_means(cells, t.depth)[0][cells.env[0]]
        drawn = []
        for own in predict_cells(run, t.train, name, cells=200):
            rows = rng.integers(len(own), size=(_RESAMPLES, len(cells)))
            drawn.append(own[rows].mean(1))
        found.append(metrics.calibration(truth, np.concatenate(drawn), levels=LEVELS).coverage)
    return {f"covered {100 * level:.0f}": v for level, v in zip(LEVELS, np.mean(found, axis=0).tolist(), strict=True)}


def delta_pearson(prediction: FloatArray, t: Task) -> float:
    """Of predicted means ``[pairs, G]``, the mean over pairs; controls that were trained on cancel nothing here."""
    means, _ = environment_means(t.pairs, t.depth)
    scored = controls(t.aside, t.names, t.depth)
    trained = controls(t.train, t.names, t.depth)
    values = []
    for e, guess, control, seen in zip(t.pairs.present, prediction, scored, trained, strict=True):
        change = guess - seen
        true = means[e] - control
        values.append(metrics.delta_pearson(true, change, np.zeros_like(true)) if change.std() > 1e-9 else np.nan)
    return float(np.mean(values))


def model_rows(name: str, run: Run, t: Task, config: ScreenWithTruth) -> list[dict[str, Any]]:
    """One row a member."""
    table = evaluation.recovery(run, t.train, t.adata).to_dict("records")
    means = evaluation.predict_means(run, t.train, t.names, cells=100)
    true, found, done = true_answers(t, config), answers(run, t, config), interventions(run, t, config)
    inside = covered(run, t)
    rows = []
    for k, own in enumerate(table):
        row: dict[str, Any] = {"model": name, "kind": "model", "seed": run.seeds[k]}
        row |= {"mcc_z": own["mcc_z"], "linear_r2_z": own["linear_r2_z"], "mcc_c": own["mcc_c"]}
        row["delta pearson"] = delta_pearson(means[k], t)
        for kind, several in found.items():
            row[f"cf {kind}"], row[f"cf {kind} own"] = explained(true[kind], [s[k] for s in several])
        rows.append(row | done[k] | inside)
    return rows


def simple_rows(t: Task, config: ScreenWithTruth) -> Iterator[dict[str, Any]]:
    """Baselines: the same change for every cell; and principal components as latents."""
    true = true_answers(t, config)
    for name in ("no_change", "training_mean", "additive"):
        baseline = BASELINES[name]().fit(t.train)
        row: dict[str, Any] = {"model": name, "kind": "baseline", "seed": -1}
        row["delta pearson"] = delta_pearson(baseline.predict(t.names), t)
        guesses: dict[str, list[FloatArray]] = {}
        for kind, cells, asked in t.questions(config.asked):
            source = str(cells.environments.index[cells.env[0]])
            after, before = baseline.predict([asked, source])
            guesses.setdefault(kind, []).append(np.tile(after - before, (len(cells), 1)))
        for kind, several in guesses.items():
            row[f"cf {kind}"], row[f"cf {kind} own"] = explained(true[kind], several)
        yield row
    x: Any = t.train.normalised(t.depth)
    x = np.asarray(x if isinstance(x, np.ndarray) else x.toarray(), np.float64)
    z = np.asarray(t.adata.obsm["z"], np.float64)[t.train.origin]
    scores = (x - x.mean(0)) @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][: z.shape[1]].T
    found = {"mcc_z": metrics.mcc(z, scores).score, "linear_r2_z": metrics.linear_r2(z, scores)}
    yield {"model": "principal components", "kind": "baseline", "seed": -1, **found}


def main(config: ScreenWithTruth) -> Results:
    rows: list[dict[str, Any]] = []
    failed = []
    for screen in config.screens:
        t = task(screen, config)
        kept: dict[Row, Run] = {}
        rows += [{"screen": screen, **row} for row in simple_rows(t, config)]
        for name in config.models or tuple(MODELS):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    found = model_rows(name, fitted(MODELS[name], t, config, kept), t, config)
            except PyroScmError as error:
                failed.append(f"{name} on {screen}: {error}")
                continue
            rows += [{"screen": screen, **row} for row in found]
            shown = pd.DataFrame(found).mean(numeric_only=True).round(2).to_dict()
            print(screen, name, shown, flush=True)
    scores = pd.DataFrame(rows)
    text = "\n".join([f"{config.seeds} members; means (and standard deviations, sd) over them.", *failed])
    return Results({"summary": summary(scores), "scores": scores}, {"scores": figure(scores)}, text)


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over members, and their standard deviations."""
    groups = scores.drop(columns=["kind", "seed"]).groupby(["screen", "model"], sort=False)
    table = groups.mean()
    for name in ("mcc_z", "delta pearson", "cf pair"):
        table[f"{name} sd"] = groups[name].std()
    return table


def figure(scores: pd.DataFrame) -> "Figure":
    """MCC, pairs and counterfactuals of every model."""
    from matplotlib.figure import Figure

    shown = ("mcc_z", "linear_r2_z", "delta pearson", "cf pair", "do r2")
    names, screens = list(scores["model"].unique()), list(scores["screen"].unique())
    drawn = Figure(figsize=(2.4 * len(shown) + 2, 1 + 0.28 * len(names)), layout="constrained")
    for axes, name in zip(drawn.subplots(1, len(shown), sharey=True), shown, strict=True):
        for s, screen in enumerate(screens):
            own = scores[scores["screen"] == screen]
            y = [names.index(m) + 0.2 * (s - (len(screens) - 1) / 2) for m in own["model"]]
            axes.plot(own[name].clip(lower=-0.5), y, "o", ms=3, color=f"C{s}", label=screen)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel=name, xlim=(-0.55, 1.02))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", color="#e6e9ed")
    axes.legend(fontsize=6)
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, ScreenWithTruth, main))

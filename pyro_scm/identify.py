"""What a design can identify, and whether the data hold the graph: a report before anybody draws an arrow.

With noise interventions x | e depends on the graph only through decoder and causal layer together: any graph can be
absorbed by the decoder, at the same likelihood in every environment. So the report says two things apart. What theory
grants to this kind of design, each with its source; and what the data say when the graph is taken away: the model is
fitted again with and without edges, to the same cells, and both are scored on cells that neither has seen.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import nn

from pyro_scm import linear_gaussian
from pyro_scm.abduction import device_of
from pyro_scm.chance import forked
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, ModelError
from pyro_scm.infer import fit
from pyro_scm.likelihoods import Gaussian, GaussianFixed, Likelihood
from pyro_scm.model import LatentModel
from pyro_scm.objectives import Objective, Penalty
from pyro_scm.objectives.structure import Acyclicity, EdgeSparsity
from pyro_scm.query import abduct, isolated
from pyro_scm.regimes import HardRegime, MechanismRegime, TableRegime, Targets
from pyro_scm.run import Run, members
from pyro_scm.scm import IndependentSCM, LinearSCM
from pyro_scm.sites import X, Z

__all__ = ["Claim", "Design", "Report", "claims", "identify"]

FloatArray = NDArray[np.float64]

_CHUNK = 512
_RESTARTS = 8


@dataclass(frozen=True)
class Design:
    """What identifiability depends on.

    Args:
        interventions: ``"noise"``, ``"mechanism"`` or ``"hard"``.
        targets: ``"known"``, ``"partly known"`` or ``"unknown"``.
        latents: d.
        environments: with cells, the reference among them.
        hits: for each latent, how many environments act on it and on nothing else; what the model believes where the
            targets are not known. Empty where it has no say in it (noise interventions under a sparse prior).
        decoder: ``"linear"``, ``"flexible"``, ``"conditional"`` (reads the environment) or ``"none"`` (the variables
            themselves are observed).
        mechanism: ``"none"`` (no edges), ``"linear"`` or ``"network"``.
        scale: whether environments also change the scale of the noise.
    """

    interventions: str
    targets: str
    latents: int
    environments: int
    hits: tuple[int, ...]
    decoder: str
    mechanism: str
    scale: bool = False

    @property
    def covered(self) -> int:
        """Fewest single-target environments of any latent."""
        return min(self.hits, default=0)

    def __str__(self) -> str:
        hit = f"; single-target environments of each latent: {', '.join(map(str, self.hits))}" if self.hits else ""
        return (
            f"{self.interventions} interventions on {self.targets} targets; {self.latents} latents, "
            f"{self.environments} environments{hit}; {self.decoder} decoder, mechanisms: {self.mechanism}"
        )


@dataclass(frozen=True)
class Claim:
    """What can be recovered of one thing.

    Args:
        quantity: ``"noise z"``, ``"targets"``, ``"causal order"`` or ``"graph"``.
        holds: whether it can be recovered, to the extent that `extent` says.
        extent: up to what, or why not.
        source: of the theorem.
    """

    quantity: str
    holds: bool
    extent: str
    source: str


_SQUIRES = "Squires et al., ICML 2023"
_VARICI = "Varici et al., arXiv 2310.15450 (LSCALE-I)"
_GENERAL = "von Kügelgen et al., NeurIPS 2023; Varici et al., AISTATS 2024 (GSCALE-I)"
_ZHANG = "Zhang et al., NeurIPS 2023"
_IVAE = "Khemakhem et al., AISTATS 2020"
_SPARSE = "Lachapelle et al., CLeaR 2022"
_CLASS = "Hauser and Bühlmann, JMLR 2012"
_SINGLE = "Eberhardt et al., UAI 2005"
_ADDITIVE = "Peters et al., JMLR 2014"
_ABSORBED = "x | e depends on decoder and causal layer only through their composition"


def claims(design: Design) -> tuple[Claim, ...]:
    """The map from designs to what theory grants, assuming that the model holds and that cells are without number."""
    d = design
    if d.decoder == "none":
        return _observed(d)
    if d.decoder == "conditional":
        return tuple(
            Claim(q, False, "the decoder reads the environment and can explain all of it", _ABSORBED) for q in _ALL
        )
    if d.environments < 2:
        return tuple(
            Claim(q, False, "one environment: latents are free up to a rotation even where all is linear", _LOCATELLO)
            for q in _ALL
        )
    return _noise(d), _targets(d), *_structure(d)


_ALL = ("noise z", "targets", "causal order", "graph")
_LOCATELLO = "Locatello et al., ICML 2019"


def _observed(d: Design) -> tuple[Claim, ...]:
    """Variables that are measured without error, no common cause of two of them unmeasured."""
    missing = sum(n == 0 for n in d.hits) if d.hits else d.latents
    if d.mechanism == "network":
        graph = (True, "if mechanisms are nonlinear and noise is additive", _ADDITIVE)
    elif missing <= 1 and d.environments >= 2:
        graph = (True, "complete", _SINGLE)
    else:
        graph = (
            False,
            f"up to graphs that the interventions cannot tell apart: {missing} of {d.latents} variables are never "
            "acted on alone",
            _CLASS,
        )
    return (
        Claim("noise z", graph[0], "as residuals, once the graph is known", graph[2]),
        Claim("targets", True, "given", "the data set"),
        Claim("causal order", *graph),
        Claim("graph", *graph),
    )


def _noise(d: Design) -> Claim:
    exact = "up to order, sign and scale"
    if d.covered >= 1 and (d.decoder == "linear" or d.interventions == "noise"):
        return Claim("noise z", True, exact, _SQUIRES if d.decoder == "linear" else _SPARSE)
    if d.scale and d.environments >= 2 * d.latents + 1:
        return Claim("noise z", True, f"{exact}, if the environments' means and scales are diverse", f"{_IVAE} (k = 2)")
    if d.interventions == "noise":
        return Claim(
            "noise z",
            True,
            f"{exact} if each latent is where some environments' targets meet, else up to a linear map",
            f"{_SPARSE}; {_IVAE} (k = 1)",
        )
    if d.covered >= 2:
        return Claim("noise z", True, f"{exact}, and a map of each alone", _GENERAL)
    return Claim("noise z", False, _lacking(d), _GENERAL if d.decoder == "flexible" else _SQUIRES)


def _targets(d: Design) -> Claim:
    if d.targets == "known":
        return Claim("targets", True, "given", "the data set")
    if d.decoder == "linear" and d.covered >= 1:
        return Claim("targets", True, "up to the order of the latents", _SQUIRES)
    return Claim(
        "targets", True, "up to the order of the latents, where the noise is recovered", f"{_SPARSE}; {_ZHANG}"
    )


def _structure(d: Design) -> tuple[Claim, Claim]:
    def both(order: tuple[bool, str, str], graph: tuple[bool, str, str]) -> tuple[Claim, Claim]:
        return Claim("causal order", *order), Claim("graph", *graph)

    if d.mechanism == "none":
        nothing = (False, "the model has no edges", "the model")
        return both(nothing, nothing)
    if d.interventions == "noise":
        absorbed = (False, "environments change the noise alone: any graph is absorbed by the decoder", _ABSORBED)
        if d.decoder == "linear" and d.mechanism == "network":
            # a linear map cannot undo a network; no theorem covers it, so the likelihood has to speak
            unknown = (False, "the decoder cannot absorb it, but no theorem grants it", "open")
            return both(unknown, unknown)
        return both(absorbed, absorbed)
    if d.covered < 1:
        lacking = (False, _lacking(d), _SQUIRES)
        return both(lacking, lacking)
    source = _SQUIRES if d.mechanism == "linear" else _VARICI
    if d.interventions == "mechanism":
        if d.decoder == "linear":
            return both(
                (True, "ancestors", source), (False, "soft interventions tell ancestors, not single edges", source)
            )
        weak = "ancestors, if the decoder is a polynomial and the interventions are faithful"
        return both((True, weak, _ZHANG), (False, "up to its transitive closure at best", _ZHANG))
    if d.decoder == "linear":
        return both((True, "complete", source), (True, "up to the order of the latents", source))
    if d.covered >= 2:
        return both((True, "complete", _GENERAL), (True, "up to the order of the latents", _GENERAL))
    few = (False, "a flexible decoder needs two different hard interventions on each latent", _GENERAL)
    return both(few, few)


def _lacking(d: Design) -> str:
    missing = sum(n == 0 for n in d.hits) if d.hits else d.latents
    if d.covered == 0:
        return f"{missing} of {d.latents} latents have no environment that acts on them alone"
    return "a flexible decoder needs two different interventions on each latent"


@dataclass(frozen=True, eq=False)
class Report:
    """What theory grants, and what the data say of the graph.

    Args:
        design: of the data and the model.
        claims: see `claims`.
        gains: ``[K, n]`` log-likelihood of each held-out cell with the graph minus without, nats, one row a seed; for
            the exact estimator one row, of the best restart.
        cells_by: ``[n]`` environment of these cells.
        smallest: gain per cell below which a graph counts as worth nothing.
        estimator: ``"exact"`` or ``"svi"``.
        graph: the edges that were found; meaningless where the verdict says so.
        exact: the fit with the graph, of the exact estimator; its environment 0 is the reference, the others follow.
        seed: of the bootstrap.
    """

    design: Design
    claims: tuple[Claim, ...]
    gains: FloatArray
    cells_by: NDArray[np.int64]
    smallest: float
    estimator: str
    graph: nx.DiGraph
    exact: linear_gaussian.LinearGaussian | None = None
    seed: int = 0

    @property
    def gain(self) -> float:
        """Mean held-out gain of the graph, nats per cell."""
        return float(self.gains.mean())

    def interval(self, level: float = 0.95, draws: int = 1000) -> tuple[float, float]:
        """Bootstrap interval of `gain`: seeds are drawn anew, and cells within their environments.

        Args:
            level: of confidence.
            draws: of the bootstrap.
        """
        rng = np.random.default_rng(self.seed)
        groups = [np.flatnonzero(self.cells_by == e) for e in np.unique(self.cells_by)]
        means = np.empty(draws)
        for b in range(draws):
            rows = np.concatenate([rng.choice(g, len(g)) for g in groups])
            seeds = rng.integers(len(self.gains), size=len(self.gains))
            means[b] = self.gains[seeds][:, rows].mean()
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    @cached_property
    def _bounds(self) -> tuple[float, float]:
        """Of the usual interval: verdict and print ask for it several times."""
        return self.interval()

    @property
    def identified(self) -> bool:
        """Theory grants the graph, and the data are worse off without it."""
        granted = next(c.holds for c in self.claims if c.quantity == "graph")
        return granted and self._bounds[0] > self.smallest

    @property
    def verdict(self) -> str:
        """In one line."""
        if self.identified:
            return "graph identified: theory grants it and held-out cells are worse off without it"
        granted = next(c for c in self.claims if c.quantity == "graph")
        low = self._bounds[0]
        if not granted.holds:
            more = f"; yet held-out cells gain by it (at least {low:.3g} nats per cell)" if low > self.smallest else ""
            return f"graph not identified: {granted.extent}{more}"
        return f"graph not identified: held-out cells do not gain {self.smallest:g} nats per cell by it"

    def table(self) -> pd.DataFrame:
        """The claims, one row each."""
        return pd.DataFrame([asdict(c) for c in self.claims]).set_index("quantity")

    def __str__(self) -> str:
        low, high = self._bounds
        seeds = "best restart" if self.estimator == "exact" else f"{len(self.gains)} seeds"
        edges = ", ".join(f"{a} -> {b}" for a, b in sorted(self.graph.edges, key=str)) or "none"
        lines = [str(self.design), ""]
        for c in self.claims:
            lines.append(f"{c.quantity:13s} {'yes' if c.holds else 'no ':3s}  {c.extent} [{c.source}]")
        lines += [
            "",
            f"held-out gain of the graph: {self.gain:.4g} nats per cell, 95 % interval {low:.4g} to {high:.4g} "
            f"({self.gains.shape[1]} cells, {seeds}, {self.estimator})",
            f"edges found: {edges}",
            self.verdict,
        ]
        return "\n".join(lines)


def identify(
    run: Run,
    cells: EnvironmentDataset,
    *,
    interventions: str | None = None,
    estimator: str = "auto",
    held_out: float = 0.3,
    seeds: Sequence[int] | None = None,
    smallest: float = 0.02,
    particles: int = 50,
    cut: float = 0.3,
    seed: int = 0,
) -> Report:
    """What the design of a run can identify, and what its graph is worth on cells that no fit has seen.

    The model is fitted twice, to the same random part of each environment's cells: as it is, and without edges.
    ``"exact"`` does so by maximum likelihood in closed form, which linear mechanisms, a linear decoder and Gaussian
    noise allow; ``"svi"`` as the run was trained, from the same seeds, and compares importance-weighted bounds with the
    same noise. A guide that fits one arm less well than the other biases the latter.

    Args:
        run: of a structured model.
        cells: with those of the reference among them.
        interventions: of the environments, if they are not what the model takes them for.
        estimator: ``"exact"``, ``"svi"``, or ``"auto"``: exact where that is possible.
        held_out: share of each environment's cells to score on.
        seeds: of the fits, the run's by default; of the exact estimator restarts, 8 by default, of which the best
            counts: its likelihood has several maxima.
        smallest: gain, in nats per cell, that a graph must be worth at the lower end of its interval.
        particles: of the importance-weighted bound.
        cut: |A| below which an edge of the exact fit is absent.
        seed: of the split, the bound and the bootstrap.

    Raises:
        DataError: no reference cells, or an environment that the run does not know.
        ModelError: a run of another kind of model, or an estimator that does not fit it.
    """
    model = run.model
    if not isinstance(model, LatentModel):
        raise ModelError(f"identify needs a run of a LatentModel, this one is of {type(model).__name__}")
    if not bool(cells.reference[cells.present].any()):
        raise DataError("identify needs cells of the reference environment: give them too")
    if estimator not in ("auto", "exact", "svi"):
        raise ModelError(f"unknown estimator {estimator!r}: use 'auto', 'exact' or 'svi'")
    possible = _is_linear_gaussian(model)
    if estimator == "exact" and not possible:
        raise ModelError("the exact estimator needs linear mechanisms, a linear decoder and Gaussian noise: use 'svi'")
    design, acted = describe(model, cells)
    if interventions is not None:
        if interventions not in linear_gaussian.KINDS:
            kinds = ", ".join(linear_gaussian.KINDS)
            raise ModelError(f"unknown interventions {interventions!r}: use one of {kinds}")
        design = replace(design, interventions=interventions)
    split = splits.by_row(cells, held_out, seed=seed)
    if possible and estimator != "svi":
        restarts = range(_RESTARTS) if seeds is None else seeds
        gains, graph, found, full = _exact(model, split, acted, design.interventions, restarts, cut)
        if design.hits:  # the targets that the likelihood chose, where they are not known
            design = replace(design, hits=_hits(found))
    else:
        full = None
        gains, graph = _variational(run, split, run.seeds if seeds is None else seeds, particles, seed)
    return Report(
        design=design,
        claims=claims(design),
        gains=gains,
        cells_by=split.test.env,
        smallest=smallest,
        estimator="exact" if possible and estimator != "svi" else "svi",
        graph=graph,
        exact=full,
        seed=seed,
    )


# ---------------------------------------------------------------------- the design
def describe(model: LatentModel, cells: EnvironmentDataset) -> tuple[Design, FloatArray]:
    """The design, and targets ``[E, d]``: NaN rows where they are not known."""
    present = cells.present
    regime = model.regime
    targets = getattr(regime, "targets", None) or next(iter(getattr(p, "_targets", (None,))[0] for p in _parts(model)))
    kind, acted = "noise", np.full((len(cells.environments), model.latent), np.nan)
    believed: FloatArray | None = None
    if isinstance(regime, TableRegime):
        gain = regime.gain.detach().cpu().numpy()
        kind = "hard" if bool((gain == 0).any()) else "mechanism" if bool((gain != 1).any()) else "noise"
        acted = (gain != 1).astype(np.float64)
        believed = acted
    elif isinstance(targets, Targets):
        kind = (
            "hard"
            if isinstance(regime, HardRegime)
            else "mechanism"
            if isinstance(regime, MechanismRegime)
            else "noise"
        )
        if targets.table is not None:
            acted = targets.table.detach().cpu().numpy().astype(np.float64)
        believed = _believed(targets, cells)
    acted[cells.reference] = 0
    asked = present[~cells.reference[present]]
    unknown = np.isnan(acted[asked]).any(1)
    hits: tuple[int, ...] = ()
    if believed is not None:
        hits = _hits(believed[asked])
    scm = model.scm
    mechanism = "none" if not nx.number_of_edges(scm.graph) else "linear" if isinstance(scm, LinearSCM) else "network"
    return Design(
        interventions=kind,
        targets="known" if not unknown.any() else "unknown" if unknown.all() else "partly known",
        latents=model.latent,
        environments=len(present),
        hits=hits,
        decoder=_decoder(model),
        mechanism=mechanism,
        scale=bool(getattr(model.prior, "scale", False) is True),
    ), acted


def _hits(targets: FloatArray) -> tuple[int, ...]:
    """For each latent, in how many of the environments ``[E, d]`` it is the only target."""
    on = targets > 0.5
    return tuple(int(n) for n in on[on.sum(1) == 1].sum(0))


def _parts(model: LatentModel) -> tuple[Any, Any]:
    """Where targets live that no regime owns."""
    prior, shift = model.prior, model.shift
    return (shift, prior) if hasattr(shift, "_targets") else (prior, shift)


def _believed(targets: Targets, cells: EnvironmentDataset) -> FloatArray:
    """t ``[E, d]`` of the environments that have cells."""
    rows = np.array([int(np.flatnonzero(cells.env == e)[0]) for e in cells.present])
    out = np.zeros((len(cells.environments), int(targets(cells.batch(torch.as_tensor(rows[:1]))).shape[-1])))
    with torch.no_grad():
        out[cells.present] = targets(cells.batch(torch.as_tensor(rows))).cpu().numpy()
    return out


def _decoder(model: LatentModel) -> str:
    kinds = [likelihood for likelihood in model.likelihoods if isinstance(likelihood, Likelihood)]
    if any(likelihood.conditional for likelihood in kinds):
        return "conditional"
    return "linear" if all(_is_linear(likelihood.net) for likelihood in kinds) else "flexible"


def _is_linear(net: nn.Module) -> bool:
    layers = list(net.children()) if isinstance(net, nn.Sequential) else [net]
    return len(layers) == 1 and isinstance(layers[0], nn.Linear)


def _is_linear_gaussian(model: LatentModel) -> bool:
    normal = len(model.likelihoods) == 1 and isinstance(model.likelihoods[0], Gaussian | GaussianFixed)
    return normal and _decoder(model) == "linear" and isinstance(model.scm, LinearSCM)


# ---------------------------------------------------------------------- with and without the graph
def _exact(
    model: LatentModel, split: splits.Split, acted: FloatArray, kind: str, seeds: Sequence[int], cut: float
) -> tuple[FloatArray, nx.DiGraph, FloatArray, linear_gaussian.LinearGaussian]:
    table = np.asarray(split.train.reference)
    names = np.flatnonzero(~table)
    number = np.zeros(len(table), np.int64)  # all references are environment 0
    number[names] = 1 + np.arange(len(names))
    targets = np.concatenate([np.zeros((1, model.latent)), acted[names]])
    if kind == "noise":
        targets = np.where(np.isnan(targets), 1.0, targets)  # any latent may be moved
    x, y = _values(split.train), _values(split.test)
    mask = model.scm.adjacency().numpy()
    arms = [
        linear_gaussian.maximise(x, number[split.train.env], targets, kind=kind, mask=allowed, cut=cut, seeds=seeds)
        for allowed in (mask, np.zeros_like(mask))
    ]
    scores = [arm.log_prob(y, number[split.test.env])[arm.best] for arm in arms]
    full = arms[0]
    with_cells = [number[e] for e in split.train.present if number[e] > 0]
    found = full.targets[full.best].numpy()[with_cells]
    graph = nx.relabel_nodes(full.graph(cut), dict(enumerate(model.scm.nodes)))
    return (scores[0] - scores[1])[None], graph, found, full


def _values(cells: EnvironmentDataset) -> FloatArray:
    x = cells.batch().x
    assert x is not None
    return x.double().numpy()


def _variational(
    run: Run, split: splits.Split, seeds: Sequence[int], particles: int, seed: int
) -> tuple[FloatArray, nx.DiGraph]:
    settings: dict[str, Any] = vars(replace(run.settings, patience=None)).copy()
    if isinstance(settings["temperature"], tuple) and isinstance(settings["temperature"][0], tuple):
        settings["temperature"] = list(settings["temperature"])  # one interval a member
    arms = []
    for edges in (True, False):
        model, guide = copy.deepcopy(run.model), copy.deepcopy(run.guide)
        assert isinstance(model, LatentModel)
        if not edges:
            bare = IndependentSCM(model.latent)
            bare.nodes, bare.sites = model.scm.nodes, model.scm.sites
            model.scm = bare
        arms.append(
            fit(model, guide, split.train, seeds=seeds, objective=_objective(model), progress=False, **settings)
        )
    scores = [np.stack([_bound(m, g, split.test, particles, seed) for m, g in members(arm)]) for arm in arms]
    best: Any = arms[0].member(arms[0].best)[0]
    return scores[0] - scores[1], best.scm.learnt()


def _objective(model: LatentModel) -> Objective:
    """The evidence lower bound, with the penalties of edges that are learnt."""
    penalties: dict[str, Penalty] = {}
    scm: Any = model.scm
    learnt = getattr(scm, "cut", 0.0) > 0 or any(getattr(m, "cut", 0.0) > 0 for m in getattr(scm, "mechanisms", ()))
    if learnt:
        penalties["edges"] = EdgeSparsity(scm)
    if not scm.acyclic:
        penalties["cycles"] = Acyclicity(scm)
    return Objective(penalties=penalties)


def _bound(model: Any, guide: Any, cells: EnvironmentDataset, particles: int, seed: int) -> FloatArray:
    """Importance-weighted log-likelihood of each cell ``[n]``."""
    parts = []
    device = device_of(model)
    with isolated(), forked(), torch.no_grad():
        torch.manual_seed(seed)  # the same noise for both arms
        for start in range(0, len(cells), _CHUNK):
            batch = cells.batch(torch.arange(start, min(start + _CHUNK, len(cells)))).to(device)
            latents = abduct(guide, batch, particles)
            with pyro.plate("draws", particles, dim=-2):
                q = poutine.trace(poutine.condition(guide, data=latents)).get_trace(batch)
                p = poutine.trace(poutine.condition(model, data=latents)).get_trace(batch)
            weight = (
                p.nodes[X]["fn"].log_prob(batch.x)
                + p.nodes[Z]["fn"].log_prob(latents[Z])
                - q.nodes[Z]["fn"].log_prob(latents[Z])
            )
            parts.append((torch.logsumexp(weight, 0) - np.log(particles)).double().cpu().numpy())
    return np.concatenate(parts)

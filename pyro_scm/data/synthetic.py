"""Synthetic perturbation screens with a known latent SCM (seed section 5.1), made of the models' own parts.

The truth is a `LatentModel` with fixed parameters, so it answers every query that a learnt model does.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor, nn

from pyro_scm import graphs
from pyro_scm.batch import Batch, Schema, Statistics
from pyro_scm.chance import forked
from pyro_scm.errors import DataError, listing
from pyro_scm.likelihoods import Gaussian, Likelihood, NegativeBinomialLikelihood
from pyro_scm.model import LatentModel
from pyro_scm.nn import MaskedMLP
from pyro_scm.priors import TablePrior
from pyro_scm.regimes import TableRegime
from pyro_scm.scm import LatentSCM, LinearSCM, MechanismSCM
from pyro_scm.sites import C, X, Z

if TYPE_CHECKING:
    from anndata import AnnData

    from pyro_scm.data.dataset import EnvironmentDataset

__all__ = ["CONTROL", "SCREENS", "KnownNoise", "Screen", "dataset", "known", "simulate", "truth", "world"]

CONTROL = "control"
UNS_KEY = "truth"
GRAPHS = ("empty", "growing", "multi-growing", "layered")
INTERVENTIONS = ("shift", "scale", "mechanism", "hard")


@dataclass(frozen=True)
class Screen:
    """Settings of a synthetic screen; the defaults are those of the seed's section 6.4, with noisy observations.

    Args:
        latent: d causal variables.
        genes: G observed genes.
        environments: E, the first of which is the reference.
        cells: in each environment.
        graph: ``"empty"``, ``"growing"``, ``"multi-growing"`` (0 to 3 parents), ``"layered"`` (2 layers or more), or
            edges [[parent, child], ...] over nodes 0..d-1.
        mechanism: structural equations ``"linear"`` or ``"network"`` (one hidden layer of 3 ReLU units).
        decoder: gene equations ``"linear"``, ``"network"`` (likewise), or ``"deep"``: one network for all genes, of
            random orthogonal matrices with leaky ReLUs (slope 0.2) between them.
        layers: hidden layers of a deep decoder.
        width: units of each.
        attachment: probability that a gene reads a latent; a gene that would read none reads one at random.
        observation: ``"gaussian"`` or ``"negative-binomial"``.
        noise: standard deviation of Gaussian observation noise.
        noise_share: if positive, that of each gene instead as a share of the gene's own standard deviation.
        depth: median library size of negative binomial observations.
        dispersion: inverse dispersion theta of negative binomial observations.
        interventions: kinds, taken in turn by the environments: ``"shift"`` (mean of z_j), ``"scale"`` (sd of z_j
            times 3 or 1/3), ``"mechanism"`` (the sign of f_j flips), ``"hard"`` (parents cut, c_j around a mean of its
            own).
        targets: latents that an environment acts on.
        most_targets: if positive, their number is drawn anew for each environment, from `targets` to this.
        target_share: if positive, each latent is a target with this probability instead, one of them at least.
        cover: targets go through all latents in turn; otherwise they are drawn at random.
        strength: standard deviation of shifts, N(0, strength^2); or their absolute value if `constant`.
        constant: shifts are +strength or -strength.
        spread: standard deviation of the size of constant shifts.
        descriptors: length of a descriptor of each environment that carries its effect as a fingerprint would: the
            effect vector times a random matrix, plus noise of `descriptor_noise` times its scale; 0 for none.
        descriptor_noise: see `descriptors`.
        seed: of everything.
    """

    latent: int = 5
    genes: int = 30
    environments: int = 6
    cells: int = 500
    graph: str | Sequence[Sequence[int]] = "growing"
    mechanism: str = "linear"
    decoder: str = "network"
    layers: int = 4
    width: int = 50
    attachment: float = 0.5
    observation: str = "gaussian"
    noise: float = 0.1
    noise_share: float = 0.0
    depth: float = 2000.0
    dispersion: float = 10.0
    interventions: Sequence[str] = ("shift",)
    targets: int = 1
    most_targets: int = 0
    target_share: float = 0.0
    cover: bool = True
    strength: float = 5.0
    constant: bool = False
    spread: float = 0.0
    descriptors: int = 0
    descriptor_noise: float = 0.1
    seed: int = 0


_CHAIN = tuple((i, i + 1) for i in range(4))
SCREENS = {
    "five-latents": Screen(environments=31),
    "sams-vae": Screen(
        latent=15, genes=100, environments=101, graph="empty", decoder="deep", noise_share=0.2, target_share=2 / 15,
        cover=False, strength=5.0, constant=True, spread=0.5,
    ),
    "svae": Screen(
        latent=15, genes=100, environments=101, graph="empty", decoder="deep", width=40,
        observation="negative-binomial", depth=1e6, dispersion=2900.0, most_targets=3, cover=False, strength=5.0,
        constant=True, spread=0.5,
    ),
    "linear-disentanglement": Screen(
        latent=5, genes=10, environments=6, graph="multi-growing", decoder="linear", attachment=1.0,
        interventions=("hard",), cells=2500,
    ),
    "discrepancy-chain": Screen(
        latent=5, genes=30, environments=6, graph=_CHAIN, decoder="deep", layers=1, width=30, strength=3.0,
        constant=True,
    ),
}  # fmt: skip
"""Screens of the literature, by name, as far as their descriptions go: the seed's section 6.4 with 30 environments;
Bereket and Karaletsos, "SAMS-VAE", NeurIPS 2023; Lopez et al., "sVAE+", CLeaR 2023 (Poisson counts: here the largest
dispersion parameter); Squires et al., "Linear causal disentanglement", ICML 2023;
the chain of Zhang et al., NeurIPS 2023."""


def simulate(screen: Screen | str | None = None, **settings: Any) -> "AnnData":
    """Cells of a synthetic screen, its truth beside them.

    Args:
        screen: settings, or a name in `SCREENS`; the default ones if left out.
        **settings: fields of `Screen` that differ from those.

    Returns:
        AnnData with obs ``perturbation`` and ``targets`` (labels of nodes), obsm ``z`` and ``c``, uns ``truth`` (all of
        the generating model: graph, weights, targets, shifts; latents in the order of ``nodes``, as in z and c), uns
        ``descriptors`` where asked for.

    Raises:
        DataError: a setting that makes no screen.

    Example:
        >>> screen = ps.simulate(latent=3, genes=20, environments=7, cells=10)
        >>> screen.shape, screen.obsm["c"].shape
        ((70, 20), (70, 3))
    """
    from anndata import AnnData

    if isinstance(screen, str):
        if screen not in SCREENS:
            raise DataError(f"unknown screen {screen!r}: use one of {', '.join(SCREENS)}, or a Screen")
        screen = SCREENS[screen]
    screen = replace(screen or Screen(), **settings)
    _check(screen)
    rng = np.random.default_rng(screen.seed)
    tables = _interventions(screen, rng)
    model = _model(screen, rng, tables)
    env = np.repeat(np.arange(screen.environments), screen.cells)
    size = rng.lognormal(np.log(screen.depth), 0.3, len(env)) if screen.observation != "gaussian" else None
    with forked(), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(screen.seed)
        trace = poutine.trace(model).get_trace(world(screen.environments, env, size=size))
    values = {site: trace.nodes[site]["value"].numpy() for site in (Z, C, X)}
    names = _environment_names(screen)
    targets = ["+".join(str(model.scm.nodes[j]) for j in np.flatnonzero(row)) for row in tables["targets"]]
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(np.array(names)[env], categories=pd.Index(names)),
            "targets": pd.Categorical(np.array(targets)[env]),
        },
        index=[f"cell_{i}" for i in range(len(env))],
    )
    adata = AnnData(
        X=values[X].astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"gene_{g}" for g in range(screen.genes)])
    )
    adata.obsm["z"], adata.obsm["c"] = values[Z], values[C]
    adata.uns[UNS_KEY] = {
        "screen": json.dumps(asdict(screen)),
        "nodes": np.array(model.scm.nodes, dtype=np.int64),
        "graph": model.scm.adjacency().numpy().astype(np.int8),
        "targets": tables["targets"],
        "shift": tables["shift"],
        "parameters": {name: value.numpy() for name, value in model.state_dict().items()},
    }
    if screen.descriptors:
        adata.uns["descriptors"] = _descriptors(screen, tables, names)
    return adata


def truth(adata: "AnnData") -> LatentModel:
    """The model that generated a synthetic screen.

    Raises:
        DataError: an AnnData that `simulate` did not make.
    """
    if UNS_KEY not in adata.uns or "screen" not in adata.uns[UNS_KEY]:
        raise DataError("this AnnData has no uns['truth']: the truth is only known of a screen made by `simulate`")
    stored = adata.uns[UNS_KEY]
    screen = Screen(**json.loads(stored["screen"]))
    rng = np.random.default_rng(screen.seed)
    model = _model(screen, rng, _interventions(screen, rng))
    model.load_state_dict({name: torch.as_tensor(np.asarray(v)) for name, v in stored["parameters"].items()})
    return model


def dataset(adata: "AnnData", representation: str = "one-hot") -> "EnvironmentDataset":
    """The cells of a synthetic screen as an `EnvironmentDataset`.

    Args:
        adata: made by `simulate`.
        representation: ``"one-hot"``; ``"descriptors"``; or ``"oracle"``: the true shift of each latent, as in the
            seed's experiments.
    """
    from pyro_scm.data.dataset import EnvironmentDataset

    given: Any = representation
    if representation == "descriptors":
        given = adata.uns["descriptors"]
    elif representation == "oracle":
        shift = np.asarray(adata.uns[UNS_KEY]["shift"], np.float32)
        given = dict(zip(adata.obs["perturbation"].cat.categories.astype(str), shift, strict=True))
    return EnvironmentDataset.from_anndata(
        adata, environment="perturbation", control=CONTROL, targets="targets", representation=given
    )


def world(
    environments: int,
    env: "np.ndarray[Any, Any]",
    *,
    size: "np.ndarray[Any, Any] | None" = None,
    x: Tensor | None = None,
) -> Batch:
    """A batch of cells in the given environments of a synthetic screen, for its true model.

    Args:
        environments: E.
        env: ``[n]`` environment of each cell.
        size: ``[n]`` library size.
        x: ``(n, G)`` observed expression, if any.
    """
    rows = torch.as_tensor(np.array(env, dtype=np.int64))
    perturbed = torch.ones(environments)
    perturbed[0] = 0
    return Batch(
        index=torch.arange(len(rows)),
        env=rows,
        row=rows,
        r=torch.eye(environments),
        perturbed=perturbed,
        total=len(rows),
        x=x,
        size=None if size is None else torch.as_tensor(np.array(size, dtype=np.float32)),
    )


def _environment_names(screen: Screen) -> list[str]:
    width = len(str(screen.environments - 1))
    return [CONTROL, *(f"env_{e:0{width}d}" for e in range(1, screen.environments))]


def _interventions(screen: Screen, rng: np.random.Generator) -> dict[str, Any]:
    """Targets, shifts, scales and gains ``[E, d]`` of the environments."""
    shape = (screen.environments, screen.latent)
    targets, shift = np.zeros(shape, dtype=bool), np.zeros(shape, np.float32)
    scale, gain = np.ones(shape, np.float32), np.ones(shape, np.float32)
    turn = rng.permutation(screen.latent)
    for e in range(1, screen.environments):
        if screen.target_share > 0:
            drawn = rng.random(screen.latent) < screen.target_share
            drawn[rng.integers(screen.latent)] |= not drawn.any()
            chosen = np.flatnonzero(drawn)
        elif screen.most_targets > 0:
            number = int(rng.integers(screen.targets, screen.most_targets + 1))
            chosen = rng.choice(screen.latent, number, replace=False)
        elif screen.cover:
            chosen = turn[((e - 1) * screen.targets + np.arange(screen.targets)) % screen.latent]
        else:
            chosen = rng.choice(screen.latent, screen.targets, replace=False)
        kind = screen.interventions[(e - 1) % len(screen.interventions)]
        targets[e, chosen] = True
        if kind in ("shift", "hard"):
            size: Any = screen.strength
            if not screen.constant:
                size = np.abs(rng.normal(0, screen.strength, len(chosen)))
            elif screen.spread > 0:
                size = np.abs(rng.normal(screen.strength, screen.spread, len(chosen)))
            shift[e, chosen] = rng.choice([-1.0, 1.0], len(chosen)) * size
        if kind == "scale":
            scale[e, chosen] = rng.choice([3.0, 1 / 3], len(chosen))
        if kind == "mechanism":
            gain[e, chosen] = -1.0
        if kind == "hard":
            gain[e, chosen] = 0.0
    return {"targets": targets, "shift": shift, "scale": scale, "gain": gain}


def _graph(screen: Screen) -> nx.DiGraph:
    if not isinstance(screen.graph, str):
        return graphs.from_edges(((int(a), int(b)) for a, b in screen.graph), range(screen.latent))
    if screen.graph == "growing":
        return graphs.growing(screen.latent, screen.seed)
    if screen.graph == "multi-growing":
        return graphs.multi_growing(screen.latent, screen.seed)
    if screen.graph == "layered":
        return graphs.layered(screen.latent, max(2, round(screen.latent**0.5)) if screen.latent > 1 else 1)
    return graphs.independent(screen.latent)


def _signs(rng: np.random.Generator, shape: Any) -> Tensor:
    return torch.as_tensor(rng.choice([-1.0, 1.0], tuple(shape)), dtype=torch.float32)


def _randomise(network: MaskedMLP, rng: np.random.Generator) -> MaskedMLP:
    """Weights in {-1, 1}, no offsets."""
    with torch.no_grad():
        network.first.copy_(_signs(rng, network.first.shape))
        network.second.copy_(_signs(rng, network.second.shape))
        network.offset.zero_()
    return network


def _causal_layer(screen: Screen, rng: np.random.Generator) -> LatentSCM:
    graph = _graph(screen)
    if screen.mechanism == "linear":
        linear = LinearSCM(graph)
        with torch.no_grad():
            linear.weight.copy_(_signs(rng, linear.weight.shape) * linear.mask)
        return linear
    scm = MechanismSCM(graph, hidden=3)
    for mechanism in scm.mechanisms:
        assert isinstance(mechanism, MaskedMLP)
        _randomise(mechanism, rng)
    return scm


def _likelihood(screen: Screen, rng: np.random.Generator) -> Likelihood:
    reads = rng.random((screen.genes, screen.latent)) < screen.attachment
    none = ~reads.any(1)
    reads[none, rng.integers(screen.latent, size=int(none.sum()))] = True
    mask = torch.as_tensor(reads, dtype=torch.float32)
    net: nn.Module
    if screen.decoder == "linear":
        net = nn.Linear(screen.latent, screen.genes)
        with torch.no_grad():
            net.weight.copy_(_signs(rng, mask.shape) * mask)
            net.bias.zero_()
    elif screen.decoder == "deep":
        net = _deep(screen, rng)
    else:
        net = _randomise(MaskedMLP(mask, hidden=3), rng)
    counts = screen.observation != "gaussian"
    statistics = Statistics(
        torch.zeros(screen.genes),
        torch.ones(screen.genes),
        torch.as_tensor(rng.dirichlet(np.full(screen.genes, 5.0)), dtype=torch.float32),
        screen.depth,
    )
    schema = Schema(
        genes=tuple(f"gene_{g}" for g in range(screen.genes)),
        environments=tuple(_environment_names(screen)),
        features=tuple(_environment_names(screen)),
        counts=counts,
        statistics=statistics,
    )
    if counts:
        likelihood = NegativeBinomialLikelihood(net if screen.decoder == "deep" else _Tempered(net), schema)
        with torch.no_grad():
            likelihood.raw_dispersion.fill_(float(8 * np.arctanh(np.log(screen.dispersion) / 8)))
        return likelihood
    gaussian = Gaussian(net, schema, floor=1e-6)
    with torch.no_grad():
        gaussian.raw_scale.fill_(float(np.log(np.expm1(max(screen.noise, 1e-6)))))
    return gaussian


def _deep(screen: Screen, rng: np.random.Generator) -> nn.Sequential:
    sizes = [screen.latent, *[screen.width] * screen.layers, screen.genes]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        linear = nn.Linear(a, b, bias=False)
        basis = np.linalg.qr(rng.normal(size=(max(a, b), min(a, b))))[0]
        with torch.no_grad():
            linear.weight.copy_(torch.as_tensor(basis if b >= a else basis.T, dtype=torch.float32))
        layers += [linear, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def _share_noise(model: LatentModel, screen: Screen) -> None:
    """Observation noise in proportion to each gene's standard deviation over all environments."""
    env = np.repeat(np.arange(screen.environments), min(screen.cells, 200))
    with forked(), torch.no_grad():
        torch.manual_seed(screen.seed)
        batch = world(screen.environments, env)
        prior, shift, gain = model.parts(batch)
        likelihood: Any = model.likelihoods[0]
        spread = likelihood.location(model.scm.solve(prior.sample() + shift, gain), batch).std(0)
        likelihood.raw_scale.copy_(torch.log(torch.expm1((screen.noise_share * spread).clamp(min=1e-6))))


class _Tempered(nn.Module):
    """2 tanh(net / 6): log fold changes of counts stay within a factor of e^2 whatever the shift."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, c: Tensor) -> Tensor:
        return 2 * torch.tanh(self.net(c) / 6)


def _model(screen: Screen, rng: np.random.Generator, tables: dict[str, Any]) -> LatentModel:
    gain = torch.as_tensor(tables["gain"])
    with forked():  # parts draw initial values, which are then replaced
        model = LatentModel(
            prior=TablePrior(torch.as_tensor(tables["shift"]), torch.as_tensor(tables["scale"])),
            scm=_causal_layer(screen, rng),
            regime=TableRegime(gain) if bool((gain != 1).any()) else None,
            likelihood=_likelihood(screen, rng),
        )
    if screen.noise_share > 0:
        _share_noise(model, screen)
    truth: LatentModel = model.requires_grad_(False).eval()
    return truth


def _descriptors(screen: Screen, tables: dict[str, Any], names: Sequence[str]) -> pd.DataFrame:
    rng = np.random.default_rng([screen.seed, 1])
    effect = np.concatenate([tables["shift"], np.log(tables["scale"]), tables["gain"] - 1], 1)
    values = effect @ rng.normal(size=(effect.shape[1], screen.descriptors)) / max(screen.strength, 1.0)
    values += screen.descriptor_noise * values.std() * rng.normal(size=values.shape)
    values[0] = 0.0  # the reference has no molecule
    return pd.DataFrame(
        values.astype(np.float32), index=list(names), columns=[f"descriptor_{i}" for i in range(screen.descriptors)]
    )


def _check(screen: Screen) -> None:
    for name in ("latent", "genes", "environments", "cells", "layers", "width"):
        if getattr(screen, name) < 1:
            raise DataError(f"{name} = {getattr(screen, name)}: a screen needs at least 1")
    if not 1 <= screen.targets <= screen.latent:
        raise DataError(f"targets = {screen.targets}: choose between 1 and the number of latents ({screen.latent})")
    if screen.most_targets and not screen.targets <= screen.most_targets <= screen.latent:
        raise DataError(
            f"most_targets = {screen.most_targets}: choose between targets ({screen.targets}) and the number of "
            f"latents ({screen.latent})"
        )
    for name in ("attachment", "target_share"):
        if not 0 <= getattr(screen, name) <= 1:
            raise DataError(f"{name} = {getattr(screen, name)}: give a probability")
    if screen.noise_share > 0 and screen.observation != "gaussian":
        raise DataError("noise_share is of Gaussian observations: counts have the noise of their law")
    if not math.exp(-8) < screen.dispersion < math.exp(8):
        raise DataError(
            f"dispersion = {screen.dispersion}: choose between exp(-8) and exp(8), all that a model can have"
        )
    for name in ("noise", "strength", "noise_share", "spread"):
        if not getattr(screen, name) >= 0:
            raise DataError(f"{name} = {getattr(screen, name)}: a standard deviation is at least 0")
    if not screen.depth > 0:
        raise DataError(f"depth = {screen.depth}: give a positive library size")
    choices = (
        ("graph", (screen.graph,) if isinstance(screen.graph, str) else (), GRAPHS),
        ("mechanism", (screen.mechanism,), ("linear", "network")),
        ("decoder", (screen.decoder,), ("linear", "network", "deep")),
        ("observation", (screen.observation,), ("gaussian", "negative-binomial")),
        ("interventions", screen.interventions, INTERVENTIONS),
    )
    for name, given, known in choices:
        unknown = [g for g in given if g not in known]
        if unknown:
            raise DataError(f"unknown {name} {listing(unknown)}: use {', '.join(known)}")
    if not screen.interventions:
        raise DataError("no kind of intervention given: name at least one of " + ", ".join(INTERVENTIONS))


class KnownNoise(nn.Module):
    """The guide of a model whose noise is known: z of each cell, exactly.

    Args:
        z: ``(N, d)`` true noise of the N cells of a data set.
    """

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z: Tensor
        self.register_buffer("z", z)

    def forward(self, batch: Batch) -> Tensor:
        """Site ``z``."""
        with batch.plate():
            value: Tensor = pyro.sample(Z, Delta(self.z[batch.index], event_dim=1))
        return value


def known(adata: "AnnData", cells: "EnvironmentDataset") -> tuple[LatentModel, KnownNoise]:
    """The truth as a fitted model: (generating model, its exact guide) of cells of a synthetic screen.

    Every query that takes a run takes this pair, and answers with the truth.

    Args:
        adata: made by `simulate`.
        cells: of `dataset`, or a part of them.
    """
    rows = np.arange(len(cells)) if cells.origin is None else cells.origin
    return truth(adata), KnownNoise(torch.as_tensor(np.asarray(adata.obsm["z"])[rows]))

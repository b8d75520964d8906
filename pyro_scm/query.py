"""Questions to a fitted model: interventions, counterfactuals, effects, predictions (Pearl's three rungs).

A counterfactual is abduction (the guide's posterior of the noise z of the cells that were seen), action (`do`, a noise
intervention, another environment) and prediction (the program run again with that noise).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_scm.batch import Batch, Schema
from pyro_scm.chance import forked
from pyro_scm.composition import CovariateShift
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, InterventionError, listing
from pyro_scm.handlers import (
    Do,
    Expose,
    HoldNoise,
    NoiseIntervention,
    diagonal,
    refuse_unknown,
    reparametrised,
    unstored,
)
from pyro_scm.run import Environments, Fitted, Run, members
from pyro_scm.sites import DATA, C, X, Y, Z

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Contrast", "Worlds", "counterfactual", "do", "effect", "embed", "expose", "noise", "predict", "sweep"]

Value: TypeAlias = float | Tensor | NDArray[Any] | Callable[[Tensor], Tensor]
Actions: TypeAlias = Mapping[str, Value]
Laws: TypeAlias = Mapping[str, Distribution]
Place: TypeAlias = str | NDArray[Any]

_DRAWS = "draws"
_CHUNK = 2048
_LARGEST_ANSWER = 4 << 30


# ---------------------------------------------------------------------- programs in, programs out
class Intervened:
    """A program under `do`; what `do` returns, so that interventions on interventions merge instead of clashing."""

    def __init__(self, model: Callable[..., Any], data: Mapping[str, Any]) -> None:
        self.model, self.data = model, dict(data)

    @property
    def sites(self) -> Sequence[str]:
        """Sites of the model's causal variables."""
        return tuple(getattr(self.model, "sites", ()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Do(dict(self.data))(self.model)(*args, **kwargs)


def do(model: Callable[..., Any], data: Actions) -> Intervened:
    """The program with named nodes set, c_j := value: mechanisms into them are cut, everything else stays.

    As `pyro.poutine.do`, which works on these models too; beyond it, names are checked, values may be arrays (one a
    cell) or functions of the node's natural value, and a later intervention on the same node replaces an earlier one.

    Args:
        model: a `LatentModel` or any program with sites for its causal variables.
        data: site (``"c_3"``) -> number, ``(n,)`` tensor, or function of the natural value.

    Raises:
        InterventionError: no such node, or a value of a kind that cannot be imposed.

    Example:
        >>> import torch
        >>> from pyro_scm import do, models
        >>> from pyro_scm.batch import Batch, Schema
        >>> schema = Schema(genes=("g0",), environments=("NT",), features=("r",), counts=False)
        >>> model = do(models.vae(schema, latent=2), {"c_1": 2.0})
        >>> import pyro
        >>> trace = pyro.poutine.trace(model).get_trace(Batch.example(schema).unobserved())
        >>> trace.nodes["c"]["value"][:, 1].tolist()
        [2.0, 2.0]
    """
    before = model.data if isinstance(model, Intervened) else {}
    program = model.model if isinstance(model, Intervened) else model
    known = getattr(program, "sites", None)
    if known is not None:
        refuse_unknown(data, known)
    return Intervened(program, {**before, **{name: _value(name, v) for name, v in data.items()}})


def _value(name: str, value: Value) -> Any:
    if callable(value) and not isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError):
        raise InterventionError(
            f"do({name} := {value!r}): give a number, one value a cell, or a function of the natural value"
        ) from None


def noise(model: Callable[..., Any], laws: Laws) -> Callable[..., Any]:
    """The program under a noise intervention: the law of single noise terms is replaced (seed definition 2).

    Args:
        model: a `LatentModel`.
        laws: site of a node (``"c_3"``) -> the new distribution of its noise z_3.

    Raises:
        InterventionError: no such node.
    """
    changed: Callable[..., Any] = NoiseIntervention(_components(model, laws))(model)
    return changed


def _components(model: Any, laws: Laws) -> dict[int, Distribution]:
    sites = list(model.sites)
    refuse_unknown(laws, sites)
    for name, law in laws.items():
        if not isinstance(law, Distribution) or law.batch_shape or law.event_shape:
            raise InterventionError(
                f"noise of {name} := {law!r}: give a distribution of one number, such as dist.Normal(0, 1)"
            )
    return {sites.index(name): law for name, law in laws.items()}


# ---------------------------------------------------------------------- answers
@dataclass(frozen=True)
class Worlds:
    """The same cells in the factual world and in the one asked for: they share their noise.

    Args:
        z: ``[K, S, n, d]`` abducted noise, K members, S draws of the posterior.
        factual_c: ``[K, S, n, d]``.
        c: ``[K, S, n, d]`` after the intervention.
        factual_x: ``[K, S, n, G]`` reconstructed expression E[x | c].
        x: ``[K, S, n, G]`` expression in the world asked for.
        cells: n names.
        genes: G names.
        nodes: d labels.
    """

    z: NDArray[np.float32]
    factual_c: NDArray[np.float32]
    c: NDArray[np.float32]
    factual_x: NDArray[np.float32]
    x: NDArray[np.float32]
    cells: tuple[str, ...]
    genes: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def effect(self) -> NDArray[np.float32]:
        """``[K, S, n, G]`` individual effects on expression."""
        difference: NDArray[np.float32] = self.x - self.factual_x
        return difference

    def to_anndata(self, cells: EnvironmentDataset | None = None, member: int = 0) -> "AnnData":
        """Expression averaged over members and draws, as layers ``factual`` and ``counterfactual``; X is the latter.

        Args:
            cells: the data set asked about, whose annotation is then kept.
            member: whose z and c are given, averaged over draws: latents of two members are not the same variables.
        """
        from anndata import AnnData

        obs = cells.obs.copy() if cells is not None else pd.DataFrame(index=list(self.cells))
        var = cells.var.copy() if cells is not None else pd.DataFrame(index=list(self.genes))
        x, factual = self.x.mean((0, 1)), self.factual_x.mean((0, 1))
        adata = AnnData(X=x, obs=obs, var=var, layers={"counterfactual": x.copy(), "factual": factual})
        adata.obsm["z"] = self.z[member].mean(0)
        adata.obsm["c"], adata.obsm["c_factual"] = self.c[member].mean(0), self.factual_c[member].mean(0)
        spread = self.x.mean(1).std(0) if len(self.x) > 1 else np.zeros_like(x)
        adata.layers["counterfactual_sd"] = spread
        adata.uns["nodes"] = np.array(self.nodes)
        return adata


@dataclass(frozen=True)
class Contrast:
    """Effects of one action against another, per cell.

    Args:
        values: ``[K, S, n, G]`` differences of expected expression.
        cells: n names.
        genes: G names.
    """

    values: NDArray[np.float32]
    cells: tuple[str, ...]
    genes: tuple[str, ...]

    def summary(self, level: float = 0.9) -> pd.DataFrame:
        """Average effect on each gene: mean, sd and interval over members and draws.

        Args:
            level: of the interval between quantiles.
        """
        average = self.values.mean(2).reshape(-1, len(self.genes))
        low, high = np.quantile(average, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return pd.DataFrame(
            {"effect": average.mean(0), "sd": average.std(0), "low": low, "high": high},
            index=pd.Index(self.genes, name="gene"),
        )


# ---------------------------------------------------------------------- counterfactuals
def counterfactual(
    fitted: Fitted,
    cells: EnvironmentDataset,
    *,
    do: Actions | None = None,
    environment: Place | None = None,
    covariates: Mapping[str, str] | None = None,
    noise: Laws | None = None,
    draws: int | None = None,
    sample: bool = False,
    seed: int = 0,
    site: str = X,
) -> Worlds:
    """What these cells would have been: abduction, action, prediction.

    With no action the counterfactual is the factual reconstruction. Under another environment what is held fixed is
    the standardised noise (z - mu_e) / sigma_e.

    Latents are learnt up to permutation, sign and scale: ``c_3`` of one member is not ``c_3`` of another. Ask a run
    about a node through one member, ``run.member(run.best)``; about an environment through all of them.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen.
        do: site (``"c_3"``) -> number, one value a cell, or function of the natural value.
        environment: to put the cells in: its name, or the representation ``[F]`` of one outside the table.
        covariates: covariate -> category that the cells would have had.
        noise: site -> new distribution of that node's noise, which is then drawn anew.
        draws: S samples of each cell's posterior; None for its mean.
        sample: draw x instead of giving its expectation given c, with the same random numbers in both worlds.
        seed: of the draws.
        site: the observed site to answer for: ``"x"``, or ``"y"`` for proteins.

    Raises:
        InterventionError: no such node.
        DataError: no such environment, covariate, category or site, no cells or draws, or an answer too large for
            memory.
    """
    if not len(cells) or (draws is not None and draws < 1):
        raise DataError(f"{len(cells)} cells and draws = {draws}: ask about some cells, with draws of 1 or more")
    worlds = []
    for k, (model, guide) in enumerate(members(fitted)):
        refuse_unknown(do or {}, model.sites)
        _check_size(len(cells) * (draws or 1), len(cells.genes), member_count(fitted))
        names = _observed(model, site, cells.schema if site != X else None) or cells.genes
        place = _place(fitted, cells, environment, covariates)
        with isolated(), forked():
            torch.manual_seed(seed + k)
            chunks = []
            for rows, batch in _chunks(cells, draws, model):
                act = _Action(_per_cell(do, rows, len(cells)), noise, place)
                chunks.append(_worlds(model, guide, batch, act, draws, sample, site))
        worlds.append({name: np.concatenate([c[name] for c in chunks], axis=1) for name in chunks[0]})
        nodes = tuple(str(n) for n in model.scm.nodes)
    stacked = {name: np.stack([w[name] for w in worlds]) for name in worlds[0]}
    return Worlds(**stacked, cells=cells.cells, genes=names, nodes=nodes)


@dataclass(frozen=True)
class _Action:
    do: Mapping[str, Any] | None
    noise: Laws | None
    place: Callable[[Batch], Batch] | None


def _worlds(
    model: Any, guide: Any, batch: Batch, act: _Action, draws: int | None, sample: bool, site: str
) -> dict[str, NDArray[np.float32]]:
    """Arrays ``[S, n, ...]`` of both worlds."""
    latents = abduct(guide, batch, draws)
    shared = int(torch.randint(2**31, ())) if sample else None  # x is drawn with the same noise in both worlds
    factual = _run(poutine.condition(model, data=latents), batch, draws, shared)
    world = batch
    if act.place is None:
        program = poutine.condition(model, data=latents)
    else:
        world = act.place(batch)
        program = _holding(model, latents, factual)
    # handlers act from the inside out: first the noise is given, then replaced, then the equations are cut
    if act.noise:
        program = NoiseIntervention(_components(model, act.noise))(program)
    if act.do:
        program = Do(dict(act.do))(program)
    asked = _run(program, world, draws, shared)
    return {
        "z": _numpy(factual.nodes[Z]["value"], draws),
        "factual_c": _numpy(factual.nodes[C]["value"], draws),
        "c": _numpy(asked.nodes[C]["value"], draws),
        "factual_x": _numpy(_expression(factual, sample, site), draws),
        "x": _numpy(_expression(asked, sample, site), draws),
    }


def _holding(model: Any, latents: Mapping[str, Tensor], factual: Any) -> Any:
    """The program with the standardised noise of the factual world, to be run in another environment."""
    law = diagonal(factual.nodes[Z]["fn"])
    others = {name: value for name, value in latents.items() if name != Z}
    return HoldNoise((latents[Z] - law.loc) / law.scale)(poutine.condition(model, data=others))


def transport(
    model: Any, guide: Any, batch: Batch, places: Iterable[Callable[[Batch], Batch]], draws: int | None = None
) -> Iterator[Any]:
    """Traces of observed cells as they are, then as they would be in each of several environments.

    Their noise is abducted once. Expression stays as observed in the traces, so that none is drawn: what is asked for
    is the distribution of site ``x``.

    Args:
        model: generative program.
        guide: its guide.
        batch: observed cells.
        places: the same cells in another environment, such as ``lambda b: run.environments.place(b, "drug")``.
        draws: S samples of each cell's posterior; None for its mean.
    """
    latents = abduct(guide, batch, draws)
    program = poutine.condition(model, data=latents)
    with _plate(draws):
        factual = poutine.trace(program).get_trace(batch)
    yield factual
    program = _holding(model, latents, factual)
    for place in places:
        with _plate(draws):
            trace = poutine.trace(program).get_trace(place(batch))
        yield trace


def abduct(guide: Any, batch: Batch, draws: int | None = None) -> dict[str, Tensor]:
    """Latent values from the guide: its means, or samples with a leading dimension of S draws.

    Args:
        guide: amortised guide.
        batch: observed cells.
        draws: S, or None for the means.
    """
    with _plate(draws):
        trace = poutine.trace(guide).get_trace(batch)
    names = [name for name in trace.stochastic_nodes if name not in (DATA, _DRAWS)]
    return {n: _mean(trace.nodes[n]["fn"]) if draws is None else trace.nodes[n]["value"] for n in names}


def _mean(law: Any) -> Tensor:
    """Mean of a law; its median where it is a transformed Normal, whose mean torch does not know."""
    try:
        return torch.as_tensor(law.mean)
    except NotImplementedError:
        base, transforms = reparametrised(law)
        value: Tensor = base.mean
        for transform in transforms:
            value = transform(value)
        return value


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Without gradients, checks, or traces in Pyro's parameter store."""
    with unstored(), torch.no_grad(), pyro.validation_enabled(False):
        yield


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _run(program: Any, batch: Batch, draws: int | None, seed: int | None) -> Any:
    """Trace of the program; without a seed nothing is drawn that the data have, and only the law of x is of use."""
    if seed is not None:
        torch.manual_seed(seed)
        batch = batch.unobserved()
    with _plate(draws):
        return poutine.trace(program).get_trace(batch)


def _plate(draws: int | None) -> Any:
    return contextlib.nullcontext() if draws is None else pyro.plate(_DRAWS, draws, dim=-2)


def _expression(trace: Any, sample: bool, site: str) -> Tensor:
    value: Tensor = trace.nodes[site]["value"] if sample else trace.nodes[site]["fn"].mean
    return value


def _observed(model: Any, site: str, schema: Schema | None) -> tuple[str, ...]:
    """Names of what an observed site other than x holds.

    Raises:
        DataError: the model has no such site.
    """
    if schema is None:
        return ()
    sites = [likelihood.site for likelihood in model.likelihoods]
    if site not in sites:
        raise DataError(f"no observed site {site!r}: this model has {', '.join(sites)}")
    return schema.proteins if site == Y else schema.genes


def _numpy(value: Tensor, draws: int | None) -> NDArray[np.float32]:
    array: NDArray[np.float32] = value.detach().cpu().numpy()
    return array[None] if draws is None else array


def _chunks(
    cells: EnvironmentDataset, draws: int | None, model: nn.Module
) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """Cells in parts that fit into memory with their draws, on the model's device."""
    device = _device(model)
    size = max(1, _CHUNK // (draws or 1))
    for start in range(0, len(cells), size):
        rows = np.arange(start, min(start + size, len(cells)))
        yield rows, cells.batch(rows).to(device)


def _per_cell(actions: Actions | None, rows: NDArray[np.int64], total: int) -> dict[str, Any] | None:
    """The part of per-cell values that belongs to these cells."""
    if not actions:
        return None
    part = {}
    for name, given in actions.items():
        value = _value(name, given)
        if isinstance(value, Tensor) and value.dim():
            if value.shape != (total,):
                raise InterventionError(
                    f"do({name}): {tuple(value.shape)} values for {total} cells: give a number or one value a cell"
                )
            value = value[torch.as_tensor(rows)]
        part[name] = value
    return part


def _place(
    fitted: Fitted, cells: EnvironmentDataset, place: Place | None, covariates: Mapping[str, str] | None
) -> Callable[[Batch], Batch] | None:
    if place is None and not covariates:
        return None
    codes = _codes(covariates or {}, cells.categories)
    if place is None:
        return lambda batch: _recoded(batch, codes)
    if not isinstance(place, str):
        r = torch.as_tensor(np.asarray(place, np.float32))
        return lambda batch: _recoded(batch.under(r), codes)
    environments = fitted.environments if isinstance(fitted, Run) else Environments.of(cells)
    environments.index(place)  # an unknown name is refused before any work
    return lambda batch: _recoded(environments.place(batch, place), codes)


def _codes(covariates: Mapping[str, str], categories: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The code of each covariate's category.

    Raises:
        DataError: no such covariate or category.
    """
    for name, value in covariates.items():
        if name not in categories:
            raise DataError(f"no covariate {name!r}: the cells have {listing(categories) or 'none'}")
        if value not in categories[name]:
            raise DataError(f"covariate {name!r} has no {value!r}: it has {listing(categories[name], 8)}")
    return {name: categories[name].index(value) for name, value in covariates.items()}


def _recoded(batch: Batch, codes: Mapping[str, int]) -> Batch:
    """The same cells with other covariates."""
    given = {name: torch.full_like(batch.env, code) for name, code in codes.items()}
    return replace(batch, covariates={**batch.covariates, **given}) if given else batch


def member_count(fitted: Fitted) -> int:
    """Number of members that `members` yields."""
    return 1 if isinstance(fitted, tuple) and isinstance(fitted[0], nn.Module) else len(fitted)


def _check_size(rows: int, genes: int, count: int) -> None:
    need = rows * genes * count * 8
    if need > _LARGEST_ANSWER:
        raise DataError(
            f"the answer would take {need / 2**30:.1f} GiB ({count} members x {rows} cell draws x {genes} genes): "
            "ask for fewer draws, or for some of the cells (cells.subset)"
        )


# ---------------------------------------------------------------------- contrasts, sweeps, predictions, embeddings
def effect(
    fitted: Fitted,
    cells: EnvironmentDataset,
    *,
    do: Actions | None = None,
    environment: Place | None = None,
    versus: Actions | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> Contrast:
    """E[x | do(a)] - E[x | do(b)] of each cell, its noise held fixed; b is no action by default.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen.
        do: action a on causal variables.
        environment: to put the cells in, as part of action a.
        versus: action b.
        draws: S samples of each cell's posterior; None for its mean.
        seed: of the draws.

    Raises:
        InterventionError: no such node.
        DataError: no such environment.
    """
    a = counterfactual(fitted, cells, do=do, environment=environment, draws=draws, seed=seed)
    b = a.factual_x if versus is None else counterfactual(fitted, cells, do=versus, draws=draws, seed=seed).x
    return Contrast(a.x - b, a.cells, a.genes)


def sweep(
    fitted: Fitted,
    cells: EnvironmentDataset,
    values: Sequence[float],
    nodes: Sequence[str] | None = None,
    *,
    expression: bool = True,
) -> dict[str, NDArray[np.float32]]:
    """do(c_j := v) for every node j and value v on the same cells, in one vectorised solution a member.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen; their noise is the guide's mean.
        values: V numbers.
        nodes: J sites; all by default.
        expression: also decode, which takes most of the time.

    Returns:
        ``c`` ``[K, J, V, n, d]`` and, with `expression`, ``x`` ``[K, J, V, G]``, the average over cells of E[x | c].

    Raises:
        InterventionError: no such node.
    """
    solved: dict[str, list[NDArray[np.float32]]] = {"c": [], "x": []} if expression else {"c": []}
    for member, guide in members(fitted):
        model: Any = member
        sites = list(model.sites)
        chosen = sites if nodes is None else list(nodes)
        refuse_unknown(chosen, sites)
        batch = cells.batch().to(_device(model))
        with isolated():
            latents = abduct(guide, batch)
            z = latents[Z]
            with poutine.condition(data=latents):  # shifts may have noise of their own
                shift = model.shift(batch) if model.shift is not None else 0.0
                gain = model.regime(batch) if model.regime is not None else None
            levels = torch.as_tensor(values, dtype=z.dtype, device=z.device)
            c = model.scm.solve_each(z + shift, [sites.index(name) for name in chosen], levels, gain)
            solved["c"].append(c.cpu().numpy())
            if expression:
                likelihood = model.likelihoods[0]
                x = torch.stack([torch.stack([likelihood.mean(cv, batch).mean(0) for cv in cj]) for cj in c])
                solved["x"].append(x.cpu().numpy())
    return {name: np.stack(parts) for name, parts in solved.items()}


def predict(
    run: Run,
    environment: Place,
    *,
    covariates: Mapping[str, str] | None = None,
    cells: int = 500,
    seed: int = 0,
    mean: bool = False,
    site: str = X,
) -> NDArray[np.float32]:
    """Cells simulated in an environment: z ~ p(z | e), c = scm(z), x ~ p(x | c).

    Args:
        run: from `fit` or `load`.
        environment: its name, or the representation ``[F]`` of one that the run has never heard of (such as `dosed`).
        covariates: covariate -> category of the cells; needed of those that the model uses.
        cells: to simulate.
        seed: of the simulation.
        mean: E[x | c] of each cell instead of a draw of x.
        site: the observed site to simulate: ``"x"``, or ``"y"`` for proteins.

    Returns:
        ``[K, cells, G]`` expression in the data's units (counts at the training cells' median library size).

    Raises:
        DataError: no such environment, covariate, category or site, or a representation of another length.
    """
    codes = _codes(covariates or {}, run.schema.covariates)
    used = [n for m in run.model.modules() if isinstance(m, CovariateShift) for n in m.names if n not in codes]
    if used:
        raise DataError(f"this model has effects of {listing(used)}: say which cells to simulate (covariates=...)")
    _observed(run.model, site, run.schema if site != X else None)
    zeros = torch.zeros(cells, dtype=torch.int64)
    template = replace(Batch.example(run.schema, cells), index=zeros, x=None, y=None, size=None)
    if isinstance(environment, str):
        batch = run.environments.place(template, environment)
    else:
        batch = template.under(torch.as_tensor(np.asarray(environment, np.float32)))
    batch = _recoded(batch, codes)
    results = []
    for k, (model, _) in enumerate(members(run)):
        device = _device(model)
        with isolated(), forked():
            torch.manual_seed(seed + k)
            trace = poutine.trace(model).get_trace(batch.to(device))
        results.append(_numpy(_expression(trace, not mean, site), 1))
    return np.stack(results)


def embed(fitted: Fitted, cells: EnvironmentDataset) -> dict[str, NDArray[np.float32]]:
    """Posterior means of the noise ``z`` and the causal variables ``c`` of cells, each ``[K, n, d]``."""
    found = counterfactual(fitted, cells)
    return {"z": found.z[:, 0], "c": found.factual_c[:, 0]}


def expose(model: Any) -> Callable[..., Any]:
    """The program with a site of its own for every causal variable: for traces, pictures and teaching."""
    exposed: Callable[..., Any] = Expose(model.sites)(model)
    return exposed

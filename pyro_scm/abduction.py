"""Abduction, action, prediction: what every question to a fitted model is made of."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor, nn

from pyro_scm.actions import Action, components, of_cells, placement
from pyro_scm.batch import Batch
from pyro_scm.chance import forked
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError
from pyro_scm.handlers import Do, HoldNoise, NoiseIntervention, diagonal, refuse_unknown, reparametrised, unstored
from pyro_scm.run import Fitted, Run, members
from pyro_scm.sites import DATA, X, Y, Z

__all__ = [
    "Abducted",
    "Prepared",
    "abduct",
    "alone",
    "answers",
    "causes",
    "device_of",
    "isolated",
    "member_count",
    "observed",
    "transport",
]

Arrays: TypeAlias = dict[str, NDArray[np.float32]]

_DRAWS = "draws"
_CHUNK = 2048
_LARGEST_ANSWER = 4 << 30


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Without gradients, checks, or traces in Pyro's parameter store."""
    with unstored(), torch.no_grad(), pyro.validation_enabled(False):
        yield


def member_count(fitted: Fitted) -> int:
    """Number of members that `members` yields."""
    return 1 if isinstance(fitted, tuple) and isinstance(fitted[0], nn.Module) else len(fitted)


def alone(fitted: Fitted) -> Iterator[Fitted]:
    """Each member as a fitted model of its own; one of a run keeps the environments that the run knows by name."""
    if not isinstance(fitted, Run):
        yield from members(fitted)
        return
    for k in range(len(fitted)):
        yield fitted.only(k)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


# ---------------------------------------------------------------------- abduction
def abduct(guide: Any, batch: Batch, draws: int | None = None) -> dict[str, Tensor]:
    """Latent values from the guide: its means, or samples with a leading dimension of S draws.

    Args:
        guide: amortised guide.
        batch: observed cells.
        draws: S, or None for the means.
    """
    with _plate(draws):
        sites = _latent_sites(guide, batch)
    return {name: _mean(site["fn"]) if draws is None else site["value"] for name, site in sites.items()}


def _latent_sites(guide: Any, batch: Batch) -> dict[str, Any]:
    trace = poutine.trace(guide).get_trace(batch)
    return {name: trace.nodes[name] for name in trace.stochastic_nodes if name not in (DATA, _DRAWS)}


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


def causes(model: Any, guide: Any, batch: Batch) -> Tensor:
    """Causal variables ``(n, d)`` of one draw of each cell's posterior; expression is not decoded."""
    latents = {name: site["value"] for name, site in _latent_sites(guide, batch).items()}
    with poutine.condition(data=latents):  # parts may have noise of their own
        _, shift, gain = model.parts(batch)
    c: Tensor = model.scm.solve(latents[Z] + shift, gain)
    return c


# ---------------------------------------------------------------------- action and prediction
@dataclass(frozen=True)
class Abducted:
    """Cells whose noise is known, ready to be put into other worlds.

    Args:
        model: generative program.
        batch: the cells.
        latents: values of its latent sites, with a leading dimension S if there are draws.
        draws: S, or None.
        seed: of what worlds draw; the same for all worlds, so that they share it.
    """

    model: Any
    batch: Batch
    latents: Mapping[str, Tensor]
    draws: int | None
    seed: int

    def factual(self, sample: bool = False) -> Any:
        """Trace of the world as it was.

        Args:
            sample: draw expression; otherwise what was observed stays, and only the law of x is of use.
        """
        batch = self.batch.unobserved() if sample else self.batch
        return self._trace(poutine.condition(self.model, data=self.latents), batch)

    def world(
        self,
        action: "Prepared",
        factual: Any,
        clamp: Mapping[str, Tensor] | None = None,
        sample: bool = False,
    ) -> Any:
        """Trace of the world in which something is different.

        Args:
            action: what is.
            factual: trace of the world as it was.
            clamp: site -> value of causal variables that are held in addition, such as mediators.
            sample: see `factual`.
        """
        batch = self.batch.unobserved() if sample else self.batch
        if action.place is None:
            program = poutine.condition(self.model, data=self.latents)
        else:
            batch = action.place(batch)
            program = held(self.model, self.latents, factual)
        # handlers act from the inside out: first the noise is given, then replaced, then the equations are cut
        if action.noise:
            program = NoiseIntervention(components(self.model, action.noise))(program)
        if action.do or clamp:
            program = Do({**action.do, **(clamp or {})})(program)
        return self._trace(program, batch)

    def _trace(self, program: Any, batch: Batch) -> Any:
        torch.manual_seed(self.seed)
        with _plate(self.draws):
            return poutine.trace(program).get_trace(batch)


@dataclass(frozen=True)
class Prepared:
    """An action on one batch of cells: values of these cells, and what puts them into their environment."""

    do: Mapping[str, Any]
    noise: Mapping[str, Any]
    place: Callable[[Batch], Batch] | None


def held(model: Any, latents: Mapping[str, Tensor], factual: Any) -> Any:
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
    program = held(model, latents, factual)
    for place in places:
        with _plate(draws):
            trace = poutine.trace(program).get_trace(place(batch))
        yield trace


def _plate(draws: int | None) -> Any:
    return contextlib.nullcontext() if draws is None else pyro.plate(_DRAWS, draws, dim=-2)


# ---------------------------------------------------------------------- questions about many cells
def answers(
    fitted: Fitted,
    cells: EnvironmentDataset,
    actions: Mapping[str, Action],
    ask: Callable[[Abducted, Mapping[str, Prepared]], Mapping[str, Tensor]],
    draws: int | None,
    seed: int,
) -> Arrays:
    """What `ask` finds of all cells, in parts that fit into memory, for every member.

    Args:
        fitted: a run, or (model, guide).
        cells: that were seen.
        actions: by name, as `ask` is given them.
        ask: (cells with their noise, actions) -> name -> ``(n, ...)``, or ``(S, n, ...)`` if there are draws.
        draws: S samples of each cell's posterior; None for its mean.
        seed: of the draws.

    Returns:
        Name -> ``[K, S, n, ...]``.

    Raises:
        InterventionError: no such node.
        DataError: no such environment, no cells or draws, or an answer too large for memory.
    """
    if not len(cells) or (draws is not None and draws < 1):
        raise DataError(f"{len(cells)} cells and draws = {draws}: ask about some cells, with draws of 1 or more")
    placed = {name: placement(action, fitted, cells) for name, action in actions.items()}
    found = []
    for k, (model, guide) in enumerate(members(fitted)):
        for action in actions.values():
            refuse_unknown(action.nodes, model.sites)
        _check_size(len(cells) * (draws or 1), len(cells.genes), member_count(fitted))
        with isolated(), forked():
            chunks = []
            for rows, batch in _chunks(cells, draws, model):
                # seeds of its own: what one world draws must not move the noise that the next cells are given
                mine, shared = (int(s) for s in np.random.SeedSequence([seed, k, rows[0]]).generate_state(2))
                torch.manual_seed(mine)
                abducted = Abducted(model, batch, abduct(guide, batch, draws), draws, shared)
                prepared = {
                    name: Prepared(
                        of_cells("do", action.do, rows, len(cells)),
                        of_cells("noise", action.noise, rows, len(cells)),
                        placed[name],
                    )
                    for name, action in actions.items()
                }
                chunks.append({n: as_array(v, draws) for n, v in ask(abducted, prepared).items()})
        found.append({name: np.concatenate([c[name] for c in chunks], axis=1) for name in chunks[0]})
    return {name: np.stack([f[name] for f in found]) for name in found[0]}


def as_array(value: Tensor, draws: int | None) -> NDArray[np.float32]:
    """``[S, n, ...]`` on the host; S = 1 without draws."""
    array: NDArray[np.float32] = value.detach().cpu().numpy()
    return array[None] if draws is None else array


def _chunks(
    cells: EnvironmentDataset, draws: int | None, model: nn.Module
) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """Cells in parts that fit into memory with their draws, on the model's device."""
    device = device_of(model)
    size = max(1, _CHUNK // (draws or 1))
    for start in range(0, len(cells), size):
        rows = np.arange(start, min(start + size, len(cells)))
        yield rows, cells.batch(rows).to(device)


def _check_size(rows: int, genes: int, count: int) -> None:
    need = rows * genes * count * 8
    if need > _LARGEST_ANSWER:
        raise DataError(
            f"the answer would take {need / 2**30:.1f} GiB ({count} members x {rows} cell draws x {genes} genes): "
            "ask for fewer draws, or for some of the cells (cells.subset)"
        )


def observed(model: Any, site: str, cells: Any) -> tuple[str, ...]:
    """Names of what an observed site holds: genes of ``"x"``, proteins of ``"y"``.

    Args:
        model: a `LatentModel`.
        site: the observed site.
        cells: data set or schema, which name them.

    Raises:
        DataError: the model has no such site.
    """
    if site != X:
        sites = [likelihood.site for likelihood in model.likelihoods]
        if site not in sites:
            raise DataError(f"no observed site {site!r}: this model has {', '.join(sites)}")
    return tuple(cells.proteins if site == Y else cells.genes)

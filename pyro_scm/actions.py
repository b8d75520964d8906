"""What is to be different: values and laws of causal variables and of their noise, environments, covariates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from pyro_scm.batch import Batch
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, InterventionError, listing
from pyro_scm.handlers import Do, NoiseIntervention, refuse_unknown
from pyro_scm.run import Environments, Fitted, Run

__all__ = ["Action", "Actions", "Place", "Value", "do", "noise"]

Value: TypeAlias = float | Tensor | NDArray[Any] | Distribution | Callable[[Tensor], Tensor | Distribution]
"""A number, one value a cell, a law to draw from, or a function of the natural value that gives a value or a law."""
Actions: TypeAlias = Mapping[str, Value]
Place: TypeAlias = str | NDArray[Any]


@dataclass(frozen=True)
class Action:
    """All that is to be different in one world; nothing, by default.

    Args:
        do: site of a causal variable (``"c_3"``) -> what it is set to.
        noise: site of a causal variable -> what its noise z_3 is set to; its mechanism stays.
        environment: to put the cells in: its name, or the representation ``[F]`` of one outside the table.
        covariates: covariate -> category that the cells would have had.
    """

    do: Actions | None = None
    noise: Actions | None = None
    environment: Place | None = None
    covariates: Mapping[str, str] | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        """Sites of the causal variables that are acted on, themselves or through their noise."""
        return tuple(dict.fromkeys([*(self.do or {}), *(self.noise or {})]))

    @property
    def idle(self) -> bool:
        """Whether nothing is different."""
        return not self.nodes and self.environment is None and not self.covariates


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
    cell), laws that are drawn from (a stochastic intervention) or functions of the node's natural value, and a later
    intervention on the same node replaces an earlier one.

    Args:
        model: a `LatentModel` or any program with sites for its causal variables.
        data: site (``"c_3"``) -> number, ``(n,)`` tensor, distribution of one number, or function of the natural value.

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
    return Intervened(program, {**before, **{name: _value("do", name, v) for name, v in data.items()}})


def noise(model: Callable[..., Any], laws: Actions) -> Callable[..., Any]:
    """The program under a noise intervention: single noise terms are replaced (seed definition 2), mechanisms stay.

    Args:
        model: a `LatentModel`.
        laws: site of a node (``"c_3"``) -> the new distribution of its noise z_3, a number, ``(n,)`` tensor, or
            function of the natural noise.

    Raises:
        InterventionError: no such node, or a value of a kind that cannot be imposed.
    """
    changed: Callable[..., Any] = NoiseIntervention(components(model, laws))(model)
    return changed


def components(model: Any, laws: Actions) -> dict[int, Any]:
    """Position in z -> value, for `NoiseIntervention`.

    Args:
        model: a `LatentModel`.
        laws: see `noise`.
    """
    sites = list(model.sites)
    refuse_unknown(laws, sites)
    return {sites.index(name): _value("noise", name, law) for name, law in laws.items()}


def _value(kind: str, name: str, value: Any) -> Any:
    if isinstance(value, Distribution):  # before functions: distributions of Pyro can be called
        if value.batch_shape or value.event_shape:
            raise InterventionError(
                f"{kind}({name} := {value!r}): give a distribution of one number, such as dist.Normal(0, 1), or a "
                "function of the natural value that gives each cell a distribution"
            )
        return value
    if callable(value) and not isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError):
        raise InterventionError(
            f"{kind}({name} := {value!r}): give a number, one value a cell, a distribution, or a function of the "
            "natural value"
        ) from None


# ---------------------------------------------------------------------- an action on some of the cells
def of_cells(kind: str, actions: Actions | None, rows: NDArray[np.int64], total: int) -> dict[str, Any]:
    """The part of per-cell values that belongs to some of the cells.

    Args:
        kind: ``"do"`` or ``"noise"``, for the message.
        actions: on all cells.
        rows: which cells.
        total: number of all cells.

    Raises:
        InterventionError: another number of values than cells.
    """
    part = {}
    for name, given in (actions or {}).items():
        value = _value(kind, name, given)
        if isinstance(value, Tensor) and value.dim():
            if value.shape != (total,):
                raise InterventionError(
                    f"{kind}({name}): {tuple(value.shape)} values for {total} cells: give a number or one value a cell"
                )
            value = value[torch.as_tensor(rows)]
        part[name] = value
    return part


def placement(action: Action, fitted: Fitted, cells: EnvironmentDataset) -> Callable[[Batch], Batch] | None:
    """What puts a batch of cells into the action's environment and covariates; None where it has neither.

    Raises:
        DataError: no such environment, covariate or category.
    """
    place = action.environment
    if place is None and not action.covariates:
        return None
    codes = category_codes(action.covariates or {}, cells.categories)
    if place is None:
        return lambda batch: recoded(batch, codes)
    if not isinstance(place, str):
        r = torch.as_tensor(np.asarray(place, np.float32))
        return lambda batch: recoded(batch.under(r), codes)
    environments = fitted.environments if isinstance(fitted, Run) else Environments.of(cells)
    environments.index(place)  # an unknown name is refused before any work
    return lambda batch: recoded(environments.place(batch, place), codes)


def category_codes(covariates: Mapping[str, str], categories: Mapping[str, Sequence[str]]) -> dict[str, int]:
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


def recoded(batch: Batch, codes: Mapping[str, int]) -> Batch:
    """The same cells with other covariates."""
    given = {name: torch.full_like(batch.env, code) for name, code in codes.items()}
    return replace(batch, covariates={**batch.covariates, **given}) if given else batch

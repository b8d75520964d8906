"""What perturbations, doses and covariates do to the latents, as a sum: the compositional family.

    shift = sum_m f_m(a_m) V[m] + sum_j V_cov_j[cov_j]

A combination is the sum of its parts. Perturbations and their amounts a_m are read off the environment's
representation by the names of its features (`Columns`), cell line and time too; other covariates are the cells' own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_scm.batch import DOSE, PART, Batch, Schema
from pyro_scm.distributions import normal
from pyro_scm.dosers import AmortisedDoser, doser_for
from pyro_scm.errors import ModelError, listing
from pyro_scm.nn import mlp

__all__ = ["Columns", "CompositionShift", "CovariateShift", "DosedShift", "MoleculeShift", "ShiftedPrior", "dosed"]

_NAMED = (DOSE, "perturbation=")
_CONTEXT = ("cell_line=", "time /")  # what is known of an environment that a reference has too
_DOSE = "log10(1 + dose)"
_UNKNOWN = " unknown"


@dataclass(frozen=True)
class Columns:
    """What the features of an environment's representation stand for.

    Args:
        perturbations: names -> positions of features that are one perturbation's own: ``dose=NAME`` (kind
            ``"multi-dose"``, in uM) or ``perturbation=NAME`` (``"multi-hot"``, ``"one-hot"``).
        context: positions of cell line and time.
        dose: positions of the one dose of an environment, and of the flag that it is unknown (kind ``"dose"``).
        others: positions of all other features, such as a molecule's.
    """

    perturbations: dict[str, int]
    context: list[int]
    dose: list[int]
    others: list[int]

    @staticmethod
    def of(schema: Schema) -> "Columns":
        """The columns of a data set's representation."""
        found = Columns({}, [], [], [])
        for i, name in enumerate(schema.features):
            if name.startswith(_NAMED):
                found.perturbations[name.partition("=")[2]] = i
            elif name.startswith(_CONTEXT):
                found.context.append(i)
            elif name.startswith(_DOSE):
                found.dose.append(i)
            else:
                found.others.append(i)
        return found

    @property
    def amounts(self) -> list[int]:
        """Positions of amounts: of the named perturbations, else of all other features, each as one perturbation.

        Raises:
            ModelError: names in one feature and doses in another, whose product would be the amount.
        """
        if self.dose:
            raise ModelError(
                "the representation holds perturbations and doses apart: take 'multi-dose' (uM) or 'multi-hot' "
                "(log10(1 + uM)), whose features are the dose of each perturbation"
            )
        return list(self.perturbations.values()) or self.others


def dosed(
    schema: Schema, amounts: Mapping[str, float], context: Mapping[str, float] | None = None
) -> NDArray[np.float32]:
    """``[F]`` representation of a condition of named perturbations, which need not be in the environments' table.

    For `predict` and `counterfactual`: ``predict(run, dosed(run.schema, {"nutlin": 1.0, "dex": 0.1}))``.

    Args:
        schema: of the run.
        amounts: perturbation -> amount in the representation's unit: uM (``"multi-dose"``), log10(1 + uM)
            (``"multi-hot"``), 1 for a genetic perturbation.
        context: feature of a cell line or time -> value, such as ``{"cell_line=A549": 1}``.

    Raises:
        ModelError: a perturbation or feature that the representation has not.
    """
    columns = Columns.of(schema)
    features = {schema.features[i]: i for i in columns.context}
    unknown = [n for n in amounts if n not in columns.perturbations] + [n for n in context or {} if n not in features]
    if unknown:
        known = listing([*columns.perturbations, *features], 8) or "none by name"
        raise ModelError(f"the representation has no {listing(unknown)}: it has {known}")
    row = np.zeros(len(schema.features), np.float32)
    for name, amount in amounts.items():
        row[columns.perturbations[name]] = amount
    for name, value in (context or {}).items():
        row[features[name]] = value
    return row


class _Positions(nn.Module):
    """Some columns of a table."""

    def __init__(self, positions: Sequence[int]) -> None:
        super().__init__()
        self.positions: Tensor
        self.register_buffer("positions", torch.tensor(positions, dtype=torch.int64), persistent=False)

    def forward(self, r: Tensor) -> Tensor:
        return r.index_select(-1, self.positions)


class CovariateShift(nn.Module):
    """shift = V r_context + sum_j V_cov_j[cov_j]: additive effects of cell line and time, and of cells' covariates.

    References have them too. Without any of these it is 0.

    Args:
        schema: of the training cells.
        latent: d.
        covariates: names of the cells' covariates that have an effect.

    Raises:
        ModelError: an unknown covariate.
    """

    def __init__(self, schema: Schema, latent: int, covariates: Sequence[str] = ()) -> None:
        super().__init__()
        unknown = [name for name in covariates if name not in schema.covariates]
        if unknown:
            known = listing(schema.covariates) or "none"
            raise ModelError(f"no covariate {listing(unknown)}: the cells have {known} (from_anndata(covariates=...))")
        self.names = tuple(covariates)
        context = Columns.of(schema).context
        self.columns = _Positions(context)
        self.context = nn.Parameter(torch.empty(len(context), latent)) if context else None
        self.tables = nn.ParameterList(torch.empty(len(schema.covariates[name]), latent) for name in self.names)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal vectors."""
        for p in self.parameters():
            nn.init.normal_(p, std=0.1)

    def forward(self, batch: Batch) -> Tensor | float:
        """``(n, d)``, or 0."""
        total: Tensor | float = 0.0
        if self.context is not None:
            total = F.embedding(batch.row, self.columns(batch.r) @ self.context)
        for name, table in zip(self.names, self.tables, strict=True):
            total = total + F.embedding(batch.covariates[name], table)
        return total


class _Effects(nn.Module):
    """Abstract: a shift that is a function of the representation alone, `effects`; 0 in a reference environment."""

    def effects(self, r: Tensor) -> Tensor:
        """r ``(R, F)`` -> ``(R, d)``."""
        raise NotImplementedError  # abstract

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and unit scale of environments r ``(R, F)``: two tensors ``(R, d)``."""
        loc = self.effects(r) * perturbed.unsqueeze(-1)
        return loc, torch.ones_like(loc)

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        return F.embedding(batch.row, self.moments(batch.r, batch.perturbed)[0])


class DosedShift(_Effects):
    """shift(e) = sum_m f_m(a_em) V[m]: each perturbation has a direction of its own and a curve (CPA).

    Args:
        schema: of the training cells.
        latent: d.
        doser: kind of the curves f_m, of `dosers.DOSERS`.
        hidden: units of each perturbation's network, for ``"mlp"`` curves.

    Raises:
        ModelError: an unknown kind, or a representation that is not one of perturbations.
    """

    def __init__(self, schema: Schema, latent: int, doser: str = "linear", hidden: int = 32) -> None:
        super().__init__()
        positions = Columns.of(schema).amounts
        self.columns = _Positions(positions)
        self.doser = doser_for(doser, len(positions), hidden)
        self.directions = nn.Parameter(torch.empty(len(positions), latent))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal vectors."""
        nn.init.normal_(self.directions, std=0.1)

    def strengths(self, r: Tensor) -> Tensor:
        """f_m(a_em), ``(R, F) -> (R, M)``."""
        result: Tensor = self.doser(self.columns(r))
        return result

    def effects(self, r: Tensor) -> Tensor:
        """r ``(R, F)`` -> ``(R, d)``."""
        return self.strengths(r) @ self.directions


class MoleculeShift(_Effects):
    """shift(e) = sum over the parts p of S(h_p, a_p) M(h_p), h_p = G(molecule of part p) (chemCPA).

    A molecule is described by all features that are neither context nor dose: fingerprint, descriptors, or numbers of
    the user's own; the amount is log10(1 + uM) of the feature dose, 1 where there is none. Representation
    ``"molecules"`` describes every part of a combination. With `embedding`, h is a free vector for each named
    perturbation instead, and the amounts are those of `DosedShift`.

    Args:
        schema: of the training cells.
        latent: d.
        hidden: widths of G's hidden layers; the last is the length of h.
        doser: kind of S.
        embedding: whether h is learnt for each perturbation.

    Raises:
        ModelError: a representation without molecules, or with `embedding` without names.
    """

    def __init__(
        self,
        schema: Schema,
        latent: int,
        hidden: Sequence[int] = (128,),
        doser: str = "sigmoid",
        embedding: bool = False,
    ) -> None:
        super().__init__()
        columns = Columns.of(schema)
        width = hidden[-1]
        self.table = nn.Parameter(torch.empty(len(columns.perturbations), width)) if embedding else None
        if embedding:
            if not columns.perturbations:
                raise ModelError(
                    "a learnt embedding needs a feature for each perturbation: take the representation 'multi-dose', "
                    "'multi-hot' or 'one-hot'"
                )
            self.amounts = _Positions(columns.amounts)
        else:
            if columns.perturbations:
                raise ModelError(
                    "the representation names perturbations and describes no molecule: take 'molecules', or 'morgan' "
                    "with 'descriptors' and 'dose', or rows of your own; or a learnt embedding of the names"
                )
            molecules, doses, unknown = _parts(schema, columns)
            self.parts = len(molecules)
            self.molecules = _Positions([i for part in molecules for i in part])
            self.amounts, self.unknown = _Positions(doses), _Positions(unknown)
            self.encoder = nn.Sequential(mlp(len(molecules[0]), hidden[:-1], width), nn.ReLU())
        self.direction = nn.Linear(width, latent)
        self.strength = AmortisedDoser(width, doser)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Standard normal embeddings; networks have drawn their own."""
        if self.table is not None:
            nn.init.normal_(self.table)

    def described(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """h and amounts of the parts: ``(R, P, H)`` or ``(M, H)``, and ``(R, P)`` or ``(R, M)``."""
        if self.table is not None:
            return self.table, self.amounts(r)
        h: Tensor = self.encoder(self.molecules(r).unflatten(-1, (self.parts, -1))).to(r.dtype)
        if not len(self.amounts.positions):
            return h, r.new_ones(*r.shape[:-1], self.parts)
        amounts = self.amounts(r)
        return h, amounts + self.unknown(r) if len(self.unknown.positions) else amounts

    def effects(self, r: Tensor) -> Tensor:
        """r ``(R, F)`` -> ``(R, d)``."""
        h, amounts = self.described(r)
        strength: Tensor = self.strength(h, amounts)
        direction: Tensor = self.direction(h).to(r.dtype)
        return strength @ direction if self.table is not None else (strength.unsqueeze(-1) * direction).sum(-2)


def _parts(schema: Schema, columns: Columns) -> tuple[list[list[int]], list[int], list[int]]:
    """Positions of each part's molecule, of the parts' doses, and of the flag that the dose is unknown."""
    if not columns.others:
        raise ModelError("the representation describes no molecule: take 'molecules', or 'morgan' and 'dose'")
    molecules: dict[str, list[int]] = {}
    doses: list[int] = []
    for i in columns.others:
        head, _, rest = schema.features[i].partition(": ")
        own = head if head.startswith(PART) else ""
        if own and rest.startswith(_DOSE):
            doses.append(i)
        else:
            molecules.setdefault(own, []).append(i)
    if len(molecules) > 1 and (len({len(part) for part in molecules.values()}) > 1 or columns.dose):
        raise ModelError(
            "the representation describes parts of combinations and something else: take 'molecules' alone, or beside "
            "cell line and time"
        )
    flags = [i for i in columns.dose if schema.features[i].endswith(_UNKNOWN)]
    return list(molecules.values()), doses + [i for i in columns.dose if i not in flags], flags


class CompositionShift(nn.Module):
    """shift = effects(e) + covariates: what perturbations do, and what cell line, time and covariates do.

    Args:
        effects: a shift of the perturbations.
        covariates: of the covariates.
    """

    def __init__(self, effects: nn.Module, covariates: CovariateShift) -> None:
        super().__init__()
        self.effects, self.covariates = effects, covariates

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Of the effects: what the environments do beyond the covariates."""
        result: tuple[Tensor, Tensor] = self.effects.moments(r, perturbed)  # type: ignore[operator]
        return result

    def forward(self, batch: Batch) -> Tensor:
        """``(n, d)``."""
        total: Tensor = self.effects(batch) + self.covariates(batch)
        return total


class ShiftedPrior(nn.Module):
    """z | e ~ N(m + shift(e), I), m learnt: a shift in centred coordinates, where z holds what the environment does.

    Args:
        shift: batch -> ``(n, d)``.
        latent: d.
    """

    def __init__(self, shift: Any, latent: int) -> None:
        super().__init__()
        self.shift, self.latent = shift, latent
        self.centre = nn.Parameter(torch.empty(latent))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The reference at 0."""
        nn.init.zeros_(self.centre)

    def moments(self, r: Tensor, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, from that of the reference, and unit scale of environments."""
        result: tuple[Tensor, Tensor] = self.shift.moments(r, perturbed)
        return result

    def forward(self, batch: Batch) -> Any:
        """Normal of batch shape (n,), event shape (d,)."""
        loc = self.centre + self.shift(batch)
        return normal(loc, torch.ones_like(loc))

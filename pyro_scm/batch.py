"""What a generative program sees: a mini-batch of cells, and the schema that sizes its parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_scm.errors import DataError
from pyro_scm.sites import DATA

__all__ = ["DOSE", "PART", "Batch", "Schema", "Statistics"]

DOSE = "dose="
"""How the names of features begin that hold the dose of one perturbation in uM: ``dose=NAME``."""

PART = "part "
"""How the names of features begin that describe one part of a combination: ``part 1: NAME``."""


@dataclass(frozen=True)
class Statistics:
    """Summary of the cells that a schema describes, for initial values and for standardising the encoder's input.

    Args:
        mean: ``(G,)`` mean expression; of log1p(x / size * depth) where the data are counts.
        scale: ``(G,)`` its standard deviation, 1 where a gene is constant.
        proportion: ``(G,)`` share of each gene in all counts; zeros where the data are not counts.
        depth: library size to which counts are normalised: the median of the cells'.
        log_background: ``(P,)`` log of 1 + the count that a fifth of the cells stay below, of each surface protein;
            None without proteins.
    """

    mean: Tensor
    scale: Tensor
    proportion: Tensor
    depth: float
    log_background: Tensor | None = None

    @staticmethod
    def neutral(genes: int) -> "Statistics":
        """No shift and unit scale: what a model is built with before its saved buffers are loaded."""
        return Statistics(torch.zeros(genes), torch.ones(genes), torch.full((genes,), 1 / genes), 1.0)


@dataclass(frozen=True)
class Schema:
    """Names and sizes of a data set; everything a model needs to know of it before it sees a cell.

    Args:
        genes: names of the G genes.
        environments: names of the E environments, training and held-out.
        features: names of the F columns of the environments' representation.
        counts: whether x holds counts (True) or continuous values such as log1p-normalised expression (False).
        covariates: categories of each cell covariate.
        proteins: names of the P surface proteins.
        cells: number N of cells: the size of the plate ``data``.
        statistics: of these N cells; not part of `as_json`.
    """

    genes: tuple[str, ...]
    environments: tuple[str, ...]
    features: tuple[str, ...]
    counts: bool
    covariates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    proteins: tuple[str, ...] = ()
    cells: int = 1
    statistics: Statistics | None = field(default=None, compare=False, repr=False)

    @property
    def summary(self) -> Statistics:
        """`statistics`, or neutral ones where none are known."""
        return self.statistics or Statistics.neutral(len(self.genes))

    @property
    def doses(self) -> list[int]:
        """Positions of the features that hold the dose of one perturbation in uM (representation ``"multi-dose"``)."""
        return [i for i, name in enumerate(self.features) if name.startswith(DOSE)]

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers, without the statistics."""
        return {
            "genes": list(self.genes),
            "environments": list(self.environments),
            "features": list(self.features),
            "counts": self.counts,
            "covariates": {name: list(values) for name, values in self.covariates.items()},
            "proteins": list(self.proteins),
            "cells": self.cells,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Schema":
        """Inverse of `as_json`."""
        return Schema(
            genes=tuple(data["genes"]),
            environments=tuple(data["environments"]),
            features=tuple(data["features"]),
            counts=bool(data["counts"]),
            covariates={name: tuple(values) for name, values in data["covariates"].items()},
            proteins=tuple(data["proteins"]),
            cells=int(data["cells"]),
        )


@dataclass(frozen=True)
class Batch:
    """n cells and the R distinct environments among them.

    Environments are kept once each, so that environment networks are evaluated once per distinct environment. A few
    rows of `r` may belong to no cell of the batch: `row` says which of them count.

    Args:
        index: ``(n,)`` int64, rows of the data set: the subsample of the plate ``data``.
        env: ``(n,)`` int64, index of each cell's environment in the data set's table; -1 for one outside it.
        row: ``(n,)`` int64, index of each cell's environment in `r`.
        r: ``(R, F)`` representations of the distinct environments.
        perturbed: ``(R,)`` 0. for a reference environment, 1. for any other.
        total: number N of cells in the data set: the size of the plate ``data``.
        x: ``(n, G)`` expression, counts or continuous as the schema says; None in an unobserved world.
        y: ``(n, P)`` protein counts, or None.
        size: ``(n,)`` library size of x; None where the data are not counts.
        covariates: name -> ``(n,)`` int64 category.
        large: positions of the genes with large counts (`distributions.TABLE` or more) anywhere in the data set, where
            that is known: what is computed then depends on no cell's counts.
        outside: whether the cells' environment is outside the data set's table (env is then -1).
    """

    index: Tensor
    env: Tensor
    row: Tensor
    r: Tensor
    perturbed: Tensor
    total: int
    x: Tensor | None = None
    y: Tensor | None = None
    size: Tensor | None = None
    covariates: Mapping[str, Tensor] = field(default_factory=dict)
    large: Tensor | None = None
    outside: bool = False

    @staticmethod
    def example(schema: Schema, cells: int = 2) -> "Batch":
        """Cells that were never measured, of a data set's sizes: what a guide is built from."""
        zeros = torch.zeros(cells, dtype=torch.int64)
        return Batch(
            index=torch.arange(cells),
            env=zeros,
            row=zeros,
            r=torch.zeros(1, len(schema.features)),
            perturbed=torch.ones(1),
            total=max(schema.cells, cells),
            x=torch.zeros(cells, len(schema.genes)),
            y=torch.zeros(cells, len(schema.proteins)) if schema.proteins else None,
            size=torch.ones(cells) if schema.counts else None,
            covariates=dict.fromkeys(schema.covariates, zeros),
        )

    def plate(self) -> Any:
        """Plate ``data`` over these cells, scaled to the N cells of the data set."""
        return pyro.plate(DATA, self.total, subsample=self.index, dim=-1)

    def __len__(self) -> int:
        return self.env.shape[-1]

    @property
    def e(self) -> Tensor:
        """``(n, F)`` environment representation of each cell."""
        return self.r[self.row]

    def unobserved(self) -> "Batch":
        """The same cells with nothing measured: the world in which a model simulates."""
        return replace(self, x=None, y=None)

    def under(self, r: Tensor, env: int = -1, perturbed: bool = True) -> "Batch":
        """The same cells in one other environment.

        Args:
            r: ``(F,)`` its representation.
            env: its index in the data set's table, -1 if it has none.
            perturbed: False if it is a reference environment.

        Raises:
            DataError: r has another number of features.
        """
        if r.shape != self.r.shape[-1:]:
            raise DataError(
                f"an environment is represented by {self.r.shape[-1]} features, got shape {tuple(r.shape)}: "
                "give a vector with the data set's features"
            )
        return replace(
            self,
            env=torch.full_like(self.env, env),
            row=torch.zeros_like(self.row),
            r=r.to(self.r)[None],
            perturbed=torch.tensor([float(perturbed)]).to(self.r),
            outside=env < 0,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, covariates as ``covariates.<name>``; `with_tensors` puts them back."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        found = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        return found | {f"covariates.{name}": value for name, value in self.covariates.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Batch":
        """The same batch with other tensors under the names of `tensors`."""
        prefix = "covariates."
        covariates = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        own: dict[str, Any] = {n: v for n, v in tensors.items() if not n.startswith(prefix)}
        return replace(self, **own, covariates={**self.covariates, **covariates})

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        return self.with_tensors({name: value.to(device) for name, value in self.tensors().items()})

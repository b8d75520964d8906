"""Tiny synthetic screens and runs on them, each made once; tests share them and must not change them."""

import functools
from dataclasses import replace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_scm import recipes
from pyro_scm.batch import Batch, Schema
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.distributions import normal
from pyro_scm.infer import fit
from pyro_scm.model import LatentModel
from pyro_scm.models.building import decoder
from pyro_scm.run import Run

SIZES: dict[str, Any] = {"latent": 3, "genes": 8, "environments": 4, "cells": 25, "descriptors": 5}
SMALL: dict[str, Any] = {"latent": 3, "hidden": (6,), "guide_hidden": (7,)}
KINDS = ("gaussian", "negative-binomial")
SECOND_SEED = (
    "cpa", "chemcpa", "multicpa", "scgen", "sams_vae", "svae_plus", "discrepancy_vae",
    "latent_additive", "decoder_only",
)  # fmt: skip


@functools.cache
def screen(observation: str = "gaussian") -> anndata.AnnData:
    """Three latents in a chain, eight genes, a control and three environments of 25 cells."""
    return synthetic.simulate(graph=[[0, 1], [1, 2]], observation=observation, **SIZES)


@functools.cache
def cells(observation: str = "gaussian") -> EnvironmentDataset:
    """The cells of `screen`, environments described by five descriptors, half of the cells in each of two plates."""
    adata = screen(observation).copy()
    proteins = np.random.default_rng(0).poisson(np.linspace(2, 20, 4), (adata.n_obs, 4))
    adata.obsm["protein"] = pd.DataFrame(proteins, adata.obs_names, ["CD3", "CD4", "CD8", "CD19"])
    adata.obs["plate"] = np.where(np.arange(adata.n_obs) % 2, "odd", "even")
    return EnvironmentDataset.from_anndata(
        adata,
        environment="perturbation",
        control=synthetic.CONTROL,
        targets="targets",
        representation=adata.uns["descriptors"],
        covariates=("plate",),
        proteins="protein",
    )


def options(name: str) -> dict[str, Any]:
    """Options that make a named model small."""
    own = {"environment_hidden": (4,)} if "environment_hidden" in recipes.RECIPES[name].options else {}
    return {**SMALL, **own, **({"depth": 3} if name.startswith("structured") else {})}


def make(name: str, schema: Schema, **others: Any) -> tuple[Any, Any]:
    """A small model of this name and its guide, always with the same parameters."""
    torch.manual_seed(1)
    return recipes.make(name, schema, **{**options(name), **others})


def objective(name: str, model: Any) -> Any:
    """What a named model is trained with, in which every parameter has a part."""
    torch.manual_seed(2)
    return recipes.objective(name, model, cells())


def train(name: str = "environment_vae", data: EnvironmentDataset | None = None, **settings: Any) -> Run:
    """A short training of a small model."""
    data = cells() if data is None else data
    model, guide = make(name, data.schema)
    return fit(model, guide, data, **{"epochs": 3, "batch_size": 40, "progress": False, **settings})


@functools.cache
def fitted(name: str = "structured_environment_vae") -> Run:
    """Two members, three epochs."""
    return train(name, seeds=(0, 1))


class LearntPrior(nn.Module):
    """z ~ N(centre * share, spread^2) with all three of them latent: one real, one in (0, 1), one positive."""

    latent = 3

    def forward(self, batch: Batch) -> dist.Independent:
        spread = pyro.sample("spread", dist.Gamma(4.0, 4.0))
        centre = pyro.sample("centre", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        loc = centre * share.unsqueeze(-1)  # (3), or (S, 1, 3) under a plate of draws
        loc = loc.expand(*loc.shape[:-2], len(batch), 3)
        return normal(loc, spread.unsqueeze(-1).expand(loc.shape))


def hierarchical() -> LatentModel:
    """A model with latent sites outside the plate, in its prior."""
    return LatentModel(LearntPrior(), decoder(cells().schema, 3, (), None))


class Doubles(EnvironmentDataset):
    """The same cells in double precision, so that equalities are not blurred by rounding."""

    def batch(self, index: Any = None) -> Batch:
        return double(super().batch(index))


def doubles(data: EnvironmentDataset) -> Doubles:
    """The same cells in double precision."""
    return Doubles(**{name: getattr(data, name) for name in data.__dataclass_fields__})


def double(batch: Batch) -> Batch:
    """The same batch in double precision."""
    moved = {
        name: value.double()
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return replace(batch, **moved)

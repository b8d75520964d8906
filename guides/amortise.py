"""`amortise`: the guide is built from the model, so the list of latent sites is written once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from guides.encoders import Fresh, GaussianEncoder, PointEncoder, ProductEncoder, ReferenceEncoder
from guides.mean_field import MeanField, Standard
from pyro_scm.batch import Batch, Schema
from pyro_scm.errors import ModelError
from pyro_scm.sites import DATA, Z

__all__ = ["AmortisedGuide", "amortise"]

FAMILIES = {
    "normal": GaussianEncoder,
    "point": PointEncoder,
    "product": ProductEncoder,
    "reference": ReferenceEncoder,
    "prior": Fresh,
}


class HasSchema(Protocol):
    """A data set, or anything else that has a schema."""

    @property
    def schema(self) -> Schema:
        """Names and sizes."""
        ...


class AmortisedGuide(PyroModule):  # type: ignore[misc]
    """q(globals) prod_n q(locals_n | cell n), sites in the model's own order.

    Args:
        local: site -> encoder, for sites inside the plate ``data``.
        outside: site -> module that returns its variational distribution, for every other latent site.
    """

    def __init__(self, local: Mapping[str, nn.Module], outside: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.local, self.outside = nn.ModuleDict(local), nn.ModuleDict(outside)
        self.spec: dict[str, Any] | None = None
        """How `amortise` built it, for checkpoints."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample every latent site. Returns the values by site."""
        values = {name: pyro.sample(name, q()) for name, q in self.outside.items()}
        with batch.plate():
            values |= {name: pyro.sample(name, q(batch)) for name, q in self.local.items()}
        return values


def amortise(
    model: Callable[..., Any],
    cells: Schema | HasSchema,
    *,
    inputs: Sequence[str] = ("x", "e"),
    hidden: Sequence[int] = (128,),
    conditioning: str = "concatenate",
    family: str = "normal",
) -> AmortisedGuide:
    """A guide for every latent site of `model`: an encoder inside the plate ``data``, free parameters outside it.

    Sites that the model marks as standard noise drawn anew (``infer={"fresh": True}``) are drawn from it here too.

    Args:
        model: any Pyro program over a `Batch`.
        cells: the training cells, or their schema.
        inputs: what the encoders read: ``"x"``, ``"y"`` (proteins), ``"e"`` (the environment's representation), names
            of covariates.
        hidden: widths of the encoders' hidden layers.
        conditioning: ``"concatenate"``, or ``"film"``: a scale and a shift for each hidden unit (Perez et al. 2017).
        family: of q(z): ``"normal"``; ``"point"`` for an autoencoder; ``"product"`` of one expert for each modality,
            x and y, and the prior N(0, I), so that either may be missing; ``"reference"``: infers the noise of
            reference cells and leaves that of all others to the prior N(0, I); ``"prior"``: of all cells.

    Raises:
        ModelError: options that do not exist, or a model without latent sites.

    Example:
        >>> sorted(amortise(model, cells, hidden=(8,)).local)
        ['z']
    """
    if family not in FAMILIES:
        raise ModelError(f"unknown guide family {family!r}: use one of {', '.join(FAMILIES)}")
    schema = cells if isinstance(cells, Schema) else cells.schema
    # the bound method, not the module: nothing is then registered with Pyro's global parameter store
    program = model.forward if isinstance(model, nn.Module) else model
    with torch.no_grad(), pyro.validation_enabled(False):
        trace = poutine.trace(program).get_trace(Batch.example(schema))
    local: dict[str, nn.Module] = {}
    outside: dict[str, nn.Module] = {}
    for name in trace.stochastic_nodes:
        site = trace.nodes[name]
        if type(site["fn"]).__name__ == "_Subsample":
            continue
        if any(frame.name == DATA for frame in site["cond_indep_stack"]):
            size = int(site["fn"].event_shape.numel())
            encoder = FAMILIES[family if name == Z or family == "point" else "normal"]
            if site["infer"].get("fresh") or encoder is Fresh:
                local[name] = Fresh(size, float(site["fn"].stddev.mean()) if encoder is Fresh else 1.0)
                continue
            local[name] = encoder(schema, size, inputs, hidden, conditioning)
        elif site["infer"].get("fresh"):
            outside[name] = Standard(site["fn"].event_shape)
        else:
            outside[name] = MeanField(site["fn"])
    if not local and not outside:
        raise ModelError("the model has no latent sites: there is nothing for a guide to infer")
    guide = AmortisedGuide(local, outside)
    guide.spec = {
        "inputs": list(inputs),
        "hidden": list(hidden),
        "conditioning": conditioning,
        "family": family,
    }
    return guide

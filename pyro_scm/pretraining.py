"""`transfer`: a run taken to cells with other genes, drugs or covariates; what both know is carried over."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_scm.batch import DOSE, PART, Schema
from pyro_scm.composition import Columns
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.ensemble import System, stack_initial
from pyro_scm.errors import ModelError
from pyro_scm.nn import replicated
from pyro_scm.objectives import Objective
from pyro_scm.recipes import rebuild
from pyro_scm.run import Environments, Run

__all__ = ["transfer"]

_PROBE = "one more"
Shapes = Mapping[str, torch.Size]


def transfer(run: Run, cells: EnvironmentDataset, *, genes: str = "shared", seed: int = 0) -> Run:
    """The run's model and guide made anew for other cells, with every weight that has the same meaning carried over.

    Some layers are as long as there are genes, features of the environments, proteins or categories of a covariate: of
    these the weights of names that both data sets have are carried over, and the others drawn anew. Where a layer reads
    several of them side by side, and they differ, all of it is. Statistics of expression (means, scales, library size)
    are those of the new cells. Go on with ``fit(new.model, new.guide, cells, start=new, seeds=new.seeds)``.

    chemCPA's step from a drug screen to single cells (Hetzel et al., NeurIPS 2022) is that of a `chemcpa` whose
    representation describes molecules by the same features in both, such as ``"molecules"``.

    Args:
        run: of a named model, such as one pre-trained on another data set.
        cells: to go on with: training cells.
        genes: ``"shared"`` carries the weights of genes that both have; ``"none"`` draws all layers of genes anew, as
            chemCPA does for an extended set of genes.
        seed: of the weights that are drawn; each member has the next one.

    Returns:
        A run of as many members, with the history and losses of the one before.

    Raises:
        ModelError: a composition of the user's own, molecules described by other features, or an unknown option.

    Example:
        >>> new = transfer(run, cells)  # cells: of another data set, with some of the genes
        >>> run = ps.fit(new.model, new.guide, cells, start=new, seeds=new.seeds, epochs=1, progress=False)
    """
    if genes not in ("shared", "none"):
        raise ModelError(f"genes = {genes!r}: use 'shared' or 'none'")
    old, new = run.schema, cells.schema
    described = [[f for f in schema.features if f.startswith(PART)] for schema in (old, new)]
    if described[0] != described[1]:
        raise ModelError(
            "the run and the cells describe molecules by other features: represent both with the same bits and radius, "
            "and as many parts"
        )
    model, guide = rebuild(run.model, run.guide, new)
    system = System(model, guide, Objective())
    parameters = stack_initial(system, range(seed, seed + len(run)))
    shapes = _shapes(run, old)
    longer = {axis: _shapes(run, schema) for axis, schema in _longer(old)}
    for name, fresh in parameters.items():
        value = run.parameters.get(name)
        if value is None or value.dim() != fresh.dim():
            continue
        pairs = []
        for dim, size in enumerate(shapes[name]):
            axes = [axis for axis, other in longer.items() if other[name][dim] != size]
            before, after = (_names(schema, axes, size == len(old.features)) for schema in (old, new))
            known = before == after or len({_family(axis) for axis in axes}) == 1
            anew = not known or (genes == "none" and "genes" in axes)
            pairs.append(None if anew else _pairs(before, after, size, fresh.shape[dim + 1]))
        if all(pair is not None for pair in pairs):
            there, here = (_mesh(len(run), [pair[side] for pair in pairs if pair is not None]) for side in (0, 1))
            fresh[here] = value.to(fresh)[there]
    for prefix, module in (("model", model), ("guide", guide)):
        with torch.no_grad():
            for name, own in replicated(module).items():
                own.copy_(parameters[f"{prefix}.{name}"][run.best])
    environments = Environments.of(cells)
    return replace(run, model=model, guide=guide, parameters=parameters, schema=new, environments=environments)


def _shapes(run: Run, schema: Schema) -> Shapes:
    """Shapes of the parameters that the run's model and guide would have for a data set."""
    model, guide = rebuild(run.model, run.guide, schema)
    return {name: p.shape for name, p in replicated(System(model, guide, Objective())).items()}


def _longer(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """Each axis, and a schema in which it is longer by one."""
    yield "genes", replace(schema, genes=(*schema.genes, _PROBE), statistics=None)
    if schema.proteins:
        yield "proteins", replace(schema, proteins=(*schema.proteins, _PROBE))
    for name, values in schema.covariates.items():
        yield f"covariate {name}", replace(schema, covariates={**schema.covariates, name: (*values, _PROBE)})
    columns = Columns.of(schema)
    kinds = {"context": "cell_line="}
    if columns.dose:
        kinds["dose"] = "log10(1 + dose) "
    if columns.perturbations:
        kinds["perturbations"] = DOSE if schema.doses else "perturbation="
    if columns.others and not any(f.startswith(PART) for f in schema.features):
        kinds["others"] = ""
    for axis, prefix in kinds.items():
        yield axis, replace(schema, features=(*schema.features, prefix + _PROBE))


def _family(axis: str) -> str:
    """Axes of one family are parts of the representation."""
    return "features" if axis in ("context", "dose", "perturbations", "others") else axis


def _names(schema: Schema, axes: list[str], whole: bool) -> list[str]:
    """What the positions of a layer stand for that is as long as these axes together.

    Args:
        schema: whose names.
        axes: that make the layer longer.
        whole: whether it is as long as the whole representation.
    """
    columns = Columns.of(schema)
    of = {"perturbations": [*columns.perturbations.values()], "context": columns.context, "dose": columns.dose}
    of["others"] = columns.others
    features = sorted(i for axis in axes for i in of.get(axis, []))
    if whole and any(axis in of for axis in axes):
        features = [*range(len(schema.features))]
    names = [schema.features[i] for i in features]
    for axis in axes:
        if axis == "genes":
            names += schema.genes
        elif axis == "proteins":
            names += schema.proteins
        elif axis not in of:
            names += schema.covariates.get(axis.removeprefix("covariate "), ())
    return names


def _pairs(old: list[str], new: list[str], before: int, after: int) -> tuple[list[int], list[int]] | None:
    """Positions of the same meaning along a dimension; None if they cannot be told.

    Several numbers of each name, such as means and variances of genes, lie in blocks one after the other.
    """
    if old == new:
        return (list(range(before)), list(range(after))) if before == after else None
    if not old or not new or before % len(old) or after % len(new) or before // len(old) != after // len(new):
        return None
    place = {name: i for i, name in enumerate(new)}
    shared = [(i, place[name]) for i, name in enumerate(old) if name in place]
    blocks = range(before // len(old))
    return [b * len(old) + i for b in blocks for i, _ in shared], [b * len(new) + j for b in blocks for _, j in shared]


def _mesh(members: int, index: list[list[int]]) -> tuple[Tensor, ...]:
    """Indices of a block of entries of every member, to be used together."""
    every = [list(range(members)), *index]
    count = len(every)
    return tuple(
        torch.tensor(own, dtype=torch.int64).view(*(-1 if k == d else 1 for k in range(count)))
        for d, own in enumerate(every)
    )

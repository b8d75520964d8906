"""`dictionary`: the vectors that a run has learnt for its perturbations and covariates, their map and neighbours."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from pyro_scm.composition import Columns, CovariateShift
from pyro_scm.conditions import at_dose, perturbations
from pyro_scm.errors import DataError, ModelError, listing
from pyro_scm.run import Run, members
from pyro_scm.shifts import mover

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Dictionary", "dictionary"]

FloatArray: TypeAlias = NDArray[np.float64]

PERTURBATION = "perturbation"
_COLOURS = (
    "#1f5fa8",
    "#d1663a",
    "#2e8b57",
    "#8e5ea2",
    "#b8860b",
    "#c23b6d",
    "#4c9fb0",
    "#7a5230",
    "#5c6bc0",
    "#879a2f",
)
_OTHER = "#a8b0b8"
_LABELLED = 40  # entries that are still legible with their names
_WIDEST = 32  # characters of a value in the legend


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Vectors of perturbations and covariates, of every member of a run.

    Latents of two members differ in order, sign, rotation and scale: members are compared, and averaged, by the cosines
    between their own vectors only.

    Args:
        vectors: ``[K, M, d]`` effects on the latents.
        table: M rows, indexed by name: kind (``"perturbation"``, ``"cell_line"``, ``"time"`` or a covariate's name),
            dose, trained, size (mean norm over members, in standard deviations of the noise), and a user's columns.
        nodes: names of the d latents.
    """

    vectors: FloatArray
    table: pd.DataFrame
    nodes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Of the M entries."""
        return [str(n) for n in self.table.index]

    def frame(self) -> pd.DataFrame:
        """One row a member and entry, one column a latent."""
        index = pd.MultiIndex.from_product([range(len(self.vectors)), self.names], names=["member", "name"])
        return pd.DataFrame(self.vectors.reshape(-1, len(self.nodes)), index=index, columns=list(self.nodes))

    def kind(self, *kinds: str) -> "Dictionary":
        """The entries of some kinds only.

        Raises:
            DataError: no such entries.
        """
        chosen = self.table["kind"].isin(kinds).to_numpy()
        if not chosen.any():
            raise DataError(f"no entries of kind {listing(kinds)}: there are {listing(self.table['kind'].unique())}")
        return replace(self, vectors=self.vectors[:, chosen], table=self.table[chosen])

    def annotate(self, annotation: pd.DataFrame) -> "Dictionary":
        """The same entries with a user's columns, such as mechanisms of action, found by name.

        Names are compared without regard to case, blanks, hyphens and underscores; of several rows of one name the
        first that has a value counts, column by column.

        Args:
            annotation: indexed by perturbation; entries that it lacks get missing values.

        Raises:
            DataError: none of the entries is in it.
        """
        known = annotation.groupby([_plain(name) for name in annotation.index]).first()
        keys = [_plain(name) for name in self.table["perturbation"]]
        found = known.reindex(keys).set_axis(self.table.index)
        if not any(key in known.index for key in keys):
            raise DataError(
                f"none of the {len(keys)} entries is in the annotation: its first column must hold their names; they "
                f"are {listing(self.table['perturbation'].unique())}, it has {listing(annotation.index)}"
            )
        return replace(self, table=self.table.drop(columns=list(found.columns), errors="ignore").join(found))

    def cosines(self) -> FloatArray:
        """``[K, M, M]`` cosines between the vectors of each member; 0 with a vector of zeros."""
        norm = np.linalg.norm(self.vectors, axis=-1, keepdims=True)
        unit = np.divide(self.vectors, norm, out=np.zeros_like(self.vectors), where=norm > 0)
        found: FloatArray = unit @ unit.swapaxes(1, 2)
        return found

    def cosine(self) -> pd.DataFrame:
        """``[M, M]`` mean over members."""
        return pd.DataFrame(self.cosines().mean(0), index=self.table.index, columns=self.table.index)

    def neighbours(self, number: int = 5) -> pd.DataFrame:
        """The entries of the same kind whose vectors point most nearly the same way.

        Args:
            number: of each entry, where there are so many.

        Returns:
            Columns name, rank, neighbour, cosine (mean over members), low and high (over members), and agree: the share
            of members that have it among their own nearest.

        Raises:
            DataError: a number below 1, or no two entries of one kind.
        """
        if number < 1:
            raise DataError(f"{number} neighbours: ask for 1 or more")
        cosines, names = self.cosines(), self.names
        kinds = self.table["kind"].to_numpy()
        rows = []
        for m, name in enumerate(names):
            others = np.flatnonzero((kinds == kinds[m]) & (np.arange(len(names)) != m))
            own = cosines[:, m, others]
            nearest = np.argsort(-own, axis=1, kind="stable")[:, :number]
            for rank, j in enumerate(np.argsort(-own.mean(0), kind="stable")[:number].tolist()):
                row = {"name": name, "rank": rank + 1, "neighbour": names[others[j]], "cosine": own[:, j].mean()}
                row |= {"low": own[:, j].min(), "high": own[:, j].max()}
                rows.append(row | {"agree": float((nearest == j).any(1).mean())})
        if not rows:
            raise DataError(f"{listing(names)}: no two entries are of one kind, so that none has a neighbour")
        return pd.DataFrame(rows)

    def project(self, method: str = "pca", member: int | None = None, seed: int = 0) -> pd.DataFrame:
        """Two coordinates of each entry.

        Args:
            method: ``"pca"`` (about the mean), or ``"umap"`` (of cosines) where umap-learn is installed.
            member: whose vectors; by default all members' side by side, each of the same total variance, which is as if
                their Gram matrices were averaged and depends on no member's rotation.
            seed: of UMAP.

        Returns:
            Columns x and y; with PCA their shares of the variance are in ``attrs["explained"]``.

        Raises:
            ModelError: an unknown method, or UMAP is not installed.
            DataError: fewer than three entries, or no such member.
        """
        if len(self.table) < 3:
            raise DataError(f"a map needs 3 entries or more, there are {len(self.table)}")
        if member is not None and not 0 <= member < len(self.vectors):
            raise DataError(f"member {member}: there are members 0 to {len(self.vectors) - 1}")
        chosen = self.vectors if member is None else self.vectors[[member]]
        size = np.sqrt(((chosen - chosen.mean(1, keepdims=True)) ** 2).sum((1, 2), keepdims=True))
        wide = np.concatenate(list(chosen / np.where(size > 0, size, 1.0)), axis=1)
        if method == "pca":
            from sklearn.decomposition import PCA

            pca = PCA(n_components=min(2, wide.shape[1]), svd_solver="full").fit(wide)
            xy = np.zeros((len(wide), 2))
            xy[:, : pca.n_components_] = pca.transform(wide)
            found = pd.DataFrame(xy, index=self.table.index, columns=["x", "y"])
            found.attrs["explained"] = [float(v) for v in np.nan_to_num(pca.explained_variance_ratio_)]
            return found
        if method == "umap":
            return pd.DataFrame(_umap(wide, seed), index=self.table.index, columns=["x", "y"])
        raise ModelError(f"unknown projection {method!r}: use 'pca' or 'umap'")

    # ------------------------------------------------------------------ pictures
    def figure(self, colour: str | None = None, method: str = "pca", member: int | None = None) -> "Figure":
        """The map, coloured by a column of the table.

        Args:
            colour: a column, such as one that `annotate` added: numbers as a scale, else its most frequent values as
                colours; kind by default.
            method: see `project`.
            member: see `project`.

        Raises:
            DataError: no such column; see `project`.
        """
        from matplotlib.figure import Figure

        colour = colour or "kind"
        if colour not in self.table:
            raise DataError(f"no column {colour!r} to colour by: there are {listing(self.table.columns, 10)}")
        xy = self.project(method, member)
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = figure.subplots()
        _points(axes, xy, self.table[colour], colour)
        if len(xy) <= _LABELLED:
            for name, x, y in zip(self.names, xy["x"], xy["y"], strict=True):
                axes.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7, color="#333a42")
        shares = xy.attrs.get("explained", [])
        titles = [f"principal component {i + 1}" for i in range(2)] if method == "pca" else ["UMAP 1", "UMAP 2"]
        for i, share in enumerate(shares[:2]):
            titles[i] += f" ({share:.0%})"
        axes.set(xlabel=titles[0], ylabel=titles[1])
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    plot = figure

    def heatmap(self) -> "Figure":
        """Mean cosines over members, entries in the order of an average-linkage clustering."""
        from matplotlib.figure import Figure

        table = self.cosine().to_numpy()
        order = _clustered(table)
        names = [self.names[i] for i in order]
        side = min(3 + 0.16 * len(names), 16)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(table[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        if len(names) <= 3 * _LABELLED:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
        else:
            axes.set(xticks=[], yticks=[])
        figure.colorbar(image, label="cosine, mean over members", shrink=0.7)
        return figure


def dictionary(run: Run, *, dose: float | None = None, every: bool = False) -> Dictionary:
    """What each perturbation and covariate does to the latents.

    A perturbation's vector is its environment's shift (see `effects.shifts`); a covariate's is that of its category
    less the mean over categories.

    Args:
        run: from `fit` or `load`, of any model whose environments move latents.
        dose: of all perturbations, uM, where the representation tells doses; by default each at the largest of the
            table.
        every: instead one entry for each environment, all doses and combinations.

    Raises:
        ModelError: a model whose environments move nothing, or one that knows no doses and is asked for one.
        DataError: a dose that is none, or a table without single perturbations.

    Example:
        >>> ps.dictionary(run).names[:2]
        ['env_1', 'env_2']
    """
    table, representation = run.environments.table, run.environments.representation
    largest = {name: found[-1] for name, found in perturbations(run).items()}
    rows = np.flatnonzero(~table["is_reference"].to_numpy(dtype=bool)).tolist() if every else list(largest.values())
    if not rows:
        raise DataError("the run's table has no single perturbations: ask for every environment (every=True)")
    labels = [str(table.index[i]) for i in rows]
    given = representation[rows] if dose is None else np.stack([at_dose(run, name, dose) for name in labels])
    own = table.iloc[rows]
    names = labels if every else list(largest)
    doses = own["dose"].to_list() if dose is None else [dose] * len(rows)
    entries = pd.DataFrame(
        {
            "kind": PERTURBATION,
            "perturbation": [str(p) for p in own["perturbation"]] if every else names,
            "dose": doses,
            "trained": own["trained"].astype(bool).to_numpy(),
        },
        index=pd.Index(names, name="name"),
    )
    parts, others = [], pd.DataFrame()
    for model, _ in members(run):
        like = next(model.parameters())
        r = torch.as_tensor(given).to(like)
        with torch.no_grad():
            effects = mover(model).moments(r, r.new_ones(len(r)))[0].cpu().numpy()
            covariates = list(_covariates(model, run))
        others = pd.DataFrame([row for row, _ in covariates])
        parts.append(np.concatenate([effects, *(v[None] for _, v in covariates)]).astype(np.float64))
    vectors = np.stack(parts)
    if len(others):
        entries = pd.concat([entries, others.set_index("name").assign(dose=np.nan, trained=True)])
    entries["size"] = np.linalg.norm(vectors, axis=-1).mean(0)
    nodes = tuple(str(n) for n in run.model.scm.nodes)  # type: ignore[union-attr]
    return Dictionary(vectors, entries, nodes)


def _covariates(model: nn.Module, run: Run) -> Iterator[tuple[dict[str, str], NDArray[Any]]]:
    """Entry and vector of each category of cell line, time and covariates that a model has vectors of."""
    for module in model.modules():
        if not isinstance(module, CovariateShift):
            continue
        if module.context is not None:
            features = [run.schema.features[i] for i in Columns.of(run.schema).context]
            yield from _centred(features, module.context.cpu().numpy())
        for name, table in zip(module.names, module.tables, strict=True):
            yield from _centred([f"{name}={v}" for v in run.schema.covariates[name]], table.cpu().numpy())


def _centred(features: Sequence[str], rows: NDArray[Any]) -> Iterator[tuple[dict[str, str], NDArray[Any]]]:
    kinds = [name.partition("=")[0].partition(" /")[0] for name in features]
    for name, kind, row in zip(features, kinds, rows, strict=True):
        alike = rows[[k == kind for k in kinds]]
        value = row - alike.mean(0) if len(alike) > 1 else row
        yield {"name": name, "kind": kind, "perturbation": name.partition("=")[2] or name}, value


def _plain(name: object) -> str:
    return "".join(c for c in str(name).casefold() if c not in " -_")


def _umap(rows: FloatArray, seed: int) -> FloatArray:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from umap import UMAP  # type: ignore[import-untyped]
    except ImportError as error:
        raise ModelError(f"UMAP cannot be imported ({error}): install umap-learn, or project by 'pca'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        near = min(15, len(rows) - 1)
        found: FloatArray = UMAP(n_neighbors=near, metric="cosine", init="random", random_state=seed).fit_transform(
            rows
        )
    return found


def _clustered(cosine: FloatArray) -> list[int]:
    """Order of the leaves of an average-linkage tree of 1 - cosine."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(cosine) < 3:
        return list(range(len(cosine)))
    distance = np.clip(1 - (cosine + cosine.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    order: list[int] = leaves_list(
        linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    ).tolist()
    return order


def _points(axes: "Axes", xy: pd.DataFrame, values: "pd.Series[Any]", title: str) -> None:
    """Points of a map in the colours of a column."""
    if values.dtype.kind in "fiu" and values.notna().any():
        shown = axes.scatter(xy["x"], xy["y"], c=values.to_numpy(np.float64), cmap="viridis", s=36, linewidths=0)
        axes.figure.colorbar(shown, ax=axes, label=title, shrink=0.7)
        return
    words = values.astype(object).where(values.notna(), None)
    frequent: Mapping[Any, int] = words.dropna().value_counts().head(len(_COLOURS)).to_dict()
    rest = ~words.isin(list(frequent)).to_numpy()
    if rest.any():
        axes.scatter(xy["x"][rest], xy["y"][rest], s=30, color=_OTHER, linewidths=0, label="other or not known")
    for value, shade in zip(frequent, _COLOURS, strict=False):
        own = (words == value).to_numpy()
        axes.scatter(xy["x"][own], xy["y"][own], s=36, color=shade, linewidths=0, label=_shortened(str(value)))
    axes.legend(title=title, fontsize=8, title_fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1].rstrip() + "…"

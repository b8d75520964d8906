"""Gene programmes: which genes a latent drives, and whether reference gene sets and networks know them.

The weight of gene j on latent i is d gene_j / d c_i: the decoder's weight where that is linear, else the Jacobian of
each cell and its mean over cells. A programme is the genes of high weight on one latent (Tan et al., ADAGE, mSystems
2016). Latents of different members of a run are different variables, and so are their programmes.

Chance is counted on the data's own genes: by permuting their labels, which keeps the sizes and overlaps of programmes
and of gene sets; and for networks also by rewiring them with every gene's degree kept, because genes that are often
studied, or highly expressed, have many links and often large weights. Neither knows of the expression level itself.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_scm.abduction import device_of
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import DataError, listing
from pyro_scm.query import embed
from pyro_scm.run import Fitted, members

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Programmes", "gene_programmes", "jacobian"]

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

_CHUNK = 256
_LARGEST_ANSWER = 4 << 30
_SWAPS = 20  # rounds of rewiring between one permutation and the next, each trying all edges once


# ---------------------------------------------------------------------- d gene / d latent
def jacobian(fitted: Fitted, cells: EnvironmentDataset) -> FloatArray:
    """d gene_j / d c_i of every cell at its inferred causal variables.

    Genes are in their standard deviations over the training cells: of expression, or where the data are counts of
    log1p expected counts at the median library size. Latents are in their own units.

    Args:
        fitted: a run, or (model, guide).
        cells: n cells.

    Returns:
        ``[K, n, d, G]``.

    Raises:
        DataError: no cells, or an answer too large for memory.
    """
    need = sum(4 * len(cells) * len(cells.genes) * int(model.latent) for model, _ in members(fitted))
    if need > _LARGEST_ANSWER:
        raise DataError(f"the answer would take {need / 2**30:.1f} GiB: ask about fewer cells (cells.subset)")
    return np.stack([np.concatenate(list(chunks)) for _, chunks in _jacobians(fitted, cells)])


def _jacobians(fitted: Fitted, cells: EnvironmentDataset) -> Iterator[tuple[FloatArray, Iterator[FloatArray]]]:
    """For each member its causal variables ``[n, d]`` and parts ``[m, d, G]`` of the Jacobian."""
    inferred = embed(fitted, cells)["c"]
    for c, (model, _) in zip(inferred, members(fitted), strict=True):
        yield c, _chunks(model, c, cells)


def _chunks(model: Any, c: FloatArray, cells: EnvironmentDataset) -> Iterator[FloatArray]:
    device = device_of(model)
    for start in range(0, len(c), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(c)))
        batch = cells.labels(rows).to(device)
        values = torch.as_tensor(c[rows], device=device)

        def decoded(values: Tensor, batch: Any = batch) -> Tensor:
            return _comparable(model.likelihoods[0], values, batch)

        # a cell's genes depend on its own latents only, so that one direction for all cells gives a row of every cell's
        # Jacobian; forward derivatives as the transpose of the transpose, since torch's own compile themselves by a
        # deprecated path
        output, pull = torch.func.vjp(decoded, values)[:2]
        push = torch.func.vjp(lambda u, pull=pull: pull(u)[0], torch.zeros_like(output))[1]

        def along(direction: Tensor, push: Any = push, values: Tensor = values) -> Tensor:
            row: Tensor = push(direction.expand_as(values))[0]
            return row

        with torch.no_grad():
            each = torch.func.vmap(along)(torch.eye(values.shape[1], dtype=values.dtype, device=device))
        yield each.movedim(0, 1).cpu().numpy()


def _comparable(likelihood: Any, c: Tensor, batch: Any) -> Tensor:
    """What is differentiated ``(n, G)``: expected (log-normalised) expression in standard deviations of each gene."""
    if hasattr(likelihood, "log_mean"):  # of log counts alone the rarest genes, which say least, vary most
        value: Tensor = torch.log1p(likelihood.log_mean(c, replace(batch, size=None)).exp())
    elif hasattr(likelihood, "location"):
        value = likelihood.location(c, batch)
    else:
        value = likelihood.mean(c, batch)
    result: Tensor = value / likelihood.spread
    return result


def gene_programmes(fitted: Fitted, cells: EnvironmentDataset) -> "Programmes":
    """The programmes of every member's latents.

    Args:
        fitted: a run, or (model, guide).
        cells: over which Jacobians are averaged; those of one condition for the programmes of that condition.

    Raises:
        DataError: no cells.

    Example:
        >>> set(gene_programmes(run, cells).genes_of("c_0").index) <= set(cells.genes)
        True
    """
    weights, spread, scale = [], [], []
    for c, chunks in _jacobians(fitted, cells):
        total, square = 0.0, 0.0
        for chunk in chunks:
            own = chunk.astype(np.float64)
            total, square = total + own.sum(0), square + (own**2).sum(0)
        mean = total / len(cells)
        weights.append(mean)
        spread.append(np.sqrt(np.maximum(square / len(cells) - mean**2, 0)))
        scale.append(c.std(0))
    nodes = tuple(str(name) for name in next(members(fitted))[0].sites)
    per_sd = np.stack(scale)[:, :, None]
    return Programmes(
        (np.stack(weights) * per_sd).astype(np.float32),
        cells.genes,
        nodes,
        spread=(np.stack(spread) * per_sd).astype(np.float32),
    )


# ---------------------------------------------------------------------- programmes
@dataclass(frozen=True, eq=False)
class Programmes:
    """Weights of G genes on the d latents of K members; see `gene_programmes`.

    Any loadings will do, such as those of principal components.

    Args:
        weights: ``[K, d, G]`` mean over cells of d gene / d latent, for a latent's change by one standard deviation.
        genes: names of the G genes.
        nodes: names of the d latents.
        threshold: a gene is of high weight where it is so many standard deviations from the mean weight of its latent.
        spread: ``[K, d, G]`` standard deviation over cells, 0 where the decoder is linear; None where it is not known.

    Raises:
        DataError: sizes that do not fit together, or weights that are not finite.
    """

    weights: FloatArray
    genes: tuple[str, ...]
    nodes: tuple[str, ...]
    threshold: float = 2.5
    spread: FloatArray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.weights.shape[1:] != (len(self.nodes), len(self.genes)):
            raise DataError(
                f"weights have shape {self.weights.shape}: expected (K, {len(self.nodes)} latents, "
                f"{len(self.genes)} genes)"
            )
        if not np.isfinite(self.weights).all():
            raise DataError("some weights are not finite: train the model anew, with a smaller learning rate")

    @property
    def standard(self) -> FloatArray:
        """``[K, d, G]`` weights in standard deviations from the mean weight of their latent; 0 for a dead latent."""
        centred = self.weights - self.weights.mean(-1, keepdims=True)
        deviation = centred.std(-1, keepdims=True)
        result: FloatArray = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
        return result

    @property
    def high(self) -> BoolArray:
        """``[K, d, G]`` whether a gene belongs to a latent's programme."""
        return np.abs(self.standard) > self.threshold

    def _latent(self, latent: int | str) -> int:
        if isinstance(latent, str):
            if latent not in self.nodes:
                raise DataError(f"no latent {latent!r}: this model has {listing(self.nodes, 20)}")
            return self.nodes.index(latent)
        return latent

    def genes_of(self, latent: int | str, member: int = 0) -> pd.Series:
        """Weights of one programme's genes, in standard deviations, the largest first.

        Args:
            latent: its number or name.
            member: of the run.

        Raises:
            DataError: no such latent.
        """
        i = self._latent(latent)
        values = pd.Series(self.standard[member, i], index=list(self.genes), name=self.nodes[i])
        chosen = values[self.high[member, i]]
        largest_first: pd.Series = chosen.loc[chosen.abs().sort_values(ascending=False).index]
        return largest_first

    def table(self) -> pd.DataFrame:
        """One row for each member, latent and gene of its programme: weight and its standard deviations."""
        k, i, j = np.nonzero(self.high)
        return pd.DataFrame(
            {
                "member": k,
                "latent": np.array(self.nodes)[i],
                "gene": np.array(self.genes)[j],
                "weight": self.weights[k, i, j],
                "deviations": self.standard[k, i, j],
            }
        )

    # ------------------------------------------------------------------ gene sets
    def enrichment(
        self,
        gene_sets: Mapping[str, Collection[str]],
        *,
        smallest: int = 5,
        largest: int = 500,
        permutations: int = 1000,
        seed: int = 0,
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Gene sets among the genes of each programme.

        Args:
            gene_sets: name -> genes; those that were not measured do not count.
            smallest: measured genes that a set must have.
            largest: measured genes that a set may have.
            permutations: of the gene labels, the same ones for all programmes and sets of a member.
            seed: of the permutations.

        Returns:
            One row for each member, latent and set: overlap, the overlap expected by chance, hypergeometric p and its
            Benjamini-Hochberg q among all of the member; and, without a threshold, the mean absolute weight of the
            set's genes (in standard deviations), its z against chance, the share of permutations in which it is as
            large (``p_permutation``), and the share in which the largest z of all pairs is (``p_family``, which holds
            for all of the member's pairs together).

            One row a member: the number of pairs (latent, set) with q < 0.05, that number under permutations, and the
            share of permutations with as many.

        Raises:
            DataError: no set has enough measured genes.

        Source: Westfall and Young, Resampling-Based Multiple Testing, 1993 (the largest z).
        """
        from scipy.stats import false_discovery_control

        names, sets = self._sets(gene_sets, smallest, largest)
        rng = np.random.default_rng(seed)
        size, total = sets.sum(1), len(self.genes)
        pairs, overall = [], []
        for k, (high, standard) in enumerate(zip(self.high, np.abs(self.standard), strict=True)):
            tail = _tails(total, high.sum(1), size)
            overlap = _counts(high, sets)
            p = _look_up(tail, overlap)
            mean = standard.astype(np.float64) @ sets.T / size
            # of the mean of so many values drawn without replacement
            error = standard.std(1, ddof=1)[:, None] * np.sqrt(1 / size - 1 / total)
            z = (mean - standard.mean(1)[:, None]) / np.maximum(error, 1e-12)
            as_large, larger = np.zeros(z.shape), np.zeros(z.shape)
            by_chance = []
            for _ in range(permutations):
                turn = rng.permutation(total)
                other = standard[:, turn].astype(np.float64) @ sets.T / size
                as_large += other >= mean - 1e-9
                larger += ((other - standard.mean(1)[:, None]) / np.maximum(error, 1e-12)).max() >= z - 1e-9
                shuffled = _look_up(tail, _counts(high[:, turn], sets))
                by_chance.append(int((false_discovery_control(shuffled.ravel()) < 0.05).sum()))
            q = false_discovery_control(p.ravel()).reshape(p.shape)
            pairs.append(
                pd.DataFrame(
                    {
                        "member": k,
                        "latent": np.repeat(self.nodes, len(names)),
                        "gene_set": np.tile(names, len(self.nodes)),
                        "set_size": np.tile(size, len(self.nodes)).astype(int),
                        "programme_size": np.repeat(high.sum(1), len(names)),
                        "overlap": overlap.ravel(),
                        "expected": np.outer(high.sum(1), size).ravel() / total,
                        "p": p.ravel(),
                        "q": q.ravel(),
                        "mean_weight": mean.ravel(),
                        "z": z.ravel(),
                        "p_permutation": (1 + as_large).ravel() / (1 + permutations),
                        "p_family": (1 + larger).ravel() / (1 + permutations),
                    }
                )
            )
            overall.append(_against_chance(k, "sets with q < 0.05", int((q < 0.05).sum()), by_chance))
        return pd.concat(pairs, ignore_index=True), pd.DataFrame(overall)

    def _sets(
        self, gene_sets: Mapping[str, Collection[str]], smallest: int, largest: int
    ) -> tuple[list[str], NDArray[np.float64]]:
        """Names, and which genes belong to each ``[sets, G]``."""
        place = {gene: j for j, gene in enumerate(self.genes)}
        names, rows = [], []
        for name, members_ in gene_sets.items():
            known = [place[g] for g in set(members_) if g in place]
            if smallest <= len(known) <= largest:
                row = np.zeros(len(self.genes))
                row[known] = 1.0
                names.append(name)
                rows.append(row)
        if not rows:
            raise DataError(
                f"none of {len(gene_sets)} gene sets has {smallest} to {largest} of the {len(self.genes)} genes: give "
                "sets of the same kind of gene names (symbols, Entrez, ...), or lower `smallest`"
            )
        return names, np.stack(rows)

    # ------------------------------------------------------------------ networks
    def links(
        self, edges: Collection[tuple[str, str]], *, permutations: int = 1000, seed: int = 0
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Links of a reference network between genes of the same programme.

        Args:
            edges: pairs of genes, such as (transcription factor, target); direction does not count, and neither do
                genes that were not measured, or links of a gene with itself.
            permutations: of the gene labels, and as many rewirings of the network with each gene's number of links to
                and from it kept.
            seed: of the permutations.

        Returns:
            One row for each member and latent: links within its programme, their mean number under permutations and
            rewirings, and the shares of those with as many (``p_labels``, ``p_degrees``).

            Two rows a member: distinct links within any programme; and, without a threshold, the mean absolute
            correlation of linked genes' weights across latents (as ADAGE's gene-gene network), both with the same.

        Raises:
            DataError: no link between measured genes.
        """
        pairs = self._edges(edges)
        rng = np.random.default_rng(seed)
        rewired = list(_rewirings(pairs, permutations, rng))
        turns = [rng.permutation(len(self.genes)) for _ in range(permutations)]
        own, overall = [], []
        for k, high in enumerate(self.high):
            alike = _alikeness(self.standard[k])
            found = _within(high, alike, pairs)
            nulls = {
                "labels": np.stack([_within(high, alike, turn[pairs]) for turn in turns]),
                "degrees": np.stack([_within(high, alike, other) for other in rewired]),
            }
            names = [*self.nodes, "any programme", "correlation of weights"]
            rows = [{"member": k, "latent": name, "found": value} for name, value in zip(names, found, strict=True)]
            for kind, null in nulls.items():
                p = (1 + (null >= found - 1e-9).sum(0)) / (1 + permutations)
                for row, expected, value in zip(rows, null.mean(0), p, strict=True):
                    row |= {f"expected_{kind}": expected, f"p_{kind}": value}
            own += rows[:-2]
            overall += rows[-2:]
        renamed = pd.DataFrame(overall).rename(columns={"latent": "links"})
        return pd.DataFrame(own).assign(links=len(pairs)), renamed

    def _edges(self, edges: Collection[tuple[str, str]]) -> NDArray[np.int64]:
        """Distinct links ``[L, 2]`` between measured genes."""
        place = {gene: j for j, gene in enumerate(self.genes)}
        known = {(place[a], place[b]) for a, b in edges if a in place and b in place and a != b}
        if not known:
            raise DataError(
                f"none of {len(edges)} links is between two of the {len(self.genes)} genes: give gene names of the "
                "same kind (symbols, Entrez, ...)"
            )
        return np.array(sorted(known), dtype=np.int64)

    # ------------------------------------------------------------------ figures
    def figure(self, member: int = 0, genes: int = 5) -> "Figure":
        """Heat map of one member: the genes of largest weight of each latent, in standard deviations.

        Args:
            member: of the run.
            genes: of each latent.
        """
        from matplotlib.figure import Figure

        standard = self.standard[member]
        top = np.argsort(-np.abs(standard), axis=1)[:, :genes].ravel()
        chosen = list(dict.fromkeys(top.tolist()))
        figure = Figure(figsize=(1.5 + 0.16 * len(chosen), 1.2 + 0.25 * len(self.nodes)), layout="constrained")
        axes = figure.subplots()
        bound = float(np.abs(standard[:, chosen]).max()) or 1.0
        image = axes.imshow(standard[:, chosen], cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        axes.set_xticks(range(len(chosen)), [self.genes[j] for j in chosen], rotation=90, fontsize=7)
        axes.set_yticks(range(len(self.nodes)), list(self.nodes))
        figure.colorbar(image, label="weight, sd of its latent's")
        return figure


# ---------------------------------------------------------------------- chance
def _counts(high: BoolArray, sets: NDArray[np.float64]) -> NDArray[np.int64]:
    """Genes that programme and set share ``[d, sets]``."""
    return np.rint(high.astype(np.float64) @ sets.T).astype(np.int64)


def _tails(total: int, programme: NDArray[Any], size: NDArray[Any]) -> NDArray[np.float64]:
    """P(overlap >= k) ``[d, sets, k]`` of random programmes and sets of these sizes."""
    from scipy.special import gammaln

    def log_choose(n: NDArray[Any], k: NDArray[Any]) -> NDArray[np.float64]:
        inside = (k >= 0) & (k <= n)
        k = np.where(inside, k, 0)
        chosen: NDArray[np.float64] = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
        return np.where(inside, chosen, -np.inf)

    k = np.arange(int(programme.max(initial=0)) + 2)[None, None]
    drawn, marked = programme[:, None, None].astype(float), size[None, :, None].astype(float)
    log = log_choose(marked, k) + log_choose(total - marked, drawn - k) - log_choose(np.asarray(float(total)), drawn)
    tail: NDArray[np.float64] = np.cumsum(np.exp(log)[..., ::-1], axis=-1)[..., ::-1]
    return np.minimum(tail, 1.0)


def _look_up(tail: NDArray[np.float64], overlap: NDArray[np.int64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.take_along_axis(tail, overlap[..., None], axis=-1)[..., 0]
    return found


def _against_chance(member: int, what: str, found: int, by_chance: Sequence[int]) -> dict[str, Any]:
    null = np.asarray(by_chance, float)
    p = (1 + (null >= found).sum()) / (1 + len(null))
    return {"member": member, "counted": what, "found": found, "expected": null.mean() if len(null) else np.nan, "p": p}


def _alikeness(standard: FloatArray) -> NDArray[np.float64]:
    """``[G, G]`` absolute correlation of genes' weights across latents."""
    centred = standard.astype(np.float64) - standard.mean(0)
    norm = np.linalg.norm(centred, axis=0)
    unit = np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 0)
    alike: NDArray[np.float64] = np.abs(unit.T @ unit)
    return alike


def _within(high: BoolArray, alike: NDArray[np.float64], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Links within each programme, within any, and the mean alikeness of linked genes ``[d + 2]``."""
    both = high[:, pairs[:, 0]] & high[:, pairs[:, 1]]
    return np.array([*both.sum(1), both.any(0).sum(), alike[pairs[:, 0], pairs[:, 1]].mean()], dtype=np.float64)


def _rewirings(pairs: NDArray[np.int64], number: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Networks in which every gene has as many links to and from it, by a chain of exchanges of two links' ends.

    Source: Maslov and Sneppen, Science 2002.
    """
    span = int(pairs.max()) + 1
    now = pairs.copy()
    for _ in range(number):
        for _ in range(_SWAPS):
            now = _exchanged(now, span, rng)
        yield now


def _exchanged(now: NDArray[np.int64], span: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """One try for every link, in random pairs (a, b), (c, d) -> (a, d), (c, b): no loops, no link twice."""
    turn = rng.permutation(len(now))
    first, second = turn[: len(now) // 2], turn[len(now) // 2 : 2 * (len(now) // 2)]
    a, b, c, d = now[first, 0], now[first, 1], now[second, 0], now[second, 1]
    one, two = a * span + d, c * span + b
    codes, number = np.unique(np.concatenate([now[:, 0] * span + now[:, 1], one, two]), return_counts=True)
    fresh = codes[number == 1]  # new links that neither exist nor are made twice
    fine = (a != d) & (c != b) & np.isin(one, fresh) & np.isin(two, fresh)
    result = now.copy()
    result[first[fine], 1], result[second[fine], 1] = d[fine], b[fine]
    return result

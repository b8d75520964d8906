"""Sparse latents on real knock-outs whose answer is known (Papalexi et al. 2021, THP-1 cells).

A Translation VAE with dense effects is turned into the coordinates in which effects are sparse. Do IFNGR1,
IFNGR2, JAK2 and STAT1 share a latent? Does IRF1's effect lie within STAT1's? Has CAV1, a negative control, none? Do
separate fits to the two replicates agree? Does the containment of effects give the order of the pathway? Beside it: the
dense coordinates, a mask learnt from the start (SAMS-VAE), PCA and ICA of pseudobulk changes, the same turn of that PCA
without any model, and differential genes.

How many latents effects have is decided by halves of the cells, and effects are taken from the robust centre of all
knock-outs instead of the non-targeting cells: what is odd about one reference is common to all effects.
Needs PYRO_SCM_DATA with papalexi_thp1/, unless --data simulated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

import pyro_scm as ps
from experiments.launch import Results, briefly, data_folder, launch
from guides import amortise
from pyro_scm import effects, evaluation, recipes
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.directions import centre
from pyro_scm.effect_spectrum import halves_errors, pseudobulk
from pyro_scm.run import Run
from pyro_scm.unmixing import Directions, fold, sparse_directions

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

FloatArray: TypeAlias = NDArray[np.float64]

PATHWAY = ("IFNGR1", "IFNGR2", "JAK2", "STAT1")
INSIDE, NEGATIVE, CONTROL = "IRF1", "CAV1", "non-targeting"
LEVEL = {"IFNGR1": 0, "IFNGR2": 0, "JAK2": 1, "STAT1": 2, "IRF1": 3}
REPLICATES = ("rep_1", "rep_2")
_FEW = 0.02  # share of cells below which a gene says nothing
_LEAST = 50  # cells of a knock-out


@dataclass(frozen=True)
class Crispr:
    """Sizes.

    Args:
        data: real, or simulated: a screen with the same names whose truth is known.
        seeds: of each model's members; as many resamples of cells for methods without seeds.
        latent: of the models.
        hidden: units of their one hidden layer.
        steps: of training.
        lr: of training. Of four settings, 20 latents and 0.01 predicted the changes of held-out cells best.
        draws: split halves that decide the number of latents.
        cells: at most.
    """

    data: str = "real"
    seeds: tuple[int, ...] = tuple(range(10))
    latent: int = 20
    hidden: int = 64
    steps: int = 1200
    lr: float = 1e-2
    draws: int = 20
    cells: int = 20_000

    @classmethod
    def preset(cls, name: str) -> "Crispr":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(data="simulated", seeds=(0, 1), steps=200, lr=0.03, draws=4, latent=5, hidden=16)
        return cls() if name == "paper" else cls(seeds=(0, 1), steps=400, draws=10)


# ---------------------------------------------------------------------- effects
def sparse_basis(moved: FloatArray, rank: int, weights: FloatArray | None = None) -> Directions:
    """The sparse basis of the `rank` largest directions of effects.

    The rest of the latent space is kept as it is, after them: no environment moves it more than noise would.

    Args:
        moved: ``[E, d]`` of perturbed environments, from their centre.
        rank: number of latents that effects have.
        weights: ``[E]`` roots of the numbers of cells.
    """
    weight = np.ones(len(moved)) if weights is None else weights
    right = np.linalg.svd(moved * weight[:, None], full_matrices=True)[2]
    turned = sparse_directions(moved @ right[:rank].T)
    matrix = np.vstack([turned.matrix @ right[:rank], right[rank:]])
    return replace(turned, matrix=matrix, effects=moved @ matrix.T)


def by_name(cells: EnvironmentDataset) -> list[int]:
    """Perturbed environments that have cells, by row, in the order of their names: two data sets then agree."""
    rows = [int(e) for e in cells.present if not cells.reference[e]]
    return sorted(rows, key=lambda e: str(cells.environments.index[e]))


def perturbed(run: Run) -> list[int]:
    """Environments that were trained on and are no reference, by row."""
    table = run.environments.table
    return np.flatnonzero((table["trained"] & ~table["is_reference"]).to_numpy(dtype=bool)).tolist()


def shift_of(run: Run) -> FloatArray:
    """``[K, E, d]``."""
    table = effects.shifts(run)
    return table.to_numpy(np.float64).reshape(len(run), -1, table.shape[1])


def embedded(run: Run, cells: EnvironmentDataset) -> FloatArray:
    """``[K, E, d]``: mean of the causal variables in each environment minus that in the reference.

    A model's shifts lag behind what its encoder shows: until the noise has mean 0 in every environment, its mean is
    effect that no shift has yet. Rows without cells are 0.
    """
    c = ps.embed(run, cells)["c"].astype(np.float64)
    reference = cells.reference[cells.env]
    out = np.zeros((len(run), len(cells.environments), c.shape[-1]))
    for e in cells.present:
        if not cells.reference[e]:
            out[:, e] = c[:, cells.env == e].mean(1) - c[:, reference].mean(1)
    return out


def with_effects(run: Run, values: FloatArray) -> Run:
    """The run with the shifts ``[K, E, d]``; exact where environments are one-hot, else the nearest sum of parts.

    The robust centre of the shifts counts once in each environment, however many parts it has.
    """
    parameters = dict(run.parameters)
    names = [f"model.shift.net.0.{n}" for n in ("weight", "bias")]
    rows = perturbed(run)
    r = run.environments.representation.astype(np.float64)[rows]
    centres = np.stack([centre(v[rows]) for v in values])
    solved = np.stack([np.linalg.lstsq(r, v[rows] - c, rcond=None)[0].T for v, c in zip(values, centres, strict=True)])
    for name, value in zip(names, (solved, centres), strict=True):
        parameters[name] = torch.as_tensor(value).to(parameters[name])
    result = replace(run, parameters=parameters)
    result.model, result.guide = result.member(run.best)
    return result


def settled(run: Run, cells: EnvironmentDataset, *, offset: bool = True) -> Run:
    """The run whose shifts are the effects that cells show (`embedded`); for reading, not for training on.

    Args:
        run: with a linear environment network.
        cells: training cells.
        offset: whether effects are taken from their robust centre.
    """
    values, rows = embedded(run, cells), perturbed(run)
    if offset:
        for v in values:
            v[rows] -= centre(v[rows], weights(cells, rows))
    return with_effects(run, values)


def weights(cells: EnvironmentDataset, rows: Sequence[int]) -> FloatArray:
    """Roots of the numbers of cells of environments."""
    root: FloatArray = np.sqrt(np.bincount(cells.env, minlength=len(cells.environments))[list(rows)])
    return root


def sparse_run(run: Run, cells: EnvironmentDataset, rank: int, *, offset: bool = True) -> Run:
    """The run in sparse coordinates: `rank` latents that effects move, then the others.

    Args:
        run: dense.
        cells: training cells.
        rank: of the effects.
        offset: whether effects are taken from their robust centre.
    """
    rows = perturbed(run)
    weight = weights(cells, rows)
    found = []
    for values in embedded(run, cells)[:, rows]:
        found.append(sparse_basis(values - centre(values, weight) * offset, rank, weight))
    return fold(run, cells, found)


@dataclass(frozen=True, eq=False)
class View:
    """Effects of perturbed environments in some coordinates.

    Args:
        effects: environments by latents.
        inclusion: likewise, probabilities.
    """

    effects: pd.DataFrame
    inclusion: pd.DataFrame

    @staticmethod
    def of(values: FloatArray, names: Sequence[str], inclusion: FloatArray | None = None) -> "View":
        """With inclusion from the effects themselves where none is given."""
        p = effects.probabilities(values) if inclusion is None else inclusion
        columns = [f"z_{j}" for j in range(values.shape[1])]
        return View(pd.DataFrame(values, names, columns), pd.DataFrame(p, names, columns))

    @property
    def included(self) -> pd.DataFrame:
        """Probability above 1/2."""
        return self.inclusion > 0.5


def views(run: Run, rank: int | None = None, masked: bool = False) -> list[View]:
    """One a member, of its first `rank` latents."""
    rows = perturbed(run)
    names = [str(n) for n in run.environments.table.index[rows]]
    mask = effects.mask(run).to_numpy(np.float64).reshape(len(run), -1, run.model.latent) if masked else None
    return [
        View.of(values[:, :rank], names, None if mask is None else mask[k][rows])
        for k, values in enumerate(shift_of(run)[:, rows])
    ]


def components(change: FloatArray, count: FloatArray, rank: int, kind: str, seed: int = 0) -> FloatArray:
    """Scores ``[E, rank]`` of pseudobulk changes ``[E, G]``: "PCA", "ICA" or "PCA turned" into its sparse basis."""
    weight = np.sqrt(count)[:, None]
    right = np.linalg.svd(change * weight, full_matrices=False)[2][:rank]
    scores = change @ right.T
    if kind == "PCA":
        return scores
    if kind == "PCA turned":
        return sparse_directions(scores).effects
    from sklearn.decomposition import FastICA

    made: FloatArray = FastICA(rank, random_state=seed, max_iter=5000, tol=1e-3).fit_transform(scores)
    # a sign and a centre of its own: the null is at the median
    return made - np.median(made, axis=0)


# ---------------------------------------------------------------------- scores of a view
def pathway_scores(view: View) -> dict[str, float]:
    """What the pathway, IRF1 and CAV1 look like; the pathway's latent is the one that its members share most."""
    p, e = view.inclusion, view.effects
    j = str(p.loc[list(PATHWAY)].sum().idxmax())
    on = view.included
    unit = e.loc[list(PATHWAY)].to_numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    inside, within = on.loc[INSIDE], on.loc["STAT1"]
    a, b = e.loc[INSIDE].to_numpy(), e.loc["STAT1"].to_numpy()
    others = [n for n in e.index if n not in PATHWAY]
    return {
        "members on one latent": float(on.loc[list(PATHWAY), j].sum()),
        "others on it": float(on.loc[others, j].sum()),
        "cosine of members": float((unit @ unit.T)[np.triu_indices(len(PATHWAY), 1)].mean()),
        "IRF1 latents": float(inside.sum()),
        "IRF1 latents within STAT1's": float((inside & within).sum() / inside.sum()) if inside.any() else np.nan,
        "share of IRF1 along STAT1": float((a @ b) ** 2 / ((a @ a) * (b @ b))),
        "CAV1 latents": float(on.loc[NEGATIVE].sum()),
        "CAV1 / STAT1 size": float(np.linalg.norm(e.loc[NEGATIVE]) / np.linalg.norm(b)),
        "share on": float(on.to_numpy().mean()),
        **order_scores(containment(view)),
    }


def containment(view: View) -> pd.DataFrame:
    """Row in column: share of the row's effect that the column's has too, latent by latent and with its sign."""
    values = view.effects.to_numpy() * view.inclusion.to_numpy()
    size = np.abs(values)
    common = np.minimum(size[:, None], size[None]) * (np.sign(values)[:, None] == np.sign(values)[None])
    total = np.maximum(size.sum(1), 1e-12)
    return pd.DataFrame(common.sum(-1) / total[:, None], view.effects.index, view.effects.index)


def order_scores(contained: pd.DataFrame) -> dict[str, float]:
    """Share of the pathway's ordered pairs whose later member is contained in the earlier one more than vice versa.

    Ties count half, so that chance is one half.
    """
    found: dict[bool, list[float]] = {True: [], False: []}
    for a, early in LEVEL.items():
        for b, late in LEVEL.items():
            if early < late:
                difference = float(contained.loc[b, a] - contained.loc[a, b])
                right = 0.5 if abs(difference) < 1e-9 else float(difference > 0)
                found[b == INSIDE].append(right)
    return {
        "order right": float(np.mean(found[True] + found[False])),
        "order right, no IRF1": float(np.mean(found[False])),
    }


def inclusion_f1(a: View, b: View) -> float:
    """F1 of the inclusion sets of two fits, latents matched by the correlation of their effects; 1 is the same sets.

    A latent that has no partner, because one fit has fewer, counts with all that it includes as a disagreement.
    """
    names = a.effects.index
    x, y = a.effects.to_numpy(), b.effects.loc[names].to_numpy()
    p, q = a.included.to_numpy(), b.included.loc[names].to_numpy()
    r = np.abs(np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :])
    i, j = linear_sum_assignment(-np.nan_to_num(r))
    total = p.sum() + q.sum()
    return float(2 * (p[:, i] & q[:, j]).sum() / total) if total else np.nan


def matched_correlation(a: View, b: View) -> float:
    """Mean correlation over environments of the matched latents of two fits."""
    x, y = a.effects.to_numpy(), b.effects.loc[a.effects.index].to_numpy()
    r = np.abs(np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :])
    i, j = linear_sum_assignment(-np.nan_to_num(r))
    return float(r[i, j].mean())


def gene_agreement(a: FloatArray, b: FloatArray, names: Sequence[str]) -> dict[str, float]:
    """Two tables ``[E, G]`` of changes of the same environments: correlations, and whether each finds its own.

    Environments that one of them says do nothing count nowhere.
    """
    moves = (a.std(1) > 1e-9) & (b.std(1) > 1e-9)
    names = [n for n, m in zip(names, moves, strict=True) if m]
    if len(names) < 2:
        return {"environments": float(len(names))}
    r = np.corrcoef(a[moves], b[moves])[: len(names), len(names) :]
    own = np.diag(r)
    known = [n in LEVEL for n in names]
    return {
        "environments": float(len(names)),
        "correlation": float(own.mean()),
        "correlation, pathway": float(own[known].mean()) if any(known) else np.nan,
        "rank of own": float(((r > own[:, None]).sum(1) / (len(own) - 1)).mean()),
    }


def differential(
    x: FloatArray, env: NDArray[np.int64], control: int, rows: Sequence[int]
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Welch's t of every gene of each environment against the reference, and which pass 5 % (Benjamini-Hochberg)."""
    from scipy.stats import false_discovery_control, ttest_ind

    t, hit = [], []
    for e in rows:
        found = ttest_ind(x[env == e], x[env == control], equal_var=False)
        known = ~np.isnan(found.pvalue)
        q = np.ones(len(known))
        q[known] = false_discovery_control(found.pvalue[known])
        t.append(np.nan_to_num(found.statistic))
        hit.append(q < 0.05)
    return np.stack(t), np.stack(hit)


# ---------------------------------------------------------------------- data
def simulated(seed: int = 0, cells: int = 120) -> "AnnData":
    """Knock-outs with the real screen's names: the pathway on latent 0, IRF1 half as much, SMAD4 on 1, BRD4 on 2.

    The control is off by one common offset; the other knock-outs are null.
    """
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    nulls = ("CAV1", "CD86", "ATF2", "ETV7", "STAT2", "STAT3", "CMTM6", "MARCH8", "IRF7", "NFKBIA")
    names = [*PATHWAY, INSIDE, "SMAD4", "BRD4", *nulls]
    latent, genes = 5, 60
    moves = pd.DataFrame(0.0, [*names, CONTROL], range(latent))
    moves.loc[list(PATHWAY), 0] = 3.0
    moves.loc[INSIDE, 0] = 2.0
    moves.loc["SMAD4", 1] = 3.0
    moves.loc["BRD4", 2] = -3.0
    moves.loc[CONTROL] = 0.5
    label = np.repeat([*names, CONTROL], cells)
    mixing = rng.normal(size=(latent, genes))
    z = rng.normal(size=(len(label), latent)) + moves.loc[label].to_numpy()
    x = z @ mixing + rng.normal(size=(len(label), genes))
    obs = pd.DataFrame({"target": label, "replicate": np.tile(REPLICATES, len(label) // 2)})
    obs.index = [f"c{i}" for i in range(len(obs))]
    return AnnData(X=x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]))


def papalexi(config: Crispr) -> "AnnData":
    """log1p at the median depth, replicates centred on their non-targeting cells; without genes that few cells show."""
    import anndata

    if config.data == "simulated":
        return simulated()
    adata = anndata.read_h5ad(data_folder("papalexi_thp1") / "papalexi_thp1_rep12_counts.h5ad")
    if config.cells < adata.n_obs:
        adata = adata[np.random.default_rng(0).choice(adata.n_obs, config.cells, replace=False)]
    many = adata.obs["grna_target"].value_counts() >= _LEAST
    adata = adata[adata.obs["grna_target"].map(many).to_numpy(bool)]
    counts = adata.X.toarray().astype(np.float64)
    total = counts.sum(1, keepdims=True)
    kept = (counts > 0).mean(0) > _FEW
    x = np.log1p(counts / np.maximum(total, 1) * np.median(total))[:, kept]
    obs = pd.DataFrame(
        {"target": adata.obs["grna_target"].astype(str), "replicate": adata.obs["bio_rep"].astype(str)}, adata.obs_names
    )
    for name in REPLICATES:
        own = (obs["replicate"] == name).to_numpy()
        x[own] -= x[own & (obs["target"] == CONTROL).to_numpy()].mean(0)
    return anndata.AnnData(X=x.astype(np.float32), obs=obs, var=adata.var.loc[adata.var_names[kept]].copy())


def dataset(adata: "AnnData", kind: str = "one-hot", control: str = CONTROL) -> EnvironmentDataset:
    """Continuous cells of environments in ``obs["target"]``."""
    return EnvironmentDataset.from_anndata(
        adata, environment="target", control=control, representation=kind, counts=False
    )  # fmt: skip


def fitted(cells: EnvironmentDataset, config: Any, sparsity: str = "dense", k: int = 1) -> Run:
    """The Translation VAE with linear environment network, all seeds together."""
    model = ps.models.translation_vae(
        cells.schema, latent=config.latent, hidden=(config.hidden,), environment_hidden=(), sparsity=sparsity, k=k,
        shortcut=True,
    )  # fmt: skip
    batch = min(256, max(32, len(cells) // 8))
    return ps.fit(
        model, amortise(model, cells, hidden=(config.hidden,)), cells, seeds=config.seeds, batch_size=batch,
        lr=config.lr, epochs=max(2, round(config.steps * batch / len(cells))), schedule="cosine", device="cpu",
        progress=False,
    )  # fmt: skip


def published(cells: EnvironmentDataset, config: Any, name: str) -> Run:
    """SAMS-VAE or sVAE+ with the same sizes, as long."""
    model, guide = recipes.make(name, cells.schema, latent=config.latent, hidden=(config.hidden,))
    batch = min(256, max(32, len(cells) // 8))
    return ps.fit(
        model, guide, cells, seeds=config.seeds, objective=recipes.objective(name, model, cells), batch_size=batch,
        lr=config.lr, epochs=max(2, round(config.steps * batch / len(cells))), schedule="cosine", device="cpu",
        progress=False,
    )  # fmt: skip


# ---------------------------------------------------------------------- Papalexi
def main(config: Crispr) -> Results:
    adata = papalexi(config)
    cells = dataset(adata)
    x, env = np.asarray(cells.x, np.float64), cells.env
    rows = by_name(cells)
    names = [str(n) for n in cells.environments.index[rows]]
    errors = halves_errors(x, env, rows, config.draws, config.latent)
    rank = max(int(errors.argmin()), 1)
    print(f"papalexi: {len(cells)} cells, {len(cells.genes)} genes, effects of rank {rank}", flush=True)
    dense = fitted(cells, config)
    sparse = sparse_run(dense, cells, rank)
    refined = ps.refine(sparse, cells, prior="student-t", offset=True, **briefly(sparse), device="cpu", progress=False)
    slab = fitted(cells, config, "spike-slab", k=1)

    def read(run: Run, most: int | None, offset: bool = True) -> list[View]:
        return views(settled(run, cells, offset=offset), most)

    found = {
        "sparse": read(sparse, rank),
        "sparse, no offset": read(sparse_run(dense, cells, rank, offset=False), rank, offset=False),
        "sparse, all latents": read(sparse_run(dense, cells, config.latent), None),
        "refined": read(refined, rank),
        "dense": read(dense, None),
        "spike-slab": views(slab, masked=True),
        **{name: views(published(cells, config, name), masked=True) for name in ("sams_vae", "svae_plus")},
    }
    for kind in ("PCA", "ICA", "PCA turned"):
        found[kind] = [
            View.of(components(change, count, rank, kind, seed), names)
            for seed, (change, count) in enumerate(resampled(x, env, rows, len(config.seeds)))
        ]
    scores = pd.DataFrame(
        [{"way": way, "seed": k, **pathway_scores(v)} for way, several in found.items() for k, v in enumerate(several)]
    )
    t, hit = differential(x, env, int(np.flatnonzero(cells.reference)[0]), rows)
    best = found["sparse"][sparse.best]
    tables = {
        "summary": spread(scores, "way"),
        "inclusion": inclusion_table(found["sparse"]),
        "effects": best.effects,
        "containment": containment(best).loc[list(LEVEL), list(LEVEL)],
        "differential": differential_scores(t, hit, names),
        "rank": pd.DataFrame({"error": errors}).rename_axis("latents"),
        "scores": scores,
        "replicates": replicates(adata, config),
    }
    agreed = [inclusion_f1(a, b) for i, a in enumerate(found["sparse"]) for b in found["sparse"][:i]]
    text = (
        f"Papalexi: {len(cells)} cells, {len(cells.genes)} genes, effects of rank {rank}; "
        f"F1 of inclusions between seeds {np.mean(agreed):.2f} (lowest {np.min(agreed):.2f})."
    )
    return Results(tables, {"effects": heat_map(best)}, text)


def resampled(
    x: FloatArray, env: NDArray[np.int64], rows: Sequence[int], draws: int
) -> list[tuple[FloatArray, FloatArray]]:
    """Pseudobulk changes, in standard deviations of each gene, of cells drawn anew in every environment."""
    rng = np.random.default_rng(0)
    unit = x / np.maximum(x.std(0), 1e-9)
    out = []
    for _ in range(draws):
        chosen = np.concatenate([rng.choice(np.flatnonzero(env == e), (env == e).sum()) for e in rows])
        out.append(pseudobulk(unit[chosen], env[chosen], rows))
    return out


def differential_scores(t: FloatArray, hit: NDArray[np.bool_], names: Sequence[str]) -> pd.DataFrame:
    """What differential genes say of the same questions; one row."""
    place = {n: i for i, n in enumerate(names)}
    four = [place[n] for n in PATHWAY]
    unit = t / np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-12)
    others = [i for i, n in enumerate(names) if n not in PATHWAY and n != INSIDE]
    pairs = np.triu_indices(len(four), 1)
    jaccard = np.array([(hit[i] & hit[j]).sum() / max((hit[i] | hit[j]).sum(), 1) for i in four for j in four]).reshape(
        4, 4
    )
    size = np.maximum(hit.sum(1), 1)
    contained = pd.DataFrame((hit[:, None] & hit[None]).sum(-1) / size[:, None], names, names)
    return pd.DataFrame(
        [
            {
                "cosine of members": (unit[four] @ unit[four].T)[pairs].mean(),
                "largest cosine with others": float((unit[four].mean(0) @ unit[others].T).max()),
                "Jaccard of members' genes": jaccard[pairs].mean(),
                "IRF1 genes": float(hit[place[INSIDE]].sum()),
                "IRF1 genes within STAT1's": float(contained.loc[INSIDE, "STAT1"]),
                "share of IRF1 along STAT1": float((unit[place[INSIDE]] @ unit[place["STAT1"]]) ** 2),
                "CAV1 genes": float(hit[place[NEGATIVE]].sum()),
                "median genes of a knock-out": float(np.median(hit.sum(1))),
                **order_scores(contained),
            }
        ]
    )


def inclusion_table(several: Sequence[View]) -> pd.DataFrame:
    """Share of seeds that include each knock-out in each latent; latents matched to those of the first seed."""
    first = several[0]
    total = np.zeros(first.effects.shape)
    for view in several:
        x, y = first.effects.to_numpy(), view.effects.to_numpy()
        r = np.abs(np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :])
        i, j = linear_sum_assignment(-r)
        total[:, i] += view.included.to_numpy()[:, j]
    table = pd.DataFrame(total / len(several), first.effects.index, first.effects.columns)
    return table.loc[table.sum(axis=1).sort_values(ascending=False, kind="stable").index]


def replicates(adata: "AnnData", config: Crispr) -> pd.DataFrame:
    """Fits to one replicate each: do they agree? One row a way, mean and spread over seeds (or resamples).

    A fit to one replicate is compared with a fit of another seed to the other: members of one seed start from the same
    effects, and what is left of them would pass for agreement.
    """
    halves, runs, ranks, bulk = [], [], [], []
    for name in REPLICATES:
        cells = dataset(adata[adata.obs["replicate"] == name].copy())
        x, env = np.asarray(cells.x, np.float64), cells.env
        rows = by_name(cells)
        rank = ps.effect_rank(cells, largest=config.latent, draws=config.draws)
        dense = fitted(cells, config)
        halves.append(cells)
        ranks.append(rank)
        own = {"dense": dense, "sparse": sparse_run(dense, cells, rank)}
        runs.append({way: settled(run, cells) for way, run in own.items()})
        bulk.append((resampled(x, env, rows, len(config.seeds)), [str(n) for n in cells.environments.index[rows]]))
    names = bulk[0][1]
    others = [(k + 1) % len(config.seeds) for k in range(len(config.seeds))]
    out = []

    def add(way: str, seed: int, a: View, b: View, genes: dict[str, float]) -> None:
        row = {"way": way, "seed": seed, "latents": (a.effects.shape[1] + b.effects.shape[1]) / 2}
        out.append(row | {"inclusion F1": inclusion_f1(a, b), "matched latents": matched_correlation(a, b)} | genes)

    found = {
        "sparse": [views(r["sparse"], k) for r, k in zip(runs, ranks, strict=True)],
        "dense": [views(r["dense"]) for r in runs],
    }
    for way, pair in found.items():
        whole = [decoded_changes(r[way], c, names) for r, c in zip(runs, halves, strict=True)]
        for seed, other in enumerate(others):
            genes = gene_agreement(whole[0][seed], whole[1][other], names)
            add(way, seed, pair[0][seed], pair[1][other], genes)
    masked = [
        decoded_changes(only_included(r["sparse"], v), c, names)
        for r, v, c in zip(runs, found["sparse"], halves, strict=True)
    ]
    for seed, other in enumerate(others):
        pair = [found["sparse"][0][seed], found["sparse"][1][other]]
        add("sparse, included only", seed, pair[0], pair[1], gene_agreement(masked[0][seed], masked[1][other], names))
    for kind in ("PCA", "ICA", "PCA turned"):
        for seed in range(len(config.seeds)):
            (one, m), (two, n) = (b[0][seed] for b in bulk)
            a, b = (
                View.of(components(c, k, r, kind, seed), names) for c, k, r in ((one, m, ranks[0]), (two, n, ranks[1]))
            )
            cut = [low_rank(c, k, r) for c, k, r in ((one, m, ranks[0]), (two, n, ranks[1]))]
            add(kind, seed, a, b, gene_agreement(*cut, names))
    for seed in range(len(config.seeds)):
        out.append(
            {"way": "pseudobulk", "seed": seed, **gene_agreement(bulk[0][0][seed][0], bulk[1][0][seed][0], names)}
        )
    return spread(pd.DataFrame(out), "way")


def low_rank(change: FloatArray, count: FloatArray, rank: int) -> FloatArray:
    """Changes ``[E, G]`` cut to `rank` components, environments weighted by their cells."""
    right = np.linalg.svd(change * np.sqrt(count)[:, None], full_matrices=False)[2][:rank]
    return change @ right.T @ right


def only_included(run: Run, several: Sequence[View]) -> Run:
    """The run whose effects are 0 where their inclusion probability is below 1/2, and in latents after those."""
    values = shift_of(run)
    kept = np.zeros_like(values)
    rows = perturbed(run)
    for k, view in enumerate(several):
        on = view.included.to_numpy()
        kept[np.ix_([k], rows, range(on.shape[1]))] = (values[k][rows][:, : on.shape[1]] * on)[None]
    return with_effects(run, kept)


def decoded_changes(run: Run, cells: EnvironmentDataset, names: Sequence[str]) -> FloatArray:
    """``[K, E, G]`` changes of mean expression, in standard deviations of each gene."""
    from pyro_scm.baselines import controls

    unit = np.maximum(np.asarray(cells.x, np.float64).std(0), 1e-9)
    changes: FloatArray = (evaluation.predict_means(run, cells, names, cells=200) - controls(cells, names)) / unit
    return changes


# ---------------------------------------------------------------------- tables and figures
def spread(scores: pd.DataFrame, by: str) -> pd.DataFrame:
    """Mean of every score, and its standard deviation over seeds in columns of their own."""
    values = scores.drop(columns="seed").groupby(by, sort=False)
    mean, sd = values.mean(), values.std(ddof=0)
    pairs = [(mean[c].rename(c), sd[c].rename(f"{c} sd")) for c in mean]
    return pd.concat([part for pair in pairs for part in pair], axis=1)


def heat_map(view: View, top: int = 40) -> "Figure":
    """Effects by environment and latent, the largest first; a ring where inclusion is more likely than not."""
    from matplotlib.figure import Figure

    table = view.effects
    order = table.abs().max(axis=1).sort_values(ascending=False).index[:top]
    values = table.loc[order].to_numpy()
    drawn = Figure(figsize=(1.6 + 0.5 * values.shape[1], 1 + 0.22 * len(order)))
    axes = drawn.subplots()
    bound = float(np.abs(values).max())
    image = axes.imshow(values, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    y, x = np.nonzero(view.included.loc[order].to_numpy())
    axes.plot(x, y, "o", mfc="none", mec="k", ms=6)
    axes.set_xticks(range(values.shape[1]), list(table.columns), rotation=90)
    axes.set_yticks(range(len(order)), list(order), fontsize=7)
    drawn.colorbar(image, label="shift, sd of z")
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Crispr, main))

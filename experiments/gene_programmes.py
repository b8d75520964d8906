"""Gene programmes of latents, held against gene sets and networks (seed section 6.6; ADAGE, Tan et al. 2016).

For knock-outs in THP-1 cells (Papalexi et al. 2021) and drugs in A375 cells (LINCS L1000): an Environment VAE with a
nonlinear decoder (mean Jacobian over cells), one with a linear decoder, and principal components for comparison. Gene
sets: MSigDB hallmark, Reactome. Networks: TRRUST, DoRothEA (A to C), genes that rise after a knock-down (Replogle et
al. 2022). Everything is counted on the genes measured and compared with permuted gene labels; links also with rewired
networks that keep each gene's degree. Neither rules out that highly expressed genes are both well annotated and of
large weight.

Needs PYRO_SCM_DATA with networks/, papalexi_thp1/ and l1000_a375/.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments import l1000_unseen_drugs, papalexi_thp1
from experiments.launch import Results, data_folder, launch
from pyro_scm import infer, query, recipes
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.programmes import Programmes, gene_programmes
from pyro_scm.run import Run

MODELS = {"nonlinear": True, "linear": False}
INTERFERON = "HALLMARK_INTERFERON_GAMMA_RESPONSE"


@dataclass(frozen=True)
class Validation:
    """Sizes."""

    data: tuple[str, ...] = ("papalexi", "l1000")
    seeds: tuple[int, ...] = (0, 1, 2)
    permutations: int = 1000
    cells: int = 20000
    latent: int = 10
    hidden: int = 64
    epochs: int = 20
    l1000_latent: int = 20
    l1000_hidden: int = 100
    l1000_epochs: int = 100

    @classmethod
    def preset(cls, name: str) -> "Validation":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return Validation(
                data=("papalexi",), seeds=(0,), permutations=20, cells=1500, hidden=16, epochs=1, l1000_epochs=1
            )
        return Validation() if name == "paper" else Validation(permutations=100, cells=3000, epochs=10, l1000_epochs=20)


# ---------------------------------------------------------------------- references
def networks(folder: Path, top: int = 20) -> dict[str, list[tuple[str, str]]]:
    """Links (regulator, target) of each reference network.

    Args:
        folder: of the files.
        top: genes after each knock-down, in order of their rise.
    """
    trrust = pd.read_csv(folder / "trrust_rawdata.human.tsv", sep="\t", header=None)
    dorothea = pd.read_csv(folder / "dorothea_hs_ABC.tsv.gz", sep="\t")
    replogle = pd.read_csv(folder / "replogle_k562_kd_to_top_up_genes.tsv.gz", sep="\t")
    replogle = replogle[replogle["rank"] <= top]
    return {
        "TRRUST": list(zip(trrust[0], trrust[1], strict=True)),
        "DoRothEA": list(zip(dorothea["tf"], dorothea["target"], strict=True)),
        "Replogle": list(zip(replogle["knockdown"], replogle["gene"], strict=True)),
    }


def collections(folder: Path) -> dict[str, dict[str, set[str]]]:
    sets = papalexi_thp1.gene_sets(folder)
    hallmark = {name: genes for name, genes in sets.items() if name.startswith("HALLMARK_")}
    return {"hallmark": hallmark, "Reactome": {n: g for n, g in sets.items() if n not in hallmark}}


# ---------------------------------------------------------------------- programmes
def components(cells: EnvironmentDataset, latent: int) -> Programmes:
    """Principal components of standardised (log-normalised) expression as programmes: no model, one "member"."""
    x: Any = cells.normalised()
    x = np.asarray(x.toarray() if hasattr(x, "toarray") else x, np.float64)
    deviation = x.std(0)
    x = (x - x.mean(0)) / np.where(deviation > 0, deviation, 1.0)
    _, s, v = np.linalg.svd(x, full_matrices=False)
    weights = (s[:latent, None] / len(x) ** 0.5 * v[:latent])[None].astype(np.float32)
    return Programmes(weights, cells.genes, tuple(f"PC_{i}" for i in range(latent)))


def fit(cells: EnvironmentDataset, config: Validation, data: str, nonlinear: bool) -> Run:
    papalexi = data == "papalexi"
    latent, hidden = (config.latent, config.hidden) if papalexi else (config.l1000_latent, config.l1000_hidden)
    model, guide = recipes.make(
        "environment_vae",
        cells.schema,
        latent=latent,
        hidden=(hidden,) if nonlinear else (),
        scale=False,
    )
    training: dict[str, Any] = (
        {"epochs": config.epochs, "batch_size": 256, "lr": 3e-3}
        if papalexi
        else {"epochs": config.l1000_epochs, "batch_size": 64, "lr": 1e-3}
    )
    return infer.fit(model, guide, cells, seeds=config.seeds, schedule="cosine", **training)


def read(data: str, config: Validation) -> EnvironmentDataset:
    if data == "papalexi":
        return papalexi_thp1.read(papalexi_thp1.Papalexi(cells=config.cells)).with_representation("one-hot")
    return l1000_unseen_drugs.read(l1000_unseen_drugs.L1000())


def interferon(run: Run, cells: EnvironmentDataset, sets: pd.DataFrame) -> pd.DataFrame:
    """Does the latent that the STAT1 knock-out moves most drive interferon-gamma genes? One row a member."""
    rows = []
    names = np.array(cells.environments.index)[cells.env]
    control = cells.reference[cells.env]
    for k, z in enumerate(query.embed(run, cells)["z"]):
        shift = np.abs(z[names == "STAT1"].mean(0) - z[control].mean(0)) / z[control].std(0)
        latent = str(run.model.sites[int(shift.argmax())])  # type: ignore[union-attr, index]
        own = sets[(sets["member"] == k) & (sets["gene_set"] == INTERFERON)].set_index("latent")
        row = own.loc[latent]
        rows.append(
            {
                "member": k,
                "latent": latent,
                "shift": shift.max(),
                **row[["set_size", "programme_size", "overlap", "expected", "p", "p_permutation"]],
                "rank of set's mean weight among latents": int(own["mean_weight"].rank(ascending=False)[latent]),
            }
        )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------- all of it
def main(config: Validation) -> Results:
    folder = data_folder("networks")
    references, known = collections(folder), networks(folder)
    parts: dict[str, list[pd.DataFrame]] = {n: [] for n in ("sets", "over_chance", "links", "links_each", "genes")}
    figures: dict[str, Any] = {}
    pathway = []
    for data in config.data:
        cells = read(data, config)
        found: dict[str, Programmes] = {"PCA": components(cells, config.latent if data == "papalexi" else
                                                          config.l1000_latent)}  # fmt: skip
        runs = {}
        for name, nonlinear in MODELS.items():
            print(f"{data}: {name} decoder, {len(cells)} cells, {len(cells.genes)} genes", flush=True)
            runs[name] = fit(cells, config, data, nonlinear)
            found[name] = gene_programmes(runs[name], cells)
        for name, programmes in found.items():
            label = {"data": data, "programmes": name}
            for collection, sets in references.items():
                each, overall = programmes.enrichment(sets, permutations=config.permutations)
                parts["sets"].append(each.assign(collection=collection, **label))
                parts["over_chance"].append(summary(each, overall).assign(collection=collection, **label))
                if data == "papalexi" and name in runs and collection == "hallmark":
                    pathway.append(interferon(runs[name], cells, each).assign(programmes=name))
            for network, edges in known.items():
                each, overall = programmes.links(edges, permutations=config.permutations)
                parts["links_each"].append(each.assign(network=network, **label))
                parts["links"].append(overall.assign(network=network, edges=int(each["links"].iloc[0]), **label))
            parts["genes"].append(programmes.table().assign(**label))
        best = runs["nonlinear"].best
        figures[f"{data}_programmes"] = found["nonlinear"].figure(best)
        figures[f"{data}_sets"] = bars(pd.concat(parts["sets"]), data)
    tables = {name: pd.concat(own, ignore_index=True) for name, own in parts.items()}
    front = {
        "over_chance": ["data", "programmes", "collection", "member"],
        "links": ["data", "programmes", "network", "links", "member"],
    }
    for name, columns in front.items():
        tables[name] = tables[name].set_index(columns).sort_index()
    tables["links_over_members"] = (
        tables["links"]
        .groupby(["data", "programmes", "network", "links"])
        .agg({**dict.fromkeys(("edges", "found", "expected_labels", "expected_degrees"), "mean"),
              **dict.fromkeys(("p_labels", "p_degrees"), "median")})
    )  # fmt: skip
    if pathway:
        tables["interferon"] = pd.concat(pathway, ignore_index=True)
    shown = ("over_chance", "links_over_members", "interferon")
    return Results(
        tables={name: tables[name] for name in (*shown, *(n for n in tables if n not in shown)) if name in tables},
        figures=figures,
        text=f"{config.permutations} permutations; members are seeds {config.seeds}; PCA has no seed.",
    )


def summary(each: pd.DataFrame, overall: pd.DataFrame) -> pd.DataFrame:
    """Pairs (latent, set) over chance, by high weight (q) and by mean weight (p_family). One row a member."""
    q = each.assign(high=each["q"] < 0.05, mean=each["p_family"] < 0.05).groupby(["member", "latent"])
    by_latent = q[["high", "mean"]].any().groupby("member").sum().add_prefix("latents, ")
    pairs = each.groupby("member").agg(
        latents=("latent", "nunique"),
        sets=("gene_set", "nunique"),
        genes_of_high_weight=("programme_size", "mean"),
        by_mean_weight=("p_family", lambda v: int((v < 0.05).sum())),
    )
    found = overall.set_index("member")[["found", "expected", "p"]]
    return found.join(pairs).join(by_latent).reset_index()


def bars(sets: pd.DataFrame, data: str, top: int = 12) -> Any:
    """The gene sets of smallest q, best over latents; a point a seed."""
    from matplotlib.figure import Figure

    own = sets[(sets["data"] == data) & (sets["programmes"] == "nonlinear")]
    best = own.groupby(["gene_set", "member"])["q"].min().unstack("member")
    best = -np.log10(best.clip(lower=1e-12))
    best = best.loc[best.median(axis=1).sort_values(ascending=False).index[:top]]
    names = [str(n).removeprefix("HALLMARK_").split("_Homo sapiens")[0][:60] for n in best.index]
    figure = Figure(figsize=(9, 0.6 + 0.32 * len(best)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(best)), best.median(axis=1), color="#9db7d5")
    for member in best:
        axes.plot(best[member], range(len(best)), "o", color="#1f5fa8", markersize=3)
    axes.axvline(-np.log10(0.05), color="#6e7781", linewidth=0.8)
    axes.set_yticks(range(len(best)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("-log10 q of the latent where the set is most enriched; bar: median over seeds, points: seeds")
    axes.set_title(f"{data}: gene sets among genes of high weight", fontsize=9)
    return figure


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Validation, main))

"""Unseen pairs of drug and cell line (LINCS L1000, level 5): three drugs in 65 lines, GSE92742.

A pair is held out with all its doses and times, while training has the drug in other lines and the line with another
drug. A condition is (drug, dose, time, line). Level 5 signatures are changes already (z-scores, clipped at 10): control
is no change. What is known of a line: its name and its tissue.

The ceiling is from pairs of signatures of one drug in one line, against those of the drug in different lines.
Needs PYRO_SCM_DATA with l1000_multicell/.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.launch import Results, data_folder, launch
from experiments.tables.models import MANY, suite
from experiments.tables.protocol import SMOKE, Sizes, compared
from experiments.tables.questions import Question, alike, asked, inner
from experiments.tables.reports import figure, reported, sentence
from pyro_scm.data import gct, l1000, splits
from pyro_scm.data.dataset import EnvironmentDataset

FloatArray: TypeAlias = NDArray[np.float64]

CONTROL = "no change"
DRUG_MEAN, LINE_MEAN = "mean of the drug", "mean of the line"
FURTHER = {DRUG_MEAN: alike("perturbation"), LINE_MEAN: alike("cell_line")}
RECENTRE = ("additive", DRUG_MEAN, "ridge")
_BOUND = 10.0


@dataclass(frozen=True)
class Lines(Sizes):
    """Sizes.

    Args:
        batch_size: smaller than elsewhere, for there are 200 signatures.
        fraction: of the pairs, held out.
        draw: of these pairs.
    """

    batch_size: int = 32
    fraction: float = 0.3
    latent: int = 30
    hidden: int = 256
    epochs: int = 100
    cells: int = 6
    precision: str = "bfloat16"
    draw: int = 0

    @classmethod
    def preset(cls, name: str) -> "Lines":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return Lines(**SMOKE)
        return Lines() if name == "paper" else Lines(models=("chemcpa", "decoder_only"), seeds=(0, 1), epochs=20)


def signatures() -> tuple[pd.DataFrame, FloatArray, list[str]]:
    """obs (drug, dose in uM, time in h, line, tissue), changes, and names of the genes."""
    folder = data_folder("l1000_multicell")
    adata = l1000.standardise(gct.read(folder / "modzs_n272x978.gctx"))
    lines = pd.read_csv(folder / "cellinfo_dhimmel.tsv.gz", sep="\t").drop_duplicates("cell_id").set_index("cell_id")
    own = adata.obs
    # a few signatures pool 6 h with 4 h
    time = own["pert_itime"].astype(str).str.split(" h").str[0].astype(float)
    line = own["cell_line"].astype(str)
    obs = pd.DataFrame(
        {
            "drug": own["perturbation"].astype(str),
            "dose": own["dose"].astype(float).round(3),
            "time": time,
            "line": line,
            "tissue": lines["cell_lineage"].reindex(line).fillna("unknown").astype(str).to_numpy(),
        },
        index=own.index,
    )
    x: Any = adata.X
    return obs, np.clip(np.asarray(x, np.float64), -_BOUND, _BOUND), [str(g) for g in adata.var_names]


def read(obs: pd.DataFrame, x: FloatArray, genes: list[str]) -> EnvironmentDataset:
    """Signatures, and two of no change at each time in a line of its own, so that all lines start from these."""
    from anndata import AnnData

    times = np.repeat(sorted(obs["time"].unique()), 2)
    none = pd.DataFrame({"drug": CONTROL, "dose": 0.0, "time": times, "line": "none", "tissue": "none"},
                        [f"none {i}" for i in range(len(times))])  # fmt: skip
    both = pd.concat([obs, none])
    values = np.concatenate([x, np.zeros((len(none), x.shape[1]))]).astype(np.float32)
    adata = AnnData(values, both, pd.DataFrame(index=genes))
    options: dict[str, Any] = {"environment": "drug", "control": CONTROL, "dose": "dose", "time": "time"}
    table = EnvironmentDataset.from_anndata(adata, **options, cell_line="line", counts=False).environments
    tissue = both.drop_duplicates("line").set_index("line")["tissue"]
    return EnvironmentDataset.from_anndata(
        adata, **options, cell_line="line", representation=features(table, tissue), counts=False
    )


def features(table: pd.DataFrame, tissue: "pd.Series[str]") -> pd.DataFrame:
    """log10(1 + dose) of each drug, line, tissue and time, by the names that compositional models read."""
    perturbed = ~table["is_reference"].to_numpy(bool)
    drugs = pd.get_dummies(table["perturbation"].where(perturbed)).mul(
        np.log10(1 + table["dose"].to_numpy(float)), axis=0
    )
    line = table["cell_line"].where(perturbed).astype(object)
    parts = {
        "perturbation=": drugs,
        "cell_line=": pd.get_dummies(line),
        "cell_line=tissue ": pd.get_dummies(line.map(tissue)),
    }
    named = [part.astype(float).add_prefix(prefix) for prefix, part in parts.items()]
    return pd.concat([*named, pd.DataFrame({"time / 24 h": table["time"].to_numpy(float) / 24}, table.index)], axis=1)


def held_out_pairs(cells: EnvironmentDataset, fraction: float, seed: int) -> list[str]:
    """Conditions of the pairs that `splits.by_combination` draws."""
    split = splits.by_combination(cells, covariate="cell_line", fraction=fraction, seed=seed)
    return [str(n) for n in split.test.environments.index[split.test.present]]


def question(config: Lines) -> tuple[Question, Question, pd.DataFrame]:
    """What is scored, what is chosen by, and the noise ceiling."""
    obs, x, genes = signatures()
    cells = read(obs, x, genes)
    names = held_out_pairs(cells, config.fraction, config.draw)
    held = np.isin(cells.env, cells.environment_index(*names))
    split = splits.Split(cells.subset(~held), None, cells.subset(held), protocol="combination")
    references = cells.subset(cells.reference[cells.env])  # no change, without noise: nothing to keep apart
    made = asked(split, config.top, references)
    inside = inner(made, held_out_pairs(made.train, config.fraction, config.draw + 1), config.top, references)
    return made, inside, ceiling(obs, x)


def ceiling(obs: pd.DataFrame, x: FloatArray) -> pd.DataFrame:
    """Correlation of two signatures of one drug in one line and in two, and what knowing the truth would reach.

    Signatures of other doses and times are not replicates: the correlation at the same dose and time stands beside.
    """
    r = np.corrcoef(x)
    rows = {}
    for drug in sorted(obs["drug"].unique()):
        i = np.flatnonzero(obs["drug"] == drug)
        own, upper = obs.iloc[i], np.triu_indices(len(i), 1)
        pair = r[np.ix_(i, i)][upper]
        line = own["line"].to_numpy()[upper[0]] == own["line"].to_numpy()[upper[1]]
        condition = line.copy()
        for column in ("dose", "time"):
            condition &= own[column].to_numpy()[upper[0]] == own[column].to_numpy()[upper[1]]
        same = float(pair[condition].mean()) if condition.any() else float("nan")
        rows[drug] = {
            "signatures": len(i),
            "same condition": same,
            "pairs": int(condition.sum()),
            "same line": float(pair[line].mean()),
            "other lines": float(pair[~line].mean()),
            "ceiling": float(np.sqrt(max(same, 0.0))) if condition.any() else float("nan"),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("drug")


def main(config: Lines) -> Results:
    made, choosing, limit = question(config)
    options = suite(MANY, config.models)
    if "chemcpa" in options:
        options["chemcpa"] = {"molecule": "embedding"}
    found = compared(made, [choosing], config, options, further=FURTHER, recentre=RECENTRE)
    groups = made.train.environments.loc[list(made.names), "perturbation"]
    text = (
        f"{len(made.train)} training signatures, {len({tuple(u) for u in made.units.values()})} pairs held out; "
        f"{sentence([found])}"
    )
    return Results({**reported("pairs", [found], groups), "ceiling": limit}, {"scores": figure([found])}, text)


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Lines, main))

"""Unseen doses and drugs in human hepatocytes (Open TG-GATEs; 121 drugs, three doses, 2, 8 and 24 h, two arrays each).

high: the high dose at 24 h of some drugs, whose other doses and times are in training. drugs: drugs unseen, predicted
from SMILES, dose and time. middle: the middle dose, between a low and a high one in training.

Arrays are changes from the control arrays of their own drug and time, which differ between drugs as much as drugs do.
Where a drug is on both sides, training is measured from the control of replicate 1 and the truth from that of
replicate 2, so that no noise is shared. Doses are levels (1, 5, 25), multiples of the lowest, as they were planned.

The ceiling is the correlation with the observed mean that knowing the true mean would reach, from the correlation r of
two arrays with a control each: one array has noise (1 / r - 1) / 2 times the signal.
Needs PYRO_SCM_DATA with tggates_hepatocytes/.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.launch import Results, data_folder, launch
from experiments.tables.models import MANY, UNSEEN, suite
from experiments.tables.protocol import SMOKE, Sizes, Table, compared
from experiments.tables.questions import Question, alike, asked
from experiments.tables.reports import figure, reported, sentence
from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset, read_h5ad
from pyro_scm.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FloatArray: TypeAlias = NDArray[np.float64]

CONTROL = "control"
LEVELS = {"Control": 0.0, "Low": 1.0, "Middle": 5.0, "High": 25.0}
PARTS = ("high", "drugs", "middle")
DOSE_MEAN, DRUG_MEAN = "mean of the dose", "mean of the drug"
ENDS = "low and high"
FURTHER = {
    "high": {DOSE_MEAN: alike("time", "dose"), DRUG_MEAN: alike("perturbation")},
    "drugs": {DOSE_MEAN: alike("time", "dose")},
    "middle": {
        DOSE_MEAN: alike("time", "dose"),
        DRUG_MEAN: alike("perturbation"),
        ENDS: alike("perturbation", "time"),
    },
}
"""Baselines besides those of the suite, by the columns in which the training conditions that they average agree."""
RECENTRE = {
    "high": (DOSE_MEAN, DRUG_MEAN, "ridge"),
    "drugs": (DOSE_MEAN, "ridge"),
    "middle": (DOSE_MEAN, ENDS, "ridge"),
}
"""Baselines that models are recentred on."""


@dataclass(frozen=True)
class Doses(Sizes):
    """Sizes.

    On the conditions to choose by, part high, 10 latents, 64 units and 40 epochs predict less than these: Pearson delta
    of latent_additive .40 and .44, decoder_only .36 and .45, environment_vae .31 and .39, conditional_vae .40 and .42.

    Args:
        parts: of `PARTS`.
        held_out: drugs of part high and of part drugs.
        bits: of fingerprints.
        draw: of the held-out drugs.
    """

    parts: tuple[str, ...] = PARTS
    held_out: tuple[int, ...] = (30, 20)
    bits: int = 256
    draw: int = 1
    latent: int = 30
    hidden: int = 256
    epochs: int = 100
    cells: int = 30
    precision: str = "bfloat16"

    @classmethod
    def preset(cls, name: str) -> "Doses":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return Doses(**SMOKE, parts=("high",), bits=64)
        return Doses() if name == "paper" else Doses(models=("chemcpa", "decoder_only"), seeds=(0, 1), epochs=20)


# ---------------------------------------------------------------------- data
def arrays() -> tuple[pd.DataFrame, pd.DataFrame]:
    """obs (drug, level, time, replicate, smiles) and log2 expression, genes as its columns' names."""
    adata = read_h5ad(data_folder("tggates_hepatocytes") / "tggates_hepatocytes_log2.h5ad")
    x: Any = adata.X
    own = adata.obs
    obs = pd.DataFrame(
        {
            "drug": own["treatmentid"].astype(str).to_numpy(),
            "level": own["dose_level"].astype(str).to_numpy(),
            "time": own["duration"].astype(float).to_numpy(),
            "replicate": own["individual_id"].astype(int).to_numpy(),
            "smiles": own["smiles"].astype(str).to_numpy(),
        },
        index=[f"array {name}" for name in adata.obs_names],
    )
    return obs, pd.DataFrame(np.asarray(x.toarray() if hasattr(x, "toarray") else x, np.float64), obs.index,
                             adata.var_names)  # fmt: skip


def changes(obs: pd.DataFrame, x: pd.DataFrame, held_out: NDArray[np.bool_]) -> tuple[pd.DataFrame, FloatArray]:
    """Changes from the controls of their drug and time, and what becomes of each array.

    Args:
        obs: of `arrays`.
        x: expression.
        held_out: which arrays are held out; of controls it does not matter.

    Returns:
        obs with the column side: train, test, control (differences of controls, for training), and zero: what the held
        out changes are measured from; and the changes.
    """
    values, control, replicate = x.to_numpy(), (obs["level"] == "Control").to_numpy(), obs["replicate"].to_numpy()
    result, side = np.full_like(values, np.nan), np.full(len(obs), "", dtype=object)
    for _, rows in obs.reset_index(drop=True).groupby(["drug", "time"]):
        i = rows.index.to_numpy()
        own, treated = i[control[i]], i[~control[i]]
        first, second = (values[own[replicate[own] == r]].mean(0) for r in (1, 2))
        test = held_out[treated]
        side[treated] = np.where(test, "test", "train")
        if test.any() and not test.all():
            result[treated] = values[treated] - np.where(test[:, None], second, first)
            continue
        result[treated] = values[treated] - (first + second) / 2
        if not test.any():
            result[own] = values[own] - (first + second) / 2
            side[own] = "control"
    kept = side != ""
    times = np.repeat(sorted(obs["time"].unique()), 2)
    zero = pd.DataFrame({"time": times, "side": "zero", "level": "Control"}, [f"zero {i}" for i in range(len(times))])
    table = pd.concat([obs[kept].assign(side=side[kept]), zero])
    reference = table["side"].isin(["control", "zero"])
    table["drug"] = table["drug"].where(~reference, CONTROL)
    table["smiles"] = table["smiles"].where(~reference & (table["smiles"] != ""), None)
    table["dose"] = table["level"].map(LEVELS)
    return table, np.concatenate([result[kept], np.zeros((len(zero), values.shape[1]))])


def held_out(obs: pd.DataFrame, part: str, config: Doses) -> NDArray[np.bool_]:
    """Arrays that a part holds out."""
    level, drug = obs["level"], obs["drug"]
    rng = np.random.default_rng(config.draw)
    if part == "high":
        high = (level == "High") & (obs["time"] == 24)
        chosen = rng.permutation(sorted(drug[high].unique()))[: config.held_out[0]]
        return (high & drug.isin(chosen)).to_numpy()
    if part == "drugs":
        return drug.isin(rng.permutation(sorted(drug.unique()))[: config.held_out[1]]).to_numpy()
    if part == "middle":
        return ((level == "Middle") & drug.isin(drug[level == "Low"])).to_numpy()
    raise DataError(f"no part {part!r}: use some of {', '.join(PARTS)}")


def question(part: str, config: Doses) -> tuple[Question, Question, pd.DataFrame]:
    """What is scored, what is chosen by, and the noise ceiling."""
    obs, x = arrays()
    if part == "drugs":
        known = (obs["smiles"] != "").to_numpy()
        obs, x = obs[known], x[known]
    held = held_out(obs, part, config)
    made, cells = _asked(obs, x, held, np.zeros_like(held), part, config)
    inside = _alike_held_out(obs, held, part, config)
    choosing, _ = _asked(obs, x, inside, held, part, config)
    return made, choosing, ceiling(obs, x, made.names, cells, part)


def _asked(
    obs: pd.DataFrame,
    x: pd.DataFrame,
    held: NDArray[np.bool_],
    unseen: NDArray[np.bool_],
    part: str,
    config: Doses,
) -> tuple[Question, EnvironmentDataset]:
    """The question about held-out arrays, and all cells; others may be neither trained on nor asked about.

    Controls are shared out as if those were held out too, so that a choice is made as the scores are: the control of a
    truth is in no training array.
    """
    from anndata import AnnData

    table, values = changes(obs, x, held | unseen)
    kept = ~table.index.isin(obs.index[unseen])
    table, values = table[kept], values[kept]
    cells = EnvironmentDataset.from_anndata(
        AnnData(values.astype(np.float32), table, pd.DataFrame(index=x.columns)),
        environment="drug",
        control=CONTROL,
        dose="dose",
        time="time",
        smiles="smiles" if part == "drugs" else None,
        representation=("molecules" if part == "drugs" else "multi-hot", "time"),
        bits=config.bits,
        counts=False,
    )
    side = table["side"].to_numpy()
    names = [str(n) for n in cells.environments.index[np.unique(cells.env[side == "test"])]]
    split = splits.by_environment(cells, held_out=names)
    split = replace(
        split, train=split.train.subset(~np.isin(np.asarray(split.train.origin), np.flatnonzero(side == "zero")))
    )
    made = asked(split, config.top, cells.subset(side == "zero"))
    level = x[obs["level"] == "Control"].groupby([obs["drug"], obs["time"]]).mean()
    own = cells.environments.loc[list(made.names)]
    offset = np.stack([level.loc[key].to_numpy() for key in zip(own["perturbation"], own["time"], strict=True)])
    return replace(made, offset=offset), cells


def _alike_held_out(obs: pd.DataFrame, held: NDArray[np.bool_], part: str, config: Doses) -> NDArray[np.bool_]:
    """Arrays to choose by, held out of the others as these are."""
    rest = obs[~held & (obs["level"] != "Control").to_numpy()]
    names = np.random.default_rng(config.draw + 1).permutation(sorted(rest["drug"].unique()))
    if part == "high":
        own = rest[(rest["level"] == "High") & (rest["time"] == 24)]
        chosen = own[own["drug"].isin([n for n in names if n in set(own["drug"])][: config.held_out[0]])]
    elif part == "drugs":
        chosen = rest[rest["drug"].isin(names[: config.held_out[1] // 2])]
    else:  # of drugs without a low dose the middle one lies below the high one
        own = rest[rest["level"] == "Middle"]
        chosen = own[own["drug"].isin(list(own["drug"].unique())[::2])]
    return obs.index.isin(chosen.index)


# ---------------------------------------------------------------------- noise ceiling
def ceiling(
    obs: pd.DataFrame, x: pd.DataFrame, names: Sequence[str], cells: EnvironmentDataset, part: str
) -> pd.DataFrame:
    """Correlation of replicates with a control each, and what knowing the truth would reach, by dose and time.

    Args:
        obs: of `arrays`.
        x: expression.
        names: held-out conditions.
        cells: whose environments they are.
        part: drugs has two controls in its truth, the others one.
    """
    by = {
        key: x.loc[i].to_numpy().mean(0)
        for key, i in obs.groupby(["drug", "time", "level", "replicate"]).groups.items()
    }
    level = {v: k for k, v in LEVELS.items()}
    rows = []
    for name in names:
        drug, dose, time = cells.environments.loc[name, ["perturbation", "dose", "time"]]
        pair = [by.get((drug, time, level[dose], r)) for r in (1, 2)]
        if all(p is not None for p in pair):
            a, b = (p - by[drug, time, "Control", r] for r, p in zip((1, 2), pair, strict=True))
            rows.append({"dose": dose, "time": time, "r": float(np.corrcoef(a, b)[0, 1])})
    table = pd.DataFrame(rows).groupby(["dose", "time"])["r"].agg(["size", "median", "mean"])
    r = table["mean"].clip(lower=1e-3)
    noise = (1 / r - 1) / 2
    table["ceiling"] = (1 + noise * (0.5 + (0.5 if part == "drugs" else 1.0))) ** -0.5
    return table.rename(columns={"size": "conditions", "median": "r, median", "mean": "r, mean"})


# ---------------------------------------------------------------------- results
def part_results(part: str, config: Doses) -> tuple[dict[str, pd.DataFrame], dict[str, "Figure"], str]:
    """Tables, figures and a sentence of one part."""
    made, choosing, limit = question(part, config)
    names = tuple(m for m in config.models if part != "drugs" or m in UNSEEN)
    options = suite(MANY, names)
    if part != "drugs" and "chemcpa" in options:
        options["chemcpa"] = {"molecule": "embedding"}
    found = compared(made, [choosing], config, options, further=FURTHER[part], recentre=RECENTRE[part])
    table = made.train.environments.loc[list(made.names)]
    groups = table["dose"] if part == "high" else table["time"] if part == "middle" else _dose_and_time(table)
    tables = {**reported(part, [found], groups), f"{part}_ceiling": limit}
    figures = {f"{part}_scores": figure([found])}
    if part == "middle":
        figures["middle_curves"] = curves(made, found)
    text = f"{part}: {table['perturbation'].nunique()} drugs, {sentence([found])}"
    return tables, figures, text


def _dose_and_time(table: pd.DataFrame) -> "pd.Series[Any]":
    return table["dose"].map("dose {:g}".format) + table["time"].map(", {:g} h".format)


def curves(made: Question, found: Table, drugs: int = 6) -> "Figure":
    """Dose curves at 24 h along each drug's change at the high dose: measured, the champion's, and low and high."""
    from matplotlib.figure import Figure

    table = made.train.environments
    means = {
        str(n): made.train.mean_expression().loc[n].to_numpy()
        for n in made.train.environments.index[made.train.present]
    }
    own = table.loc[list(made.names)]
    own = own[own["time"] == 24]
    names = {
        (p, d, t): str(n)
        for n, p, d, t in zip(table.index, table["perturbation"], table["dose"], table["time"], strict=True)
    }
    size = {
        p: float(np.linalg.norm(means[names[p, 25.0, 24.0]]))
        for p in own["perturbation"]
        if names.get((p, 25.0, 24.0)) in means
    }
    shown = sorted(size, key=lambda p: -size[p])[:drugs]
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    for axes, drug in zip(figure.subplots(2, 3).ravel(), shown, strict=False):
        direction = means[names[drug, 25.0, 24.0]] / size[drug]
        e = made.names.index(names[drug, 5.0, 24.0])
        ends = [float(means[names[drug, d, 24.0]] @ direction) for d in (1.0, 25.0)]
        axes.plot([1, 25], ends, "o", color="#6e7781", label="training")
        axes.plot([5], [float((made.truth - made.control)[e] @ direction)], "o", color="black", label="held out")
        for name, colour in ((found.champion, "#1f5fa8"), (ENDS, "#c0803a")):
            axes.plot([5], [float(found.changes[name][:, e].mean(0) @ direction)], "x", color=colour, label=name)
        axes.set(xscale="log", title=drug, xlabel="dose / lowest dose")
    figure.axes[0].legend(fontsize="x-small")
    return figure


def main(config: Doses) -> Results:
    parts = [part_results(part, config) for part in config.parts]
    tables = {name: table for own, _, _ in parts for name, table in own.items()}
    figures = {name: figure for _, own, _ in parts for name, figure in own.items()}
    return Results(tables, figures, "\n".join(text for _, _, text in parts))


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Doses, main))

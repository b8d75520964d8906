"""Pairs of gene activations from sparse effects (Norman et al. 2019, K562 cells, CRISPR activation).

Every condition that others say something about is held out and predicted: a pair of which both singles are there, a
pair of which one is, and a single that a pair and the other single leave over. Are effects that keep only what their
inclusion probability says, and refined ones, better than the dense ones they were made of, and than adding mean
changes? Turning latents alone changes no prediction.

Needs PYRO_SCM_DATA with norman_k562/, unless --data simulated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import pyro_scm as ps
from experiments.known_answers_crispr import (
    by_name,
    dataset,
    fitted,
    perturbed,
    settled,
    shift_of,
    sparse_run,
)  # fmt: skip
from experiments.launch import Results, briefly, data_folder, launch
from pyro_scm import effects, evaluation
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.directions import centre
from pyro_scm.run import Run

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

FloatArray: TypeAlias = NDArray[np.float64]
Way: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]

CONTROL = "control"
_FEATURE = "perturbation="
_FEW = 0.02  # share of cells below which a gene says nothing


@dataclass(frozen=True)
class Pairs:
    """Sizes.

    Args:
        data: real, or simulated: pairs that add in the latents.
        seeds: of each model's members.
        latent: of the models.
        hidden: units of their one hidden layer.
        steps: of training.
        lr: of training.
        draws: split halves that decide the number of latents.
    """

    data: str = "real"
    seeds: tuple[int, ...] = tuple(range(5))
    latent: int = 10
    hidden: int = 64
    steps: int = 1200
    lr: float = 1e-2
    draws: int = 20

    @classmethod
    def preset(cls, name: str) -> "Pairs":
        """Sizes of smoke, quick and paper."""
        if name == "smoke":
            return cls(data="simulated", seeds=(0, 1), steps=200, lr=0.03, draws=4, latent=5, hidden=16)
        return cls() if name == "paper" else cls(seeds=(0, 1), steps=400, draws=10)


# ---------------------------------------------------------------------- data
def read(config: Pairs) -> "AnnData":
    """Log-normalised cells with their condition in ``obs["target"]``, without genes that few of them show."""
    import anndata

    if config.data == "simulated":
        return simulated()
    adata = anndata.read_h5ad(data_folder("norman_k562") / "norman_k562_train_log1p.h5ad")
    x = adata.X.toarray() if hasattr(adata.X, "toarray") else np.asarray(adata.X)
    obs = pd.DataFrame({"target": adata.obs["condition"].astype(str)}, adata.obs_names)
    kept = (x > 0).mean(0) > _FEW
    return anndata.AnnData(X=x[:, kept].astype(np.float32), obs=obs, var=adata.var.loc[kept, []].copy())


def simulated(seed: int = 0, cells: int = 60) -> "AnnData":
    """Singles of which half move one latent of five each, and a pair that adds."""
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    singles = [f"S{i}" for i in range(14)]
    moves = {s: np.eye(5)[i % 5] * (3.0 if i < 7 else 0.0) for i, s in enumerate(singles)}
    moves |= {"S0+S1": moves["S0"] + moves["S1"], CONTROL: np.zeros(5)}
    label = np.repeat(list(moves), cells)
    z = rng.normal(size=(len(label), 5)) + np.stack([moves[n] for n in label])
    x = z @ rng.normal(size=(5, 40)) + rng.normal(size=(len(label), 40))
    obs = pd.DataFrame({"target": label}, [f"c{i}" for i in range(len(label))])
    return AnnData(X=x.astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(40)]))


def tasks(conditions: Sequence[str]) -> dict[str, list[Way]]:
    """What can be predicted from what: condition -> ways to it, each (conditions added, conditions taken away)."""
    known = set(conditions)
    ways: dict[str, list[Way]] = {}
    for name in sorted(known - {CONTROL}):
        parts = name.split("+")
        if len(parts) == 2:
            there = tuple(p for p in parts if p in known)
            if there:
                ways[name] = [(there, ())]
            continue
        pairs = sorted(p for p in known if "+" in p and name in p.split("+"))
        others = [(p, next(o for o in p.split("+") if o != name)) for p in pairs]
        found: list[Way] = [((p,), (other,)) for p, other in others if other in known]
        if found:
            ways[name] = found
    return ways


def kind(name: str, ways: Sequence[Way]) -> str:
    """Of a held-out condition."""
    if "+" not in name:
        return "single from a pair"
    return "pair, both singles" if len(ways[0][0]) == 2 else "pair, one single"


# ---------------------------------------------------------------------- predictions
def model_guesses(adata: "AnnData", name: str, config: Pairs) -> tuple[dict[str, FloatArray], int]:
    """Change ``[K, G]`` of a condition that is not trained on, by way; and the rank of the effects."""
    cells = dataset(adata, "multi-hot", CONTROL)
    kept = cells.subset(cells.env != cells.environment_index(name)[0])
    x = np.asarray(kept.x, np.float64)
    rank = ps.effect_rank(kept, largest=config.latent, draws=config.draws)
    dense = fitted(kept, config)
    sparse = sparse_run(dense, kept, rank)
    refined = ps.refine(sparse, kept, prior="student-t", offset=True, **briefly(sparse), device="cpu", progress=False)
    seen = parts_seen(kept)
    read = {
        way: settled(r, kept, offset=False) for way, r in (("dense", dense), ("sparse", sparse), ("refined", refined))
    }
    runs = {
        "dense": only_parts(read["dense"], seen),
        "sparse": only_parts(read["sparse"], seen, rank),
        "refined, all": only_parts(read["refined"], seen),
        "refined": only_parts(read["refined"], seen, rank),
    }
    control = x[kept.reference[kept.env]].mean(0)
    return {way: evaluation.predict_means(r, kept, [name], cells=100)[:, 0] - control for way, r in runs.items()}, rank


def parts_seen(cells: EnvironmentDataset) -> list[bool]:
    """Of each feature, whether any cell has it: an effect that was never trained is noise."""
    seen = {p for e in by_name(cells) for p in str(cells.environments["perturbation"].iloc[e]).split("+")}
    return [f.removeprefix(_FEATURE) in seen for f in cells.features]


def only_parts(run: Run, seen: Sequence[bool], rank: int | None = None) -> Run:
    """The run whose parts that were not seen do nothing.

    Args:
        run: of multi-hot conditions and a linear environment network.
        seen: see `parts_seen`.
        rank: keep of each part's effect, from the robust centre of all conditions, what its inclusion probability in
            the first `rank` latents says; the centre itself, which is the control's own oddity, counts once in all.
    """
    parameters = dict(run.parameters)
    weight = parameters["model.shift.net.0.weight"].clone()
    bias = parameters["model.shift.net.0.bias"].clone()
    on = np.array(seen)
    rows = perturbed(run)
    for k, values in enumerate(shift_of(run)[:, rows]):
        if rank is not None:
            middle = centre(values)
            parts = (weight[k] + bias[k][:, None]).double().cpu().numpy().T[on] - middle
            kept = np.zeros_like(parts)
            kept[:, :rank] = parts[:, :rank] * (effects.probabilities(parts[:, :rank]) > 0.5)
            weight[k][:, torch.as_tensor(on)] = torch.as_tensor(kept.T).to(weight)
            bias[k] = torch.as_tensor(middle).to(bias)
        weight[k][:, torch.as_tensor(~on)] = 0.0
    parameters |= {"model.shift.net.0.weight": weight, "model.shift.net.0.bias": bias}
    result = replace(run, parameters=parameters)
    result.model, result.guide = result.member(run.best)
    return result


def simple_guesses(change: dict[str, FloatArray], name: str, ways: Sequence[Way]) -> dict[str, FloatArray]:
    """Predictions from mean changes."""
    singles = [c for n, c in change.items() if "+" not in n and n not in (CONTROL, name)]
    each = [
        sum((change[a] for a in add), np.zeros_like(change[CONTROL])) - sum(change[t] for t in take)
        for add, take in ways
    ]
    return {
        "no change": np.zeros_like(change[CONTROL]),
        "mean of singles": np.mean(singles, axis=0),
        "additive": np.mean(each, axis=0),
    }


# ---------------------------------------------------------------------- scores
def agreement(truth: FloatArray, guess: FloatArray) -> dict[str, float]:
    """Pearson correlation of the change, and the error as a share of that of predicting none."""
    r = float(np.corrcoef(truth, guess)[0, 1]) if guess.std() > 1e-9 else np.nan
    return {"correlation": r, "error": float(np.linalg.norm(truth - guess) / np.linalg.norm(truth))}


def halves(own: FloatArray, control: FloatArray, draws: int = 50) -> dict[str, float]:
    """What half of the cells says of the other half, mean over draws: less than what all cells could."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        a, b = rng.permutation(len(own)), rng.permutation(len(control))
        one, two = (own[a[i::2]].mean(0) - control[b[i::2]].mean(0) for i in (0, 1))
        found.append(agreement(one, two))
    return {name: float(v) for name, v in pd.DataFrame(found).mean().items()}


def main(config: Pairs) -> Results:
    adata = read(config)
    label = adata.obs["target"].to_numpy().astype(str)
    x = np.asarray(adata.X, np.float64)
    change = {n: x[label == n].mean(0) - x[label == CONTROL].mean(0) for n in sorted(set(label))}
    out, ranks = [], []
    possible = tasks(list(change))
    for name, ways in possible.items():
        print(f"{name} held out", flush=True)
        about = {"kind": kind(name, ways), "held out": name}
        for way, guess in simple_guesses(change, name, ways).items():
            out.append({**about, "way": way, "seed": -1, **agreement(change[name], guess)})
        guesses, rank = model_guesses(adata, name, config)
        ranks.append(rank)
        for way, several in guesses.items():
            out += [{**about, "way": way, "seed": k, **agreement(change[name], g)} for k, g in enumerate(several)]
        own = halves(x[label == name], x[label == CONTROL])
        out.append({**about, "way": "halves of its cells", "seed": -1, **own})
    scores = pd.DataFrame(out)
    ways_ = list(dict.fromkeys(scores["way"]))
    groups = scores.groupby(["kind", "held out", "way"])
    tables = {
        f"{score}": groups[score].mean().unstack("way")[ways_].join(
            groups[score].std().unstack("way")[["dense", "sparse", "refined"]].add_suffix(" sd")
        )
        for score in ("error", "correlation")
    }  # fmt: skip
    left = [n for n in change if "+" in n and n not in possible]
    text = (
        f"Effects of rank {min(ranks)} to {max(ranks)}. Pairs of which no single is there: {', '.join(left) or 'none'}."
    )
    return Results({**tables, "scores": scores}, {"error": figure(scores, ways_)}, text)


def figure(scores: pd.DataFrame, ways: Sequence[str]) -> "Figure":
    """Error of every held-out condition."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(scores["held out"]))
    drawn = Figure(figsize=(1.5 + 1.1 * len(names), 3.5))
    axes = drawn.subplots()
    for i, way in enumerate(ways):
        own = scores[scores["way"] == way]
        at = [names.index(n) + (i - len(ways) / 2) * 0.1 for n in own["held out"]]
        axes.plot(at, own["error"], "o", ms=3, label=way)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    axes.set_ylabel("error / error of no change")
    axes.legend(fontsize=6)
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, Pairs, main))

"""Why sparse latents do not come out sparse, and what mends it: one remedy at a time.

Screens of the SAMS-VAE simulator. How well can the noise be read at all: by a network that was shown it (supervised, on
held-out cells), and by the guide of a model whose decoder and effects are the true ones. Then fits of the Translation
VAE with dense effects: as they are, unmixed, and refined, with effects that learn as fast as networks do or ten times
as fast (`effect_rate`), with decoders of different widths, and with a prior of effects that counts once for each
environment or once for each of its cells.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import pyro_scm as ps
from experiments.launch import Results, launch
from experiments.recover_truth import RecoverTruth, fitted, score
from guides import amortise
from pyro_scm import effects, metrics
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.nn import Shortcut, mlp
from pyro_scm.run import Run

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

VARIANTS: dict[str, tuple[int, float]] = {
    "effects as slow as networks": (200, 1.0),
    "half as wide": (100, 10.0),
    "recipe": (200, 10.0),
}
"""Width of decoder and guide, rate of the effects."""


@dataclass(frozen=True)
class WhyRotated:
    """Sizes of the experiment.

    Args:
        screens: each of a seed of its own.
        restarts: of each fit.
        steps: of training, and as many again where a fit is refined.
        cells: in each environment.
    """

    screens: int = 1
    restarts: int = 2
    steps: int = 600
    cells: int = 100

    @classmethod
    def preset(cls, name: str) -> "WhyRotated":
        """Sizes of a preset."""
        if name == "smoke":
            return cls(restarts=1, steps=20, cells=10)
        if name == "paper":
            return cls(screens=3, restarts=4, steps=6000, cells=500)
        return cls()


def _learnt(
    inputs: torch.Tensor, outputs: torch.Tensor, net: nn.Module, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of a network that is trained on four cells of five: what it says and what is true of the fifth."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, held = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    adam = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        rows = train[torch.randint(len(train), (256,))]
        adam.zero_grad()
        nn.functional.mse_loss(net(inputs[rows]), outputs[rows]).backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        return net(inputs[held]), outputs[held]


def _shown(adata: "AnnData") -> tuple[torch.Tensor, torch.Tensor]:
    """x in standard deviations, and z."""
    x = torch.as_tensor(np.asarray(adata.X), dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.as_tensor(np.asarray(adata.obsm["z"]), dtype=torch.float32)


def supervised(adata: "AnnData", steps: int) -> dict[str, float]:
    """MCC and R2 of a network x -> z."""
    x, z = _shown(adata)
    torch.manual_seed(0)
    read, true = _learnt(x, z, mlp(x.shape[1], (256, 256), z.shape[1]), steps)
    matched = metrics.mcc(true.numpy(), read.numpy()).score
    return {"mcc_z": matched, "linear_r2_z": metrics.linear_r2(true.numpy(), read.numpy())}


def residual(adata: "AnnData", width: int, steps: int) -> dict[str, float]:
    """What a decoder z -> x of some width leaves unexplained, over the variance of the noise (1: nothing but noise)."""
    x, z = _shown(adata)
    torch.manual_seed(0)
    net = Shortcut(mlp(z.shape[1], (width, width), x.shape[1]), z.shape[1], x.shape[1])
    said, true = _learnt(z, x, net, steps)
    share = synthetic.SCREENS["sams-vae"].noise_share ** 2
    return {"residual": float((said - true).square().mean()) * (1 + share) / share}


def true_model(cells: EnvironmentDataset, adata: "AnnData", config: WhyRotated) -> dict[str, float]:
    """Loss, MCC and R2 where decoder and effects are the true ones and only the guide is learnt."""
    model = synthetic.truth(adata).float()
    for p in model.parameters():
        p.requires_grad_(False)
    guide = amortise(model, cells, hidden=(200, 200))
    run = ps.fit(
        model, guide, cells, seeds=[0], epochs=max(2, round(config.steps * 256 / len(cells))), batch_size=256, lr=2e-3,
        schedule="cosine", fresh=False, device="cpu", progress=False,
    )  # fmt: skip
    z, true = ps.embed(run, cells)["z"][0].astype(np.float64), adata.obsm["z"]
    return {"loss": run.losses[0], "mcc_z": metrics.mcc(true, z).score, "linear_r2_z": metrics.linear_r2(true, z)}


def length(run: Run, adata: "AnnData") -> float:
    """Length of the effects as a share of the true ones' (root mean square over environments), of the best member."""
    own = np.square(effects.shifts(run).loc[run.best].to_numpy()).sum()
    return float(np.sqrt(own / np.square(np.asarray(adata.uns["truth"]["shift"])).sum()))


def main(config: WhyRotated) -> Results:
    rows: list[dict[str, Any]] = []
    sizes = RecoverTruth(restarts=config.restarts, steps=config.steps, cells=config.cells)
    for number in range(config.screens):
        adata = ps.simulate("sams-vae", seed=number, cells=config.cells)
        cells = synthetic.dataset(adata)

        def note(variant: str, way: str, found: dict[str, float], number: int = number) -> None:
            rows.append({"variant": variant, "way": way, "screen": number, **found})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)

        note("shown the truth", "network of x", supervised(adata, config.steps))
        for width in sorted({w for w, _ in VARIANTS.values()}):
            note("shown the truth", f"decoder, width {width}", residual(adata, width, config.steps))
        note("shown the truth", "true decoder and effects", true_model(cells, adata, config))
        for variant, (width, rate) in VARIANTS.items():
            run = fitted(cells, 15, sizes, width=width, effect_rate=rate)
            unmixed = ps.unmix(run, cells)
            ways = {"dense": run, "unmixed": unmixed}
            for way, weight in (("refined, counted once", 1.0), ("refined, counted by cells", None)):
                ways[way] = ps.refine(unmixed, cells, weight=weight, device="cpu", progress=False)
            for way, each in ways.items():
                note(variant, way, {**score(each, cells, adata, way), "length": length(each, adata)})
    scores = pd.DataFrame(rows)
    groups = scores.groupby(["variant", "way"], sort=False)
    summary = groups[["mcc_z", "linear_r2_z", "f1", "calibration error", "length", "loss", "residual"]].mean()
    text = f"Means over {config.screens} screens; of {config.restarts} restarts that with the lowest loss."
    return Results({"summary": summary, "scores": scores}, {"remedies": figure(scores)}, text)


def figure(scores: pd.DataFrame) -> "Figure":
    """MCC of every fit."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = drawn.subplots()
    own = scores[scores["way"].isin(["dense", "unmixed", "refined, counted by cells"])]
    names = list(VARIANTS)
    for k, (way, part) in enumerate(own.groupby("way", sort=False)):
        places = [names.index(v) + 0.15 * (k - 1) for v in part["variant"]]
        axis.plot(places, part["mcc_z"], "o", ms=5, label=str(way))
    ceiling = scores.loc[scores["way"] == "network of x", "mcc_z"].mean()
    axis.axhline(ceiling, ls=":", color="grey", label="network shown the truth")
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="MCC of z", ylim=(0, 1))
    axis.legend(fontsize=7)
    return drawn


if __name__ == "__main__":
    raise SystemExit(launch(__file__, WhyRotated, main))

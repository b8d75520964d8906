# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # What the first reports found, and what is found here
#
# The suite grew out of two sources. The first is P. Bertin, J. P. Cohen, Y. Bengio, "Towards Learning Cell
# Causal-Embeddings": the models, with experiments in figures 5 to 14, "standard deviations computed over 3 trials".
# The second is T. Yao's seminar "Single-Cell Response Modelling under Compositional Perturbations", which reviews
# CPA, chemCPA and MultiCPA and trains nothing itself.
#
# Here each of the first report's findings stands beside ours. The numbers are read from `experiments/results/`, where
# the experiments' *paper* presets left them; nothing but section 1's small example is computed in this notebook. The
# report gives its results as figures without numbers, so what is compared is what it says of them.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import pyro_scm as ps
from guides import amortise
from pyro_scm.data import synthetic

plt.rcParams.update({"figure.dpi": 60, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments" / "results").is_dir())
results = root / "experiments" / "results"
LABELS = {
    "vae": "VAE", "conditional_vae": "Conditional VAE", "environment_vae": "Environment VAE",
    "translation_vae": "Translation VAE", "structured_environment_vae": "Structured Environment VAE",
    "structured_translation_vae": "Structured Translation VAE", "ae": "Autoencoder",
    "adversarial_prior_ae": "Adversarial Prior AE",
}  # fmt: skip

# %% [markdown]
# ## 1. Two hidden variables (report's figures 5 to 8, 11 to 14)
# **The report:** a VAE finds two hidden variables only up to a rotation (figure 6: the best angle is around 0.4 pi,
# no multiple of pi / 2), because nothing in it wants them to be separate. Environments are to provide that.
#
# **Here:** the distance of the best angle from the nearest axis, in degrees, over 20 fits each, by the number of
# environments in training. As published, the Environment VAE mostly stops at some angle as well; the Translation VAE
# finds the axes in half of the fits with 5 environments and in most with 9. *Unmixed* (fit dense effects, then turn
# the axes so that each environment moves as few variables as possible) they all but always do.

# %%
two = pd.read_csv(results / "two_latents" / "summary.csv")
figure, panels = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for axes, way in zip(panels, ("as published", "unmixed"), strict=True):
    for colour, name in enumerate(("vae", "environment_vae", "translation_vae")):
        own = two[(two["model"] == name) & (two["way"] == way)]
        if len(own):
            axes.plot(own["environments"], own["median"], "o-", ms=4, color=f"C{colour}", label=LABELS[name])
    axes.set(title=way, xlabel="environments", xlim=(0.5, 9.5), ylim=(-1, 45))
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
panels[0].set_ylabel("degrees from an axis, median")
panels[0].legend(frameon=False)
unmixed = two[(two["way"] == "unmixed") & (two["environments"] >= 5)]
share, fits = unmixed["within_2_degrees"].mean(), unmixed["runs"].sum()
print(f"unmixed, 5 or more environments: {share:.1%} of {fits} fits within 2 degrees")
assert unmixed["within_2_degrees"].mean() > 0.99
assert (two[(two["model"] == "vae")]["within_2_degrees"] <= 0.05).all()

# %% [markdown]
# The same on one screen, now: the angle before and after unmixing.

# %%
design = {"latent": 2, "genes": 10, "environments": 5, "cells": 250, "graph": "empty", "decoder": "linear"}
adata = ps.simulate(**design, strength=3.0, constant=True, noise=0.3, seed=5)
cells = synthetic.dataset(adata)
model = ps.models.environment_vae(
    cells.schema, latent=2, hidden=(), environment_hidden=(), sparsity="dense", scale=False
)
guide = amortise(model, cells, hidden=(16,))
training = {"batch_size": 64, "lr": 0.02, "schedule": "cosine", "kl_warmup": 0.0, "progress": False}
run = ps.fit(model, guide, cells, seeds=range(3), epochs=60, **training)
batch = cells.batch([0, 1])


def loadings(model):
    """What one unit of each variable adds to each gene."""
    law = model.likelihoods[0]
    return (law.mean(torch.eye(2), batch) - law.mean(torch.zeros(2, 2), batch)).detach().numpy().T


def degrees(run):
    """Angle between each member's axes and the true ones, matched: of the mean of their cosines."""
    found, true = [], loadings(synthetic.truth(adata))
    for k in range(len(run)):
        learnt = loadings(run.member(k)[0])
        cosines = np.abs((true / np.linalg.norm(true, axis=0)).T @ (learnt / np.linalg.norm(learnt, axis=0)))
        found.append(np.degrees(np.arccos(np.clip(max(cosines.trace(), cosines[::-1].trace()) / 2, 0, 1))))
    return np.array(found)


before, after = degrees(run), degrees(ps.unmix(run, cells))
print("degrees from the true axes, members: fitted", before.round(1), "unmixed", after.round(1))
assert after.max() < 15
assert after.max() < np.median(before)

# %% [markdown]
# ## 2. Interventional densities (report's figure 3, and the figure it left to be done, 4)
# **The report** shows, from another paper, how a joint density moves under do(t := t + 1) and do(t := t - 0.5), and
# sets itself the task of drawing the same for the synthetic data. It gives no numbers.
#
# **Here:** the distance between the learnt and the true density of the genes under do(t := t + 1), as a share of what
# leaving the intervention out would cost (1 = no better than ignoring it), median over 30 fits. A model with the
# structural equations has it; without them it does not.

# %%
densities = pd.read_csv(results / "densities" / "summary.csv")
raised = densities[densities["action"] == "do(t := t + 1)"].pivot(index="design", columns="model", values="share genes")
raised = raised[["true, another sample", "structured_environment_vae", "conditional_vae", "vae"]].rename(columns=LABELS)
print(raised.round(3).to_string())
axes = raised.plot.barh(figsize=(6.5, 3))
axes.axvline(1, color="0.6", lw=0.8)
axes.set(xlabel="distance to the true density (1: intervention ignored)", ylabel="")
axes.legend(frameon=False, fontsize=7)
axes.figure.tight_layout()
assert (raised["Structured Environment VAE"] < 0.2).all()
assert (raised[["Conditional VAE", "VAE"]] > 0.5).all().all()

# %% [markdown]
# ## 3. Five dependent variables, environments never seen (report's figure 9)
# **The report:** trained on 5 random environments, "the basic VAE and Environment VAE perform well compared to other
# models, while the conditional VAE and the Translation VAE do not perform as well".
#
# **Here:** the same order with 5 environments (medians and middle 80 % over 3 screens x 10 seeds; squared error of a
# cell, summed over genes). With 20 the conditional VAE has caught up, the Translation VAE has not.

# %%
five = pd.read_csv(results / "five_latents" / "unseen.csv")
figure, axes = plt.subplots(figsize=(6, 3.2))
for i, name in enumerate(("vae", "environment_vae", "translation_vae", "conditional_vae")):
    own = five[five["model"] == name]
    gaps = np.stack([own["unseen"] - own["unseen 10 %"], own["unseen 90 %"] - own["unseen"]])
    axes.errorbar(own["environments"] * 1.05 ** (i - 1.5), own["unseen"], gaps, fmt="o-", ms=4, label=LABELS[name])
axes.set(xscale="log", yscale="log", xlabel="training environments", ylabel="error in unseen environments")
axes.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
axes.set_yticks([20, 50, 100, 300], ["20", "50", "100", "300"])
axes.minorticks_off()
axes.legend(frameon=False)
figure.tight_layout()
at_five = five[five["environments"] == 5].set_index("model")["unseen"]
assert at_five[["vae", "environment_vae"]].max() < at_five[["conditional_vae", "translation_vae"]].min()

# %% [markdown]
# ## 4. L1000: "all losses tend to explode after some time" (report's figure 10)
# **The report** leaves the cause open.
#
# **Here:** the explosion is reproduced with the report's settings and never seen with the suite's (bounded scales,
# clipped gradients, standardised input). *Lost*: the error in unseen environments became infinite or absurd, in so
# many of 3 seeds; *stand-in* is a simulation of such plates, *plates* are three real ones, which is much less data
# than the report's 14,631 samples.

# %%
tables = {
    ("stand-in", "as published"): "stand_in_figure_10", ("plates", "as published"): "plates_figure_10",
    ("stand-in", "defaults"): "stand_in_defaults", ("plates", "defaults"): "plates_defaults",
}  # fmt: skip
lost = {}
for key, name in tables.items():
    table = pd.read_csv(results / "l1000_explosion" / f"{name}.csv")
    own = table[(table["evaluated at"] == "posterior mean") & table["part"].isin(["figure 10", "defaults"])]
    lost[key] = own.set_index("model")["lost"]
lost = pd.DataFrame(lost).rename(index=LABELS)
print("seeds lost of 3:\n" + lost.to_string(na_rep="not run", float_format="{:.0f}".format))
assert lost.xs("as published", axis=1, level=1).drop(index="Autoencoder").sum().sum() > 0
assert lost.xs("defaults", axis=1, level=1).sum().sum() == 0

# %%
ablation = pd.read_csv(results / "l1000_explosion" / "stand_in_ablation.csv")
single = ablation["arm"].str.startswith("+") | (ablation["arm"] == "as published")
added = ablation[single & (ablation["evaluated at"] == "posterior mean")]
print("VAE on the stand-in, one remedy added at a time to the report's settings:")
print(added[["arm", "lost"]].to_string(index=False))

# %% [markdown]
# ## In one table
#
# | the report | here |
# |---|---|
# | a VAE ends at any angle | yes |
# | environments turn the axes right | as published only partly; unmixed yes, from two shifts of each variable |
# | degenerate case: a second environment generalises well (figure 13) | hardly: an offset of 0.5 says little of 20 |
# | VAE and Environment VAE best in unseen environments (figure 9) | yes with 5 environments; not with 20 |
# | losses explode on L1000 (figure 10) | yes, but for the autoencoder; each of several remedies helps |
#
# How each was measured, with spreads and limits, stands in `experiments/README.md`.

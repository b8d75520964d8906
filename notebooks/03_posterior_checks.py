# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # Can this model be trusted? Posterior checks with ArviZ
#
# A fitted model says what it believes *and how sure it is*. This notebook asks whether "how sure" is true:
#
# - Is the guide's posterior of a cell's hidden variables the right one? (part 1, against the exact answer)
# - Does the model describe the cells, do its intervals cover what it has not seen? (part 2)
# - Do the checks find a model that is wrong? (part 3)

# %%
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import pyro_scm as ps
from guides import amortise
from pyro_scm import criticism
from pyro_scm.data import splits, synthetic
from pyro_scm.posterior import warnings_of_arviz

with warnings_of_arviz():
    import arviz as az

plt.rcParams.update({"figure.dpi": 60, "axes.spines.top": False, "axes.spines.right": False})
pd.set_option("display.width", 120)

# %% [markdown]
# ## 1. Against a posterior that is known
# Take a linear model with Gaussian noise whose parameters are given. What can be known of a cell's hidden variables z
# is then a formula. Only the guide, the network that guesses z from a cell, is trained here.

# %%
screen = {"latent": 2, "genes": 12, "environments": 5, "graph": "empty", "decoder": "linear", "noise": 1.5}
adata = ps.simulate(**screen, cells=200, strength=2.0, constant=True, seed=2)
cells = synthetic.dataset(adata)
model = synthetic.truth(adata)
guide = amortise(model, cells, hidden=())
training = {"lr": 0.03, "schedule": "cosine", "progress": False}
run = ps.fit(model, guide, cells, seeds=range(3), epochs=60, batch_size=100, kl_warmup=0.0, **training)

some = cells.subset(np.arange(0, len(cells), 20))
idata = ps.to_arviz(run, some, draws=200)
print({group: dict(idata[group].sizes) for group in ("posterior", "prior_predictive", "log_likelihood")})

# %% [markdown]
# `to_arviz` gives ArviZ's `InferenceData`: *chain* is the member of the ensemble, *draw* a sample of its posterior.
# So ArviZ's tables and plots work. Cells that the formula gives a mean and a standard deviation of:

# %%
weight = model.likelihoods[0].net.weight.numpy().astype(float)
sd = model.likelihoods[0].scale.numpy().astype(float)
precision = np.eye(2) + (weight.T / sd**2) @ weight
expected = np.linalg.solve(precision, (np.asarray(some.x) / sd**2 @ weight + model.prior.loc.numpy()[some.env]).T).T
exact_sd = np.sqrt(np.diag(np.linalg.inv(precision)))
drawn = idata.posterior["z"]
error = (drawn.mean("draw").to_numpy() - expected) / exact_sd
ratio = drawn.std("draw").to_numpy().mean(1) / exact_sd
print(f"means are off by {np.sqrt((error**2).mean()):.2f} posterior standard deviations (200 draws alone: 0.07)")
print("guide's standard deviation / exact one, member by latent:\n", ratio.round(2))
assert np.sqrt((error**2).mean()) < 0.25
assert np.abs(ratio - 1).max() < 0.15

# %%
figure, axes = plt.subplots(figsize=(5, 3))
with warnings_of_arviz():
    az.plot_forest(idata, var_names=["z"], coords={"cell": list(some.cells[:4])}, combined=True, ax=axes)
axes.plot(expected[:4].ravel(), np.sort(axes.get_yticks())[::-1], "rx")
figure.tight_layout()

# %% [markdown]
# A model can also be checked where nothing is known exactly: let it *make* cells, infer them by its own guide, and
# see where the true z lies among the draws. If the guide is right, everywhere equally often (simulation-based
# calibration).

# %%
calibration = criticism.sbc(run, cells, draws=60, most_cells=200)[0]
print(calibration)
assert calibration.verdict != "bad"

# %% [markdown]
# ## 2. All checks of a learnt model
# Now everything is learnt, and one perturbation in five is held out, whole. Each check has a number, a threshold
# whose source is named, a verdict, and what it means in plain words.

# %%
screen = {"latent": 3, "genes": 15, "environments": 21, "descriptors": 6, "graph": "empty", "decoder": "linear"}
adata = ps.simulate(
    **screen, cells=60, noise=1.0, strength=2.5, constant=True, spread=0.7, descriptor_noise=0.0, seed=0
)
split = splits.by_environment(synthetic.dataset(adata, "descriptors"), fraction=0.2, seed=0)


def fitted(latent, epochs):
    model = ps.models.environment_vae(
        split.train.schema, latent=latent, hidden=(), environment_hidden=(), scale=False, sparsity="dense"
    )
    guide = amortise(model, split.train, hidden=())
    return ps.fit(model, guide, split.train, seeds=range(3), epochs=epochs, batch_size=64, **training)


sizes = {"draws": 60, "particles": 8, "most_cells": 100}
run = fitted(latent=3, epochs=80)
checked = criticism.checks(run, split.train, split.test, **sizes)
print(checked.table[["value", "verdict"]].round(3).to_string())
print(checked.summary())

# %%
for check in checked.checks:
    if check.verdict in ("look", "bad"):
        print(f"{check.name}: {check.words}")

# %% [markdown]
# What cells of the held-out perturbations look like, and how often intervals cover them. *Conformal* recalibration
# widens or narrows the intervals by what other held-out perturbations show:

# %%
held_out = ps.to_arviz(run, split.test.subset(np.arange(0, len(split.test), 2)), draws=60, particles=0)
table = criticism.interval_coverage(held_out, conformal=True)
means = table.groupby(level="level")[["coverage", "coverage_conformal"]].mean()
print(means.round(3).to_string())
assert np.abs(means["coverage_conformal"] - means.index).max() < 0.06
assert np.abs(means["coverage"] - means.index).max() < 0.15

# %%
criticism.ppc_figure(checked.data, genes=3)

# %% [markdown]
# ## 3. A model that is wrong
# One hidden variable instead of three, the truth. Do the checks notice? ArviZ's leave-one-out comparison says which
# model would predict a further cell better.

# %%
poor = fitted(latent=1, epochs=80)
found = {}
for name, asked in (("three latents", run), ("one latent", poor)):
    found[name] = ps.to_arviz(asked, split.train.subset(np.arange(0, len(split.train), 6)), draws=60, particles=8)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    compared = az.compare(found)
print(compared[["rank", "elpd_loo", "elpd_diff", "dse"]].round(1).to_string())
assert compared.index[0] == "three latents"
assert compared.loc["one latent", "elpd_diff"] > 2 * compared.loc["one latent", "dse"]

# %% [markdown]
# Where does it fail? Not in single genes: what the one variable cannot say is called noise, so that each gene's own
# distribution looks right. It fails in how genes go *together*:

# %%


def correlations(x, env):
    """Of genes within environments."""
    centred = np.concatenate([x[env == e] - x[env == e].mean(0) for e in np.unique(env)])
    return np.corrcoef(centred.T)[np.triu_indices(x.shape[1], 1)]


off = {}
for name, data in found.items():
    env = data.constant_data["environment"].to_numpy()
    drawn = data.prior_predictive["x"].to_numpy().reshape(-1, *data.observed_data["x"].shape)
    replicated = np.mean([correlations(x, env) for x in drawn[::6]], axis=0)
    off[name] = np.abs(replicated - correlations(data.observed_data["x"].to_numpy(), env)).mean()
    print(f"{name}: each gene's own distribution: {criticism.loo_pit(data).verdict};",
          f"correlations of genes are off by {off[name]:.2f}")  # fmt: skip
assert off["one latent"] > 2 * off["three latents"]

# %% [markdown]
# `checked.write("checks.html")`, or `pyro-scm check RUN DATA.h5ad`, makes one page of all this. Draws of a guide are
# independent, so effective sample sizes say nothing about it; and latents of two members are different variables, so
# that R-hat is taken of predictions, never of latents.

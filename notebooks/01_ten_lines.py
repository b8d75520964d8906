# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # From AnnData to a fitted causal model in ten lines
#
# A *perturbation screen* is a table of cells by genes, with one column that says what was done to each cell: a drug,
# a knock-out, or nothing (control). Here it is simulated, so that every answer can be checked; a screen of your own
# is read with `anndata.read_h5ad("screen.h5ad")`.

# %%
import pyro_scm as ps
from guides import amortise

adata = ps.simulate(latent=3, genes=30, environments=13, cells=60, strength=3.0, constant=True, decoder="linear")
cells = ps.EnvironmentDataset.from_anndata(adata, environment="perturbation", control="control")
model = ps.models.environment_vae(
    cells.schema, latent=3, hidden=(), environment_hidden=(), sparsity="dense", scale=False
)
guide = amortise(model, cells, hidden=(32,))
training = {"epochs": 60, "batch_size": 64, "lr": 0.02, "schedule": "cosine", "kl_warmup": 0.0, "progress": False}
run = ps.fit(model, guide, cells, seeds=range(3), **training)
run = ps.unmix(run, cells)
worlds = ps.counterfactual(run, cells.of("control"), environment="env_03")
answer = worlds.to_anndata(cells.of("control"))
answer

# %% [markdown]
# These were the ten lines:
#
# 1. `EnvironmentDataset` reads the cells. An *environment* is one condition of the screen.
# 2. `environment_vae` is the model: 3 hidden *causal variables* make up the expression of 30 genes, and a
#    perturbation pushes some of these variables.
# 3. `amortise` makes the *guide*, a network that reads a cell and says what its hidden variables probably were.
# 4. `fit` trains three copies (*members*) at once from different random starts. Where they disagree, do not trust
#    them.
# 5. `unmix` turns the hidden variables so that each perturbation moves as few of them as possible.
# 6. `counterfactual` asks: these very control cells, had they been in `env_03`?
#
# The answer is an AnnData again, with the cells as they were (`factual`), as they would have been (`counterfactual`),
# and how far the members disagree (`counterfactual_sd`).

# %% [markdown]
# ## Did training come to rest?

# %%
import matplotlib.pyplot as plt
import numpy as np

plt.rcParams.update(
    {"figure.dpi": 60, "figure.figsize": (4.5, 3), "axes.spines.top": False, "axes.spines.right": False}
)
print(run.summary().round(3).to_string())
figure, axes = plt.subplots()
axes.plot(run.history.pivot_table(index="epoch", columns="member", values="loss"))
axes.set(xlabel="epoch", ylabel="loss of each member")
figure.tight_layout()

# %% [markdown]
# ## Is the answer right?
# The simulation knows what each control cell would have been in `env_03`. `known` wraps this truth like a fitted run,
# so that the same question can be put to it.

# %%
from pyro_scm.data import synthetic

controls = cells.of("control")
true = ps.counterfactual(synthetic.known(adata, controls), controls, environment="env_03")
learnt_effect, true_effect = (answer.X - answer.layers["factual"]).mean(0), true.effect.mean((0, 1, 2))
r = np.corrcoef(learnt_effect, true_effect)[0, 1]
figure, axes = plt.subplots(figsize=(3.2, 3))
axes.plot(true_effect, learnt_effect, "o", ms=4)
axes.axline((0, 0), slope=1, color="0.7", lw=0.8)
figure.tight_layout()
axes.set(xlabel="true change of each gene", ylabel="learnt change")
print(f"correlation over genes: {r:.3f}")
assert r > 0.97

# %% [markdown]
# ## Are the hidden variables the true ones?
# They are found up to order, sign and scale: nothing in the data says which one comes first. So they are matched
# first.

# %%
z = ps.embed(run, cells)["z"][run.best]
match = ps.metrics.mcc(adata.obsm["z"], z)
print("correlation of each true variable with its learnt match:", np.abs(match.correlations).round(3))
assert match.score > 0.95

# %% [markdown]
# ## Keep it
# A run is a folder of plain files. `ps.load` gives it back, and `pyro-scm counterfactual FOLDER screen.h5ad
# --environment env_03 --out answer.h5ad` asks the same question without Python.

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    again = ps.load(run.save(folder + "/run"))
    same = ps.counterfactual(again, controls, environment="env_03")
assert np.allclose(same.x, worlds.x, atol=1e-5)
print("the run that was read back gives the same answer")

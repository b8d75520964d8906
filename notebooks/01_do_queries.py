# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---

# %% [markdown]
# # Questions with `do`, where the truth is known
#
# A synthetic screen is simulated from a latent structural causal model. The model that generated it is an ordinary
# Pyro program, so every question can first be put to the truth.

# %%
import numpy as np
import pyro
import torch

import pyro_scm as ps
from pyro_scm.data import synthetic

screen = {"latent": 3, "genes": 20, "environments": 7, "cells": 150, "graph": [[0, 1], [1, 2]], "decoder": "linear"}
adata = ps.simulate(**screen, noise=0.3, seed=1)
cells = synthetic.dataset(adata)
truth, exact = synthetic.known(adata, cells)
print(truth.scm.nodes, "edges", list(truth.scm.graph.edges))

# %% [markdown]
# ## Plain Pyro
# A causal variable is a site when a handler names it. `c` holds the variables after the intervention; `c_1` the value
# that node 1 would have had.

# %%
batch = cells.batch(np.arange(5)).unobserved()
intervened = pyro.poutine.do(truth, data={"c_1": torch.tensor(2.0)})
trace = pyro.poutine.trace(intervened).get_trace(batch)
print("after: ", trace.nodes["c"]["value"][:, 1])
print("natural:", trace.nodes["c_1"]["value"])
assert torch.all(trace.nodes["c"]["value"][:, 1] == 2.0)

# %% [markdown]
# ## Counterfactuals: abduction, action, prediction
# These very cells, had node 1 been raised by one. In the chain 0 -> 1 -> 2, node 0 stays and node 2 follows.

# %%
worlds = ps.counterfactual((truth, exact), cells, do={"c_1": lambda natural: natural + 1})
moved = (worlds.c - worlds.factual_c)[0, 0]
edge = float(truth.scm.matrix[2, 1])
print("mean movement of c_0, c_1, c_2:", moved.mean(0).round(3), "  effect of 1 on 2:", edge)
assert np.allclose(moved, [0.0, 1.0, edge], atol=1e-5)

# %% [markdown]
# ## The same question to a learnt model
# Latents are learnt up to permutation, sign and scale, so a learnt one is first matched with the true one.

# %%
from guides import amortise

model = ps.models.environment_vae(cells.schema, latent=3, hidden=(), scale=False)
guide = amortise(model, cells, hidden=(64,))
run = ps.fit(model, guide, cells, seeds=(0, 1, 2), epochs=40, lr=1e-2, schedule="cosine", progress=False)
c = ps.embed(run, cells)["c"][run.best]
match = ps.metrics.mcc(worlds.factual_c[0, 0], c)
print("correlation of matched latents:", np.abs(match.correlations).round(2))

# %% [markdown]
# ## Another environment
# The control cells, had they been in `env_3`: the learnt change of expression beside the true one.

# %%
controls = cells.of("control")
learnt = ps.effect(run, controls, environment="env_3").summary()["effect"]
true = ps.effect(synthetic.known(adata, controls), controls, environment="env_3").summary()["effect"]
agreement = float(np.corrcoef(learnt, true)[0, 1])
print(f"correlation over genes: {agreement:.3f}")
assert agreement > 0.9

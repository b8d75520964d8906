"""What the examples in docstrings may use."""

import pyro_scm as ps
from guides import amortise

adata = ps.simulate(latent=2, genes=6, environments=9, cells=20, decoder="linear", graph="empty")
cells = ps.EnvironmentDataset.from_anndata(adata, environment="perturbation", control="control")
model = ps.models.translation_vae(cells.schema, latent=2, hidden=(), sparsity="dense")
guide = amortise(model, cells, hidden=(8,))
run = ps.fit(model, guide, cells, seeds=range(2), epochs=3, lr=1e-2, progress=False)

"""Names of the sample sites and plates that a model emits: written once, used by models, guides and queries."""

from collections.abc import Hashable

DATA = "data"
"""Plate over cells, dim -1; its size is the number of cells in the data set, its subsample the mini-batch."""

Z = "z"
"""Exogenous noise, batch (n,), event (d,)."""

C = "c"
"""Post-intervention causal variables, a deterministic site, batch (n,), event (d,)."""

X = "x"
"""Gene expression, batch (n,), event (G,)."""

Y = "y"
"""Counts of surface proteins, batch (n,), event (P,)."""


def node_site(node: Hashable) -> str:
    """Name of the site of one causal variable: node 3 is ``"c_3"``."""
    return f"{C}_{node}"

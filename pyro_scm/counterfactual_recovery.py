"""How well a fitted model answers counterfactual questions of a synthetic screen whose true SCM is known."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_scm import metrics
from pyro_scm.abduction import alone
from pyro_scm.counterfactuals import Worlds, counterfactual
from pyro_scm.data import synthetic
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.errors import InterventionError, listing
from pyro_scm.run import Fitted, members

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["counterfactual_error"]

_LEVELS = (0.1, 0.5, 0.9)


def counterfactual_error(
    run: Fitted,
    cells: EnvironmentDataset,
    adata: "AnnData",
    *,
    environments: Sequence[str] | None = None,
    nodes: Sequence[Any] | None = None,
    levels: Sequence[float] = _LEVELS,
) -> pd.DataFrame:
    """Errors of each cell's counterfactual expression against that of the SCM that made the cells.

    Both are expectations given c, so that observation noise is no part of it. Questions about environments mean the
    same to both models. Those about a node j need its partner: the learnt variable that correlates most with c_j, one
    to one over all nodes, and do(c_j := v) is asked of it as do(a v + b), with the least-squares line over the cells.

    Args:
        run: fitted to cells of the screen, or (model, guide).
        cells: of `synthetic.dataset`, or a part of them.
        adata: of `synthetic.simulate`.
        environments: to put the cells in; all but the reference by default.
        nodes: labels of true nodes to set; all by default.
        levels: quantiles of each true node's values over the cells that it is set to.

    Returns:
        One row a member and question: member, kind (``"environment"`` or ``"do"``), asked, matched (the learnt site,
        with its correlation), error (root mean square over cells and genes of the effect against the true effect), size
        (of the true effect: the error of saying that nothing happens), share (1 - error^2 / size^2; 0 is as bad as
        saying so), individual (the same of each cell's deviation from the average effect; NaN where the true one has
        none) and expression (error of the counterfactual itself, reconstruction included).

    Raises:
        DataError: cells or a screen that the truth is not known of, or no such environment.
        InterventionError: no such node.
    """
    truth = synthetic.known(adata, cells)
    labels = [str(n) for n in cells.environments.index]
    references = [n for n, ref in zip(labels, cells.reference, strict=True) if ref]
    places = [n for n in labels if n not in references] if environments is None else list(environments)
    own = [str(n) for n in truth[0].scm.nodes]
    wanted = own if nodes is None else [str(n) for n in nodes]
    if missing := [n for n in wanted if n not in own]:
        raise InterventionError(f"the true SCM has no node {listing(missing)}: it has {listing(own, 8)}")
    rows: list[dict[str, Any]] = []
    for k, learnt in enumerate(alone(run)):
        model, _ = next(members(learnt))
        for place in places:
            true, found = (counterfactual(one, cells, environment=place) for one in (truth, learnt))
            rows.append({"member": k, "kind": "environment", "asked": place, **_scores([(true, found)])})
        if not wanted:
            continue
        true_c, found_c = (counterfactual(one, cells).factual_c[0, 0].astype(np.float64) for one in (truth, learnt))
        match = metrics.mcc(true_c, found_c)
        for name in wanted:
            j = own.index(name)
            partner = int(match.permutation[j])
            if partner < 0:  # fewer latents than true ones
                continue
            slope, offset = np.polyfit(true_c[:, j], found_c[:, partner], 1)
            site, pairs = model.sites[partner], []
            for value in np.quantile(true_c[:, j], levels):
                true = counterfactual(truth, cells, do={truth[0].sites[j]: float(value)})
                found = counterfactual(learnt, cells, do={site: float(slope * value + offset)})
                pairs.append((true, found))
            of = {"member": k, "kind": "do", "asked": truth[0].sites[j], "matched": site}
            rows.append({**of, "correlation": match.correlations[j], **_scores(pairs)})
    columns = ["member", "kind", "asked", "matched", "correlation", "error", "size", "share", "individual"]
    return pd.DataFrame(rows, columns=[*columns, "expression"])


def _scores(pairs: Sequence[tuple[Worlds, Worlds]]) -> dict[str, float]:
    """Errors over questions, each answered by the truth and by the model."""
    true, found = (np.concatenate([w[i].effect[0, 0] for w in pairs]).astype(np.float64) for i in (0, 1))
    own, other = (np.concatenate([_centred(w[i].effect[0, 0]) for w in pairs]) for i in (0, 1))
    size, individual, error = (float(np.mean(v**2)) for v in (true, own, found - true))
    varies = individual > 1e-8 * size
    whole = np.mean([np.mean((found.x[0, 0] - true.x[0, 0]) ** 2) for true, found in pairs])
    return {
        "error": float(np.sqrt(error)),
        "size": float(np.sqrt(size)),
        "share": float(1 - error / size) if size > 0 else np.nan,
        "individual": float(1 - np.mean((other - own) ** 2) / individual) if varies else np.nan,
        "expression": float(np.sqrt(whole)),
    }


def _centred(effect: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each cell's deviation from the average effect on each gene."""
    values = effect.astype(np.float64)
    return np.asarray(values - values.mean(0))

"""Tables and figures of `protocol.compared`, over one split or several."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.tables.protocol import CEILING, CHAMPION, ENSEMBLE, Table
from pyro_scm.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CHOSEN", "figure", "joined", "judged", "published", "reported", "sentence"]

CHOSEN = ", as chosen"
_MAIN = "delta_pearson"


def joined(parts: Sequence[Table]) -> Comparison:
    """Comparisons of several splits, each condition held out in one, as one; what is not in all of them is left out.

    With a row for each model in the variant that was chosen for it in each split, of the mean of its members.
    """
    several = [replace(part.comparison, scores=_with_chosen(part)) for part in parts]
    scores = pd.concat([part.scores for part in several], ignore_index=True)
    names = [n for part in several for n in part.config["environments"]]
    full = scores.groupby("model")["environment"].nunique() == len(names)
    units = {name: own for part in several for name, own in part.config["units"].items()}
    config = {**several[0].config, "units": units, "environments": names}
    return Comparison(scores[scores["model"].map(full)].reset_index(drop=True), config=config)


def _with_chosen(part: Table) -> pd.DataFrame:
    scores = part.comparison.scores
    rows = [
        scores[scores["model"] == f"{own['variant']}{ENSEMBLE}"].assign(model=f"{own['model']}{CHOSEN}")
        for own in part.chosen.to_dict("records")
    ]
    return pd.concat([scores, *rows], ignore_index=True)


def judged(comparison: Comparison, names: Sequence[str]) -> pd.DataFrame:
    """The gate for a few rows that were chosen beforehand, which share its 5 % alone.

    Twelve models need nine conditions for a verdict and one needs six: where there are few, choose first.
    """
    scores = comparison.scores[comparison.scores["model"].isin(names) | (comparison.scores["kind"] == "baseline")]
    kind = scores["kind"].where(scores["kind"] == "baseline", "model")
    return Comparison(scores.assign(kind=kind), config=comparison.config).gate(_MAIN).set_index("model")


def reported(name: str, parts: Sequence[Table], groups: "pd.Series[Any] | None" = None) -> dict[str, pd.DataFrame]:
    """Tables of one question: the published form, verdicts, each condition's scores, and how each model was chosen.

    Args:
        name: of the question; tables are called after it.
        parts: one table a split.
        groups: see `published`; all conditions together by default.
    """
    both = joined(parts)
    main = both.scores[both.scores["metric"] == _MAIN]
    means = main.groupby(["model", "environment"], sort=False)["value"].mean().unstack("environment")
    names = [str(n) for n in main["model"].unique() if str(n).endswith(CHOSEN)]
    verdicts = [judged(both, [CHAMPION]).assign(corrected_for=1)] if CHAMPION in set(main["model"]) else []
    if names:
        verdicts.append(judged(both, names).assign(corrected_for=len(names)))
    if groups is None:
        groups = pd.Series("all", index=both.config["environments"])
    chosen = [part.chosen.assign(split=i, champion=part.champion) for i, part in enumerate(parts)]
    return {
        f"{name}_published": published(both, groups),
        f"{name}_gate": pd.concat(verdicts),
        f"{name}_conditions": means.loc[main["model"].unique()],
        f"{name}_chosen": pd.concat(chosen, ignore_index=True),
        f"{name}_scores": both.scores,
    }


def figure(parts: Sequence[Table]) -> "Figure":
    """Scores of baselines, ceiling, champion, and of each model as it is and as chosen."""
    both = joined(parts)
    models = [n for part in parts for n in part.chosen.get("model", ())]
    kept = (both.scores["kind"] != "model") | both.scores["model"].str.endswith(CHOSEN)
    shown = both.scores[kept | both.scores["model"].isin([CHAMPION, *models])]
    return Comparison(shown.reset_index(drop=True), config=both.config).figure()


def sentence(parts: Sequence[Table]) -> str:
    """The champion's verdict in words."""
    both = joined(parts)
    row = judged(both, [CHAMPION]).loc[CHAMPION]
    limit = both.scores[(both.scores["model"] == CEILING) & (both.scores["metric"] == _MAIN)]["value"]
    above = f"; {CEILING} {limit.mean():.3f}" if len(limit) else ""
    champions = ", ".join(dict.fromkeys(p.champion for p in parts))
    return (
        f"{len(both.config['environments'])} conditions; champion ({champions}): "
        f"{row['difference']:+.3f} [{row['lower']:+.3f}, {row['upper']:+.3f}] against {row['baseline']}, "
        f"{row['verdict']}{above}."
    )


def published(comparison: Comparison, groups: "pd.Series[Any]") -> pd.DataFrame:
    """The form of chemCPA's table 1.

    Args:
        comparison: with the metrics r2, r2_deg, delta_pearson and delta_r2.
        groups: condition -> dose, or whatever the rows are grouped by.

    Returns:
        One row a group and model; E[r2] and median r2, clipped at 0, means over seeds, and the standard deviation over
        seeds of the Pearson delta. A correlation that is not defined is left blank.
    """
    scores = comparison.scores
    wide = scores[scores["metric"].isin(["r2", "r2_deg", "delta_pearson", "delta_r2"])].pivot_table(
        index=["model", "kind", "seed", "environment"], columns="metric", values="value", dropna=False, observed=True
    ).dropna(how="all").reset_index()  # fmt: skip
    wide["group"] = wide["environment"].map(groups)
    order = {name: i for i, name in enumerate(scores["model"].unique())}
    rows = []
    for (group, model), own in wide.groupby(["group", "model"]):
        clipped = own.assign(all=own["r2"].clip(lower=0), deg=own["r2_deg"].clip(lower=0)).groupby("seed")
        means = own.groupby("seed")[["delta_pearson", "delta_r2"]].mean()
        rows.append(
            {
                "group": group,
                "model": model,
                "conditions": own["environment"].nunique(),
                "E[r2] all": clipped["all"].mean().mean(),
                "E[r2] DEGs": clipped["deg"].mean().mean(),
                "median r2 all": clipped["all"].median().mean(),
                "median r2 DEGs": clipped["deg"].median().mean(),
                "delta Pearson": means["delta_pearson"].mean(),
                "sd of seeds": means["delta_pearson"].std(),
                "delta r2": means["delta_r2"].mean(),
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values(["group", "model"], key=lambda c: c.map(order) if c.name == "model" else c).set_index(
        ["group", "model"]
    )

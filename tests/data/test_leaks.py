"""Every planted leak is found by its name, and no clean split raises an alarm."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from pyro_scm.data import splits
from pyro_scm.data.dataset import EnvironmentDataset
from pyro_scm.data.leaks import PROTOCOLS, in_words, leaks
from pyro_scm.data.single_cell import halves
from pyro_scm.data.splits import Split
from pyro_scm.errors import DataError

SMILES = {
    "aspirin": "CC(=O)Oc1ccccc1C(O)=O",
    "salicylate": "OC(=O)c1ccccc1O",  # the scaffold of aspirin: benzene
    "caffeine": "Cn1cnc2n(C)c(=O)n(C)c(=O)c12",
    "theophylline": "Cn1c(=O)c2[nH]cnc2n(C)c1=O",  # the scaffold of caffeine
    "haloperidol": "OC1(CCN(CCCC(=O)c2ccc(F)cc2)CC1)c1ccc(Cl)cc1",
    "decane": "CCCCCCCCCC",  # acyclic
}


def screen(rows: list[dict[str, Any]], cells: int = 4, representation: Any = "one-hot") -> EnvironmentDataset:
    """Some cells of each row of obs; the reference is the drug vehicle."""
    obs = pd.DataFrame([row for row in rows for _ in range(cells)])
    obs.index = pd.Index([f"c{i}" for i in range(len(obs))])
    x = np.random.default_rng(0).poisson(5, (len(obs), 3)).astype(np.float32) + 1
    named = {k: k for k in ("dose", "cell_line", "smiles") if k in obs}
    return EnvironmentDataset.from_anndata(
        anndata.AnnData(X=x, obs=obs), environment="drug", control="vehicle", representation=representation, **named
    )  # fmt: skip


def drugs() -> EnvironmentDataset:
    """Six drugs at two doses in two cell lines; each dose on a plate of its own."""
    rows: list[dict[str, Any]] = []
    for line in ("A375", "MCF7"):
        rows += [{"drug": "vehicle", "dose": 0.0, "cell_line": line, "smiles": None, "plate": p} for p in ("P1", "P2")]
        rows += [
            {"drug": d, "dose": dose, "cell_line": line, "smiles": s, "plate": plate}
            for d, s in SMILES.items()
            for dose, plate in ((1.0, "P1"), (10.0, "P2"))
        ]
    return screen(rows, representation=["one-hot", "dose", "cell_line"])


def pairs() -> EnvironmentDataset:
    """Four single perturbations and all pairs of them."""
    names = ["A", "B", "C", "D"]
    both = [f"{a}+{b}" for i, a in enumerate(names) for b in names[:i]]
    return screen([{"drug": d} for d in ["vehicle", *names, *both]])


def split_at(cells: EnvironmentDataset, held_out: Callable[[pd.DataFrame], "pd.Series[bool]"], **more: Any) -> Split:
    """The cells that a condition on their environment and obs holds out, against all others."""
    table = cells.environments.iloc[cells.env].reset_index(drop=True)
    table = table.assign(**{name: cells.obs[name].to_numpy() for name in cells.obs if name not in table})
    out = held_out(table).to_numpy() & ~cells.reference[cells.env]
    return Split(train=cells.subset(~out), validation=None, test=cells.subset(out), **more)


def planted() -> dict[str, tuple[Split, dict[str, Any]]]:
    """Kind of leak -> a split that has it, and what is said of the split."""
    cells, combined = drugs(), pairs()
    perturbation = split_at(cells, lambda t: t["perturbation"] == "aspirin")
    reference = perturbation.train.subset(perturbation.train.reference[perturbation.train.env])
    called = halves(perturbation.test, 0)[0]

    def half(name: str) -> Split:
        """Half of the cells of an environment held out."""
        out = (combined.obs["drug"] == name).to_numpy() & (np.arange(len(combined)) % 2 == 0)
        return Split(train=combined.subset(~out), validation=None, test=combined.subset(out))

    return {
        "perturbation": (half("A"), {"protocol": "perturbation"}),
        "dose": (
            split_at(cells, lambda t: (t["perturbation"] == "aspirin") & (t["dose"] == 10)),
            {"protocol": "perturbation"},
        ),
        "combination": (half("B+A"), {"protocol": "combination"}),
        "cell_line": (
            split_at(cells, lambda t: (t["cell_line"] == "MCF7") & (t["perturbation"] != "decane")),
            {"protocol": "cell_line"},
        ),
        "scaffold": (perturbation, {"protocol": "scaffold"}),
        "plate": (perturbation, {"protocol": "perturbation", "plate": "plate"}),
        "reference": (perturbation, {"protocol": "perturbation", "references": reference}),
        "degs": (perturbation, {"protocol": "perturbation", "degs_from": called}),
    }


def clean() -> dict[str, tuple[Split, dict[str, Any]]]:
    """The same claims of splits that keep them."""
    cells, combined = drugs(), pairs()
    aspirin = split_at(cells, lambda t: t["perturbation"] == "aspirin")
    references = cells.subset(cells.reference[cells.env])
    training, scoring = halves(references, 0)
    apart = replace(
        aspirin, train=aspirin.train.subset(~np.isin(aspirin.train.origin, np.asarray(scoring.origin)))
    )  # fmt: skip
    called, scored = halves(aspirin.test, 0)
    assert len(training)
    return {
        "perturbation": (aspirin, {"protocol": "perturbation"}),
        "dose": (split_at(cells, lambda t: t["dose"] == 10), {"protocol": "dose"}),
        "combination": (split_at(combined, lambda t: t["perturbation"] == "B+A"), {"protocol": "combination"}),
        "cell_line": (split_at(cells, lambda t: t["cell_line"] == "MCF7"), {"protocol": "cell_line"}),
        "scaffold": (
            split_at(cells, lambda t: t["perturbation"].isin(["aspirin", "salicylate", "decane"])),
            {"protocol": "scaffold"},
        ),
        "plate": (split_at(cells, lambda t: t["plate"] == "P2"), {"protocol": "dose", "plate": "plate"}),
        "reference": (apart, {"protocol": "perturbation", "references": scoring}),
        "degs": (aspirin, {"protocol": "perturbation", "degs_from": called, "scored": scored}),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(planted()))
def test_a_planted_leak_is_found_and_no_other(kind: str) -> None:
    split, claim = planted()[kind]
    found = leaks(split, **claim)
    assert set(found["kind"]) == {kind}
    assert (found["cells"] > 0).all()
    assert found["cure"].str.len().min() > 0


@pytest.mark.parametrize("kind", list(planted()))
def test_the_same_claim_of_a_clean_split_raises_no_alarm(kind: str) -> None:
    split, claim = clean()[kind]
    assert leaks(split, **claim).empty


def test_eight_kinds_are_planted() -> None:
    assert len(planted()) == len(clean()) == 8


# ---------------------------------------------------------------------- the project's own splits
@pytest.mark.parametrize("seed", range(4))
def test_splits_keep_what_they_say(seed: int) -> None:
    cells, combined = drugs(), pairs()
    made = {
        "perturbation": splits.by_environment(cells, fraction=0.4, validation_fraction=0.2, seed=seed),
        "scaffold": splits.by_group(cells, "scaffold", fraction=0.4, seed=seed),
        "dose": splits.by_dose(cells, fraction=0.5, seed=seed),
        "combination": splits.by_combination(cells, covariate="cell_line", fraction=0.3, seed=seed),
        "cell": splits.by_row(cells, seed=seed),
    } if seed else {"perturbation": splits.by_environment(combined, held_out=["B+A"])}  # fmt: skip
    for protocol, split in made.items():
        assert split.protocol == protocol
        assert leaks(split).empty, protocol


def test_environments_held_out_beside_their_other_doses_promise_less() -> None:
    cells = drugs()
    name = str(cells.environments.index[cells.environments["perturbation"] == "aspirin"][0])
    split = splits.by_environment(cells, held_out=[name])
    assert split.protocol == "environment"
    assert leaks(split).empty
    assert set(leaks(split, "perturbation")["kind"]) == {"perturbation", "dose"}
    every = [str(n) for n in cells.environments.index[cells.environments["perturbation"] == "aspirin"]]
    assert splits.by_environment(cells, held_out=every).protocol == "perturbation"


# ---------------------------------------------------------------------- what a row says
def test_a_leak_is_told_with_its_cells_and_cure() -> None:
    split, claim = planted()["dose"]
    found = leaks(split, **claim)
    assert found["name"].tolist() == ["aspirin 10 uM A375", "aspirin 10 uM MCF7"]
    assert found["cells"].tolist() == [4, 4]
    assert found["detail"][0] == "'aspirin' has training cells at 1.0 uM"
    assert in_words(found) == [
        "leak (dose): 'aspirin 10 uM A375' and 1 more: 'aspirin' has training cells at 1.0 uM; "
        "hold out all its doses, or say less: protocol='dose'"
    ]
    assert in_words(leaks(*clean_of("dose"))) == []


def clean_of(kind: str) -> tuple[Split, str]:
    split, claim = clean()[kind]
    return split, str(claim["protocol"])


def test_validation_cells_are_searched_too() -> None:
    split = split_at(drugs(), lambda t: t["perturbation"] == "aspirin")
    both = replace(split, validation=split.test)
    found = leaks(both, "perturbation")
    assert set(found["kind"]) == {"cell", "perturbation", "dose"}
    assert found["detail"].str.contains("validation").all()


def test_a_compound_under_another_name_is_found() -> None:
    rows: list[dict[str, Any]] = [{"drug": "vehicle", "smiles": None}, {"drug": "aspirin", "smiles": SMILES["aspirin"]}]
    cells = screen([*rows, {"drug": "acetylsalicylate sodium", "smiles": "CC(=O)Oc1ccccc1C([O-])=O.[Na+]"}])
    found = leaks(split_at(cells, lambda t: t["perturbation"] == "aspirin"), "perturbation")
    assert found["kind"].tolist() == ["compound"]
    assert "'acetylsalicylate sodium' in training" in found["detail"][0]
    assert leaks(split_at(cells, lambda t: t["perturbation"] == "aspirin"), "environment").empty


def test_a_pair_of_perturbation_and_category_is_a_combination() -> None:
    cells = drugs()
    split = splits.by_combination(cells, covariate="cell_line", held_out=[("aspirin", "MCF7")])
    assert leaks(split).empty  # aspirin in A375, and other drugs in MCF7, may be in training
    half = np.arange(len(split.test)) % 2 == 0
    index = np.concatenate([np.asarray(split.train.origin), np.asarray(split.test.origin)[~half]])
    leaky = replace(split, train=cells.subset(np.sort(index)), test=split.test.subset(half))
    found = leaks(leaky)
    assert set(found["kind"]) == {"combination"}
    assert "'aspirin' in 'MCF7' has training cells" in found["detail"].iloc[0]


def test_the_parts_of_a_combination_have_no_order_and_a_control_is_no_part() -> None:
    cells = screen([{"drug": d} for d in ("vehicle", "A", "B", "A+B", "B+A", "A+vehicle")])
    assert leaks(split_at(cells, lambda t: t["perturbation"] == "A+B"))["kind"].tolist() == []
    found = leaks(split_at(cells, lambda t: t["perturbation"] == "A+B"), "combination")
    assert found["detail"].tolist() == ["the combination has 4 training cells ('B+A')"]
    alone = leaks(split_at(cells, lambda t: t["perturbation"] == "A"), "perturbation")
    assert alone["detail"].tolist() == ["the perturbation, at the same dose, has 4 training cells ('A+vehicle')"]


def test_references_of_a_held_out_line_may_be_in_training() -> None:
    split, claim = clean()["cell_line"]
    lines = split.train.environments["cell_line"].iloc[split.train.present]
    assert "MCF7" in set(lines)
    assert leaks(split, **claim).empty


def test_what_is_not_known_is_not_called_clean() -> None:
    split = split_at(pairs(), lambda t: t["perturbation"] == "A")
    with pytest.raises(DataError, match="unknown protocol 'drug': use one of 'cell', 'environment', 'perturbation'"):
        leaks(split, "drug")
    with pytest.raises(DataError, match=r"protocol 'cell_line': the test environments have no cell line"):
        leaks(split, "cell_line")
    with pytest.raises(DataError, match=r"protocol 'scaffold': no test environment has a SMILES"):
        leaks(split, "scaffold")
    with pytest.raises(DataError, match="no covariate, obs column or cell line 'plate'"):
        leaks(split, plate="plate")
    assert set(PROTOCOLS) == {"cell", "environment", "perturbation", "scaffold", "combination", "cell_line", "dose"}

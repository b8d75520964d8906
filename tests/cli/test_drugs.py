"""Data with structures, doses, cell lines and batches; files and environments that a run has not seen."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest

import pyro_scm as ps
from pyro_scm import recipes
from pyro_scm.cli.inputs import Memory
from pyro_scm.cli.runs import _keys, cells_for, place
from pyro_scm.data.chemistry import morgan
from pyro_scm.errors import DataError
from tests.cli.conftest import DRUGS, SMALL

Works = Callable[..., str]
Fails = Callable[..., str]
NAPROXEN = "COc1ccc2cc(ccc2c1)C(C)C(=O)O"


def described(smiles: str, dose: float, line: str) -> np.ndarray:
    """The representation of `drug_run`, from its parts."""
    lines = [float(line == "A549"), float(line == "MCF7")]
    return np.concatenate([morgan([smiles], radius=1, bits=64)[0], [np.log10(1 + dose)], lines])


def predicted(works: Works, run: Path, out: Path, *words: str) -> np.ndarray:
    works("predict", run, *words, "--cells", "5", "--mean", "--out", out / "p.h5ad")
    return np.asarray(anndata.read_h5ad(out / "p.h5ad").X)


def asked(run: Path, file: Path, *changes: tuple[str, object]) -> tuple[ps.Run, ps.EnvironmentDataset]:
    """What a verb gets for a file."""
    fitted = ps.load(run)
    _, cells = cells_for(fitted, Memory.load(run), Namespace(data=file, data_option=list(changes)))
    return fitted, cells


# ---------------------------------------------------------------------- predictions of what nobody measured
@pytest.fixture(scope="module")
def pairs_run(works_once: Works, drug_screen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted to pairs of drugs with a dose for each part."""
    folder = tmp_path_factory.mktemp("pairs")
    adata = anndata.read_h5ad(drug_screen)
    drug, dose = adata.obs["drug"].astype(str), adata.obs["uM"]
    pair = (drug == "aspirin") & (adata.obs["line"] == "A549")
    adata.obs["drug"] = drug.where(~pair, "aspirin+caffeine")
    adata.obs["uM"] = dose.map(str).where(~pair, dose.map(lambda d: f"{d}+2"))
    adata.write_h5ad(folder / "pairs.h5ad")
    words = ("--environment", "drug", "--control", "DMSO", "--dose", "uM", "--representation", "multi-hot", *SMALL)
    works_once("fit", folder / "pairs.h5ad", "--model", "environment_vae", *words, "--out", folder / "run")
    return folder / "run"


def test_a_new_combination_of_known_parts(works: Works, fails: Fails, pairs_run: Path, tmp_path: Path) -> None:
    fitted = ps.load(pairs_run)
    column = {name.removeprefix("perturbation="): j for j, name in enumerate(fitted.schema.features)}
    r = np.zeros(len(column))
    r[column["ibuprofen"]], r[column["caffeine"]] = np.log10(1 + 4.0), np.log10(1 + 0.5)
    words = ("--environment", "ibuprofen+caffeine", "--dose")
    found = predicted(works, pairs_run, tmp_path, *words, "4+0.5")
    assert np.array_equal(found, ps.predict(fitted, r, cells=5, mean=True).reshape(found.shape))
    r[column["caffeine"]] = np.log10(1 + 4.0)  # one dose is that of all parts
    found = predicted(works, pairs_run, tmp_path, *words, "4")
    assert np.array_equal(found, ps.predict(fitted, r, cells=5, mean=True).reshape(found.shape))
    r[column["caffeine"]] = 0
    found = predicted(works, pairs_run, tmp_path, "--environment", "ibuprofen 1 uM", "--dose", "4")
    assert np.array_equal(found, ps.predict(fitted, r, cells=5, mean=True).reshape(found.shape))
    wrong = ("predict", pairs_run, *words, "1+2+3", "--out", tmp_path / "q.h5ad")
    assert "'ibuprofen+caffeine' has 2 perturbations and 3 doses: give one dose for each" in fails(*wrong)


def test_a_new_drug_is_predicted_from_its_structure(works: Works, drug_run: Path, tmp_path: Path) -> None:
    words = ("--environment", "naproxen", "--smiles", NAPROXEN, "--dose", "3", "--cell-line", "MCF7")
    found = predicted(works, drug_run, tmp_path, *words)
    expected = ps.predict(ps.load(drug_run), described(NAPROXEN, 3.0, "MCF7"), cells=5, mean=True)
    assert np.array_equal(found, expected.reshape(found.shape))
    assert set(anndata.read_h5ad(tmp_path / "p.h5ad").obs["environment"]) == {"naproxen"}


def test_a_known_drug_by_structure_is_the_drug_by_name(works: Works, drug_run: Path, tmp_path: Path) -> None:
    by_name = predicted(works, drug_run, tmp_path, "--environment", "caffeine 10 uM A549")
    words = ("--environment", "new", "--smiles", DRUGS["caffeine"], "--dose", "10", "--cell-line", "A549")
    assert np.array_equal(by_name, predicted(works, drug_run, tmp_path, *words))
    other = predicted(works, drug_run, tmp_path, *words[:3], DRUGS["aspirin"], *words[4:])
    assert not np.array_equal(by_name, other)


def test_a_known_drug_at_a_new_dose(works: Works, drug_run: Path, tmp_path: Path) -> None:
    found = predicted(works, drug_run, tmp_path, "--environment", "ibuprofen", "--dose", "3", "--cell-line", "A549")
    expected = ps.predict(ps.load(drug_run), described(DRUGS["ibuprofen"], 3.0, "A549"), cells=5, mean=True)
    assert np.array_equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["aspirin"],
            "the run knows it with several values of dose, 1.0, 10.0: choose one with --dose",
        ),
        (["aspirin", "--dose", "1"], "several values of cell_line, 'A549', 'MCF7': choose one with --cell-line"),
        (["new", "--smiles", NAPROXEN], "--environment new: the run has to know its dose: add --dose"),
        (["new", "--smiles", NAPROXEN, "--dose", "1"], "the run has to know its cell_line: add --cell-line"),
        (["new", "--smiles", "C1CC", "--dose", "1", "--cell-line", "A549"], "'C1CC'"),
        (["new", "--smiles", NAPROXEN, "--dose", "1", "--cell-line", "HeLa"], "does not cover it ('cell_line=HeLa')"),
        (["new", "--dose", "1", "--cell-line", "A549"], "the run has to know its smiles: add --smiles"),
        (["aspirin", "--dose", "-1"], "--dose -1: give a dose in uM"),
        (["aspirin", "--dose", "much"], "--dose much: give a dose in uM, or one for each part such as 1+0.5"),
        (["aspirin", "--dose", "1+2", "--cell-line", "A549"], "one dose for each part"),
        (["aspirin", "--time", "6"], "--time 6.0: the run represents environments by morgan:smiles, dose, cell_line"),
        (["DMSO", "--dose", "1"], "this is a reference"),
    ],
)
def test_what_cannot_be_predicted(fails: Fails, drug_run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in fails("predict", drug_run, "--environment", *words, "--out", tmp_path / "p.h5ad")
    assert not (tmp_path / "p.h5ad").exists()


def test_structures_need_a_run_that_reads_them(fails: Fails, run: Path, tmp_path: Path) -> None:
    words = ("predict", run, "--environment", "new", "--smiles", NAPROXEN, "--out", tmp_path / "p.h5ad")
    assert "represents environments by uns:descriptors, a table in the data file" in fails(*words)


def test_one_hot_runs_know_names_only(works: Works, fails: Fails, drug_screen: Path, tmp_path: Path) -> None:
    fit = ("--model", "vae", "--environment", "drug", "--control", "DMSO", *SMALL)
    works("fit", drug_screen, *fit, "--out", tmp_path / "run")
    words = ("predict", tmp_path / "run", "--out", tmp_path / "p.h5ad", "--environment")
    message = fails(*words, "new", "--smiles", NAPROXEN)
    assert "--smiles" in message
    assert "by one-hot, which does not look at it: fit with a --representation that contains morgan" in message
    assert "no environment 'asprin' in this run: did you mean one of 'aspirin'" in fails(*words, "asprin")
    other = anndata.read_h5ad(drug_screen)
    other.obs["drug"] = other.obs["drug"].astype(str).replace("aspirin", "naproxen")
    other.write_h5ad(tmp_path / "other.h5ad")
    message = fails("embed", tmp_path / "run", tmp_path / "other.h5ad", "--out", tmp_path / "e.h5ad")
    assert message.startswith(f"{tmp_path / 'other.h5ad'}: the run was fitted without 'naproxen', and its")
    assert "does not cover it ('perturbation=naproxen')" in message


# ---------------------------------------------------------------------- other files than the one fitted to
def test_part_of_a_file_gets_the_same_latents(works: Works, drug_run: Path, drug_screen: Path, tmp_path: Path) -> None:
    """One cell line, one batch, no controls, genes in another order among others: labels and codes would differ."""
    whole = anndata.read_h5ad(drug_screen)
    empty = anndata.AnnData(np.zeros((len(whole), 1), np.float32), obs=whole.obs, var=pd.DataFrame(index=["other"]))
    rows = (whole.obs["line"] == "MCF7") & (whole.obs["drug"] != "DMSO") & (whole.obs["batch"] == "two")
    part = anndata.concat([empty, whole[:, ::-1]], axis=1, merge="same")[rows.to_numpy()].copy()
    part.write_h5ad(tmp_path / "part.h5ad")
    works("embed", drug_run, drug_screen, "--out", tmp_path / "whole_e.h5ad")
    works("embed", drug_run, tmp_path / "part.h5ad", "--out", tmp_path / "part_e.h5ad")
    every, some = anndata.read_h5ad(tmp_path / "whole_e.h5ad"), anndata.read_h5ad(tmp_path / "part_e.h5ad")
    assert 0 < len(some) < len(every)
    assert np.allclose(every[some.obs_names].obsm["c"], some.obsm["c"], atol=1e-6)
    _, cells = asked(drug_run, tmp_path / "part.h5ad")
    assert set(cells.environments.index[cells.present]) == {f"{d} {u} uM MCF7" for d in DRUGS for u in (1, 10)}
    assert cells.genes == tuple(f"g{i}" for i in range(10))
    assert set(cells.covariates["batch"].tolist()) == {1}
    assert cells.categories["batch"] == ("one", "two")


def test_a_new_drug_in_another_file_is_placed_by_its_structure(
    works: Works, drug_run: Path, drug_screen: Path, tmp_path: Path
) -> None:
    other = anndata.read_h5ad(drug_screen)
    other.obs["smiles"] = other.obs["smiles"].astype(str).replace(DRUGS["aspirin"], NAPROXEN)
    other.obs["drug"] = other.obs["drug"].astype(str).replace("aspirin", "naproxen")
    file = tmp_path / "other.h5ad"
    other.write_h5ad(file)
    fitted, cells = asked(drug_run, file)
    e = fitted.environments.index("naproxen 10 uM A549")
    assert np.allclose(cells.representation[e], described(NAPROXEN, 10.0, "A549"))
    assert not fitted.environments.table["trained"].iloc[e]
    assert (cells.obs["drug"].astype(str)[cells.env == e] == "naproxen").all()
    text = works("evaluate", drug_run, file, "--hold-out", "naproxen", "--degs", "0", "--out", tmp_path / "s.csv")
    assert "note: the run was fitted" not in text
    names = {f"naproxen {dose} uM {line}" for dose in (1, 10) for line in ("A549", "MCF7")}
    assert set(pd.read_csv(tmp_path / "s.csv")["environment"]) == names
    words = ("--environment", "naproxen 1 uM A549", "--of", "caffeine 1 uM A549")
    works("counterfactual", drug_run, file, *words, "--out", tmp_path / "cf.h5ad")
    asked_of = cells.of("caffeine 1 uM A549")
    expected = ps.counterfactual(fitted, asked_of, environment="naproxen 1 uM A549")
    found = anndata.read_h5ad(tmp_path / "cf.h5ad")
    assert np.allclose(found.layers["counterfactual"], expected.x.mean((0, 1)), rtol=1e-4)


def test_environments_are_the_same_however_their_numbers_were_stored() -> None:
    rows = {"perturbation": ["A", "A+B"], "dose": [1e6, "1+2"], "time": [np.nan, 24.0], "cell_line": [None, "MCF7"]}
    table = pd.DataFrame(rows)
    stored = table.assign(dose=[1_000_000, "1+2"], time=[None, 24], cell_line=[np.nan, "MCF7"])
    assert _keys(table) == _keys(stored) == [("A", "1e+06", "", ""), ("A+B", "1+2", "24", "MCF7")]


def test_one_name_for_two_environments_is_refused(
    works: Works, fails: Fails, drug_screen: Path, tmp_path: Path
) -> None:
    """With one cell line in each file neither label says which."""
    whole = anndata.read_h5ad(drug_screen)
    for line in ("A549", "MCF7"):
        whole[(whole.obs["line"] == line).to_numpy()].copy().write_h5ad(tmp_path / f"{line}.h5ad")
    words = ("--environment", "drug", "--control", "DMSO", "--cell-line", "line", "--dose", "uM", *SMALL)
    works("fit", tmp_path / "A549.h5ad", "--model", "vae", *words, "--out", tmp_path / "run")
    message = fails("embed", tmp_path / "run", tmp_path / "MCF7.h5ad", "--out", tmp_path / "e.h5ad")
    assert "'aspirin 1 uM'" in message
    assert "is another environment in the run (another dose, time or cell line): rename it" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:, 2:].copy(), "lacks 2 of the run's 10 genes: 'g0', 'g1'"),
        (lambda a: _with(a, X=np.asarray(a.X) + 0.5), "is not a whole number"),
        (lambda a: _with_obs(a, batch="three"), "covariate 'batch' has 'three', the run knows 'one', 'two'"),
        (lambda a: _with_obs(a, line="HeLa"), "does not cover them ('cell_line=HeLa')"),
        (lambda a: _with(a, obs=a.obs.drop(columns="uM")), "no obs column 'uM'"),
    ],
)
def test_files_that_do_not_fit_the_run(
    fails: Fails, drug_run: Path, drug_screen: Path, tmp_path: Path, change, message: str
) -> None:
    file = tmp_path / "other.h5ad"
    change(anndata.read_h5ad(drug_screen)).write_h5ad(file)
    found = fails("embed", drug_run, file, "--out", tmp_path / "e.h5ad")
    assert message in found
    assert found.startswith(f"{file}: ")
    assert found.count(str(file)) == 1


def _with(adata: anndata.AnnData, **parts: object) -> anndata.AnnData:
    for name, value in parts.items():
        setattr(adata, name, value)
    return adata


def _with_obs(adata: anndata.AnnData, **columns: object) -> anndata.AnnData:
    adata.obs = adata.obs.assign(**columns)
    return adata


def test_continuous_files_do_not_fit_runs_of_counts(
    fails: Fails, drug_run: Path, drug_screen: Path, tmp_path: Path
) -> None:
    words = ("embed", drug_run, drug_screen, "--data-option", "counts=false", "--out", tmp_path / "e.h5ad")
    assert "holds continuous values, the run was fitted to counts" in fails(*words)


def test_options_of_reading_can_be_changed(
    works: Works, fails: Fails, drug_run: Path, drug_screen: Path, tmp_path: Path
) -> None:
    renamed = anndata.read_h5ad(drug_screen)
    renamed.obs = renamed.obs.rename(columns={"drug": "compound", "batch": "plate"})
    renamed.write_h5ad(tmp_path / "renamed.h5ad")
    embed = ("embed", drug_run, tmp_path / "renamed.h5ad", "--out", tmp_path / "e.h5ad")
    assert "no obs column 'drug'" in fails(*embed)
    change = ("--data-option", "environment=compound")
    assert "no obs column 'batch' for a covariate" in fails(*embed, *change)
    none = ("--data-option", "covariates=line")
    assert "lacks the covariate 'batch' that the run was fitted with" in fails(*embed, *change, *none)
    assert "--data-option colour: there is no such option: use one of environment, control" in fails(
        *embed, "--data-option", "colour=red"
    )
    renamed.obs["batch"] = renamed.obs["plate"]
    renamed.write_h5ad(tmp_path / "renamed.h5ad")
    works(*embed, *change)
    works("embed", drug_run, drug_screen, "--out", tmp_path / "f.h5ad")
    a, b = (anndata.read_h5ad(tmp_path / name) for name in ("e.h5ad", "f.h5ad"))
    assert np.array_equal(a.obsm["c"], b.obsm["c"])


# ---------------------------------------------------------------------- representations by tables
def test_a_table_in_a_file_describes_environments_beyond_the_data(
    works: Works, fails: Fails, drug_screen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.DataFrame({"size": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "charge": [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]})
    table.index = pd.Index([*DRUGS, "naproxen"], name="drug")
    table.to_csv(tmp_path / "table.csv")
    monkeypatch.chdir(tmp_path)
    words = ("--environment", "drug", "--control", "DMSO", "--representation", "table:table.csv", *SMALL)
    works("fit", drug_screen, "--model", "environment_vae", *words, "--out", tmp_path / "run")
    fitted = ps.load(tmp_path / "run")
    assert fitted.schema.features == ("size", "charge")
    e = fitted.environments.index("caffeine")
    assert fitted.environments.representation[e].tolist() == [2.0, 1.0]
    monkeypatch.chdir("/")  # the path is remembered from the root
    found = predicted(works, tmp_path / "run", tmp_path, "--environment", "naproxen")
    assert np.array_equal(found, ps.predict(fitted, np.array([6.0, 1.0]), cells=5, mean=True).reshape(found.shape))
    message = fails("predict", tmp_path / "run", "--environment", "nothing", "--out", tmp_path / "p.h5ad")
    assert "the representation has no row for 'nothing'" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("drug,size\naspirin,big\n", "column 'size', row 'aspirin' holds 'big': features are numbers"),
        ("drug\naspirin\n", "no features: the first column is the environment"),
        ("", "not a readable table"),
        ("drug,size\naspirin,1\n", "the representation has no row for 'caffeine'"),
    ],
)
def test_tables_that_cannot_be_used(
    fails: Fails, drug_screen: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    file = tmp_path / "table.csv"
    if text is not None:
        file.write_text(text)
    words = ("--environment", "drug", "--control", "DMSO", "--representation", f"table:{file}", *SMALL)
    found = fails("fit", drug_screen, "--model", "vae", *words, "--out", tmp_path / "run")
    assert found.startswith(f"{drug_screen}: --representation: ")
    assert message in found
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_places_of_combinations_are_found_by_name() -> None:
    run = SimpleNamespace(schema=SimpleNamespace(features=("perturbation=A", "perturbation=B", "dose unknown")))
    values = np.array([[1.0, 0.5]], np.float32)
    assert place(run, ["B+A"], values, ["perturbation=B", "perturbation=A"]).tolist() == [[0.5, 1.0, 0.0]]
    with pytest.raises(DataError, match=r"without 'C\+A'.* does not cover it \('perturbation=C'\)"):
        place(run, ["C+A"], values, ["perturbation=C", "perturbation=A"])
    unused = np.array([[0.0, 1.0]], np.float32)
    assert place(run, ["A"], unused, ["perturbation=C", "perturbation=A"]).tolist() == [[1.0, 0.0, 0.0]]


def test_features_that_a_file_lacks_are_not_taken_for_zero() -> None:
    run = SimpleNamespace(schema=SimpleNamespace(features=("size", "charge")))
    with pytest.raises(DataError, match=r"does not cover them \('charge'\)"):
        place(run, ["A", "B"], np.ones((2, 1), np.float32), ["size"])


# ---------------------------------------------------------------------- data and models made in Python
def test_files_that_carry_their_own_table(works: Works, fails: Fails, drug_screen: Path, tmp_path: Path) -> None:
    cells = ps.EnvironmentDataset.read(
        drug_screen, environment="drug", control="DMSO", smiles="smiles", representation="morgan", bits=16
    )
    cells.of("DMSO", "aspirin", "caffeine").to_anndata().write_h5ad(tmp_path / "some.h5ad")
    cells.to_anndata().write_h5ad(tmp_path / "all.h5ad")
    works("fit", tmp_path / "some.h5ad", "--model", "environment_vae", *SMALL, "--out", tmp_path / "run")
    fitted, found = asked(tmp_path / "run", tmp_path / "all.h5ad")
    assert np.array_equal(found.representation[found.env], cells.representation[cells.env])
    works("embed", tmp_path / "run", tmp_path / "all.h5ad", "--out", tmp_path / "e.h5ad")
    expected = ps.embed(fitted, cells)["c"][fitted.best]
    assert np.allclose(anndata.read_h5ad(tmp_path / "e.h5ad").obsm["c"], expected, atol=1e-6)
    other = anndata.read_h5ad(drug_screen)
    other.obs["smiles"] = other.obs["smiles"].astype(str).replace(DRUGS["aspirin"], NAPROXEN)
    other.obs["drug"] = other.obs["drug"].astype(str).replace("aspirin", "naproxen")
    new = ps.EnvironmentDataset.from_anndata(
        other, environment="drug", control="DMSO", smiles="smiles", representation="morgan", bits=16
    )
    new.to_anndata().write_h5ad(tmp_path / "new.h5ad")
    fitted, found = asked(tmp_path / "run", tmp_path / "new.h5ad")
    assert np.array_equal(found.representation[found.env], new.representation[new.env])
    assert "naproxen" in fitted.environments.table.index
    other_kind = ("--representation", "morgan", "--bits", "8")
    works("fit", tmp_path / "some.h5ad", "--model", "vae", *other_kind, *SMALL, "--out", tmp_path / "anew")
    fitted, found = asked(tmp_path / "anew", tmp_path / "new.h5ad")
    e = fitted.environments.index("naproxen")
    assert np.array_equal(found.representation[e], morgan([NAPROXEN], bits=8)[0])
    words = ("fit", tmp_path / "some.h5ad", "--model", "vae", "--control", "DMSO", "--out", tmp_path / "other")
    assert "--control without --environment: this file carries its own table" in fails(*words)
    words = ("predict", tmp_path / "run", "--environment", "new", "--smiles", NAPROXEN, "--out", tmp_path / "p.h5ad")
    assert "represents environments in a way that it does not remember" in fails(*words)


def test_runs_made_in_python_are_read_with_options(works: Works, screen: Path, tmp_path: Path) -> None:
    cells = ps.EnvironmentDataset.read(screen, environment="perturbation", control="control")
    model, guide = recipes.make("vae", cells.schema, latent=2)
    fitted = ps.fit(model, guide, cells, epochs=1, progress=False)
    fitted.save(tmp_path / "run")
    words = ("--data-option", "environment=perturbation", "--data-option", "control=control")
    works("embed", tmp_path / "run", screen, *words, "--out", tmp_path / "e.h5ad")
    found = anndata.read_h5ad(tmp_path / "e.h5ad").obsm["c"]
    assert np.allclose(found, ps.embed(fitted, cells)["c"][0], atol=1e-6)


MODEL = '''
from pyro_scm.likelihoods import likelihood_for
from pyro_scm.model import LatentModel
from pyro_scm.nn import mlp, reset_parameters
from pyro_scm.priors import StandardPrior


def build(schema, *, latent=2, width=4):
    """z ~ N(0, I)."""
    net = mlp(latent, (width,), len(schema.genes))
    return reset(LatentModel(StandardPrior(latent), likelihood_for(schema, net)))


def reset(model):
    reset_parameters(model)
    return model


def broken(schema, *, latent=2):
    raise RuntimeError("not today")
'''


def test_models_of_the_users_own(works: Works, fails: Fails, screen: Path, tmp_path: Path) -> None:
    source = tmp_path / "my_model.py"
    source.write_text(MODEL)
    own = f"{source}:build"
    words = ("--environment", "perturbation", "--control", "control", *SMALL, "--option", "width=5")
    works("fit", screen, "--model", own, *words, "--out", tmp_path / "run")
    embed = ("embed", tmp_path / "run", screen, "--out", tmp_path / "e.h5ad")
    message = fails(*embed)
    assert f"{tmp_path / 'run'}: its model is not one of the named ones" in message
    assert message.endswith(f"add --model {own}")
    works(*embed, "--model", own)
    cells = ps.EnvironmentDataset.read(screen, environment="perturbation", control="control")
    model, guide = recipes.make(own, cells.schema, latent=3, width=5)
    fitted = ps.load(tmp_path / "run", model, guide)
    found = anndata.read_h5ad(tmp_path / "e.h5ad").obsm["c"]
    assert np.allclose(found, ps.embed(fitted, cells)["c"][fitted.best], atol=1e-6)
    assert "z ~ N(0, I)." in works("models", own)
    compare = ("compare", screen, "--models", f"{own},no_change", *words, "--degs", "0", "--hold-out", "env_1")
    assert "build" in works(*compare, "--out", tmp_path / "compared")
    assert Memory.load(tmp_path / "compared" / "build").model == own


def test_models_of_the_users_own_that_fail(fails: Fails, screen: Path, tmp_path: Path) -> None:
    source = tmp_path / "my_model.py"
    source.write_text(MODEL)
    words = ("fit", screen, "--environment", "perturbation", "--out", tmp_path / "run", "--model")
    assert fails(*words, f"{source}:broken") == f"--model {source}:broken: RuntimeError: not today"
    assert "has no function 'builds'" in fails(*words, f"{source}:builds")
    assert "no such file" in fails(*words, tmp_path / "none.py")
    source.write_text("def build(:\n")
    assert "SyntaxError" in fails(*words, f"{source}:build")


def test_fit_notes_salts_and_synonyms(works: Works, tmp_path: Path) -> None:
    drugs = {"DMSO": None, "acetate": "CC(=O)[O-].[Na+]", "acid": "CC(=O)O", "one": "CCO", "two": "OCC"}
    names = [name for name in drugs for _ in range(6)]
    obs = pd.DataFrame({"drug": names, "smiles": [drugs[n] or "" for n in names]}, index=[f"c{i}" for i in range(30)])
    adata = anndata.AnnData(X=np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32), obs=obs)
    adata.write_h5ad(tmp_path / "salts.h5ad")
    words = ("--environment", "drug", "--control", "DMSO", "--representation", "morgan:smiles", *SMALL)
    said = works("fit", tmp_path / "salts.h5ad", "--model", "vae", *words, "--out", tmp_path / "run")
    assert "note: acetate, acid are salts of one compound" in said
    assert "note: one, two are one compound" in said

"""Metadata tables, doses and times, vehicle centring, stacked plates."""

import gzip
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from pyro_scm.data import gct, l1000
from pyro_scm.errors import DataError
from tests.data.gct_files import A375, write_gctx


def test_landmarks_need_a_column() -> None:
    space = pd.DataFrame({"feature_space": ["landmark", "inferred", "best inferred"]})
    np.testing.assert_array_equal(l1000.landmarks(space), [True, False, False])
    with pytest.raises(DataError, match=r"no column of 'pr_is_lmark', .* there are 'pr_gene_symbol'; join"):
        l1000.landmarks(pd.DataFrame({"pr_gene_symbol": ["A"]}))


SIGNATURES = (
    "sig_id\tpert_id\tpert_iname\tpert_type\tcell_id\tpert_idose\tpert_itime\tdistil_id\n"
    "S3\tBRD-3\tdrug C\ttrt_cp\tA375\t-666\t24 h\tx:A05\n"
    "S1\tBRD-1\t10-DEBC 5'\"\ttrt_cp\tA375\t10 µM\t24 h\tx:A01|x:A02\n"
    "S2\tDMSO\tDMSO\tctl_vehicle\tPC3\t-666\t6 h\tx:A03|x:A04\n"
)


@pytest.fixture
def bare() -> AnnData:
    """Names only, as the GEO matrices have them."""
    return AnnData(
        X=np.arange(6, dtype=np.float32).reshape(2, 3),
        obs=pd.DataFrame(index=["S1", "S2"]),
        var=pd.DataFrame(index=["5720", "466", "6009"]),
    )


@pytest.fixture
def signatures(tmp_path: Path) -> Path:
    path = tmp_path / "GSE_sig_info.txt.gz"
    path.write_bytes(gzip.compress(SIGNATURES.encode()))
    return path


def test_the_four_tables_are_joined_by_id(bare: AnnData, signatures: Path, tmp_path: Path) -> None:
    perturbations = tmp_path / "pert_info.txt"
    perturbations.write_text(
        "pert_id\tpert_iname\tcanonical_smiles\nDMSO\tDMSO\tCS(C)=O\nBRD-1\tdebc\trestricted\nBRD-9\tx\tC\n"
    )
    cells = pd.DataFrame({"cell_id": ["PC3", "A375"], "primary_site": ["prostate", "skin"], "age": ["62", "-666"]})
    genes = pd.DataFrame({"pr_gene_id": [466, 5720, 6009, 1], "pr_gene_symbol": ["ATF1", "PSME1", "RHEB", "A1BG"]})
    genes["pr_is_lm"] = [1, 1, 0, 0]
    adata = l1000.join_metadata(bare, signatures=signatures, perturbations=perturbations, cells=cells, genes=genes)
    assert list(adata.obs["pert_iname"]) == ["10-DEBC 5'\"", "DMSO"]  # the signature's own name stays
    assert list(adata.obs["canonical_smiles"]) == [None, "CS(C)=O"]
    assert list(adata.obs["primary_site"]) == ["skin", "prostate"]
    np.testing.assert_array_equal(adata.obs["age"], [np.nan, 62])
    assert list(adata.var["pr_gene_symbol"]) == ["PSME1", "ATF1", "RHEB"]
    np.testing.assert_array_equal(l1000.landmarks(adata.var), [True, True, False])
    np.testing.assert_array_equal(adata.X, bare.X)
    assert bare.obs.shape == (2, 0)  # the argument is left alone
    done = l1000.standardise(adata)
    np.testing.assert_array_equal(done.obs["dose"], [10, 0])
    np.testing.assert_array_equal(done.obs["time"], [24, 6])


def test_the_table_may_be_keyed_by_well_or_by_its_index(bare: AnnData) -> None:
    wells = pd.DataFrame({"inst_id": ["S2", "S1"], "rna_plate": ["P", "Q"]})
    assert list(l1000.join_metadata(bare, signatures=wells).obs["rna_plate"]) == ["Q", "P"]
    indexed = wells.set_index("inst_id")
    assert list(l1000.join_metadata(bare, signatures=indexed).obs["rna_plate"]) == ["Q", "P"]
    # both columns are there: the one that the samples are called by is taken
    both = wells.rename(columns={"inst_id": "distil_id"}).assign(sig_id=["other 1", "other 2"])
    joined = l1000.join_metadata(bare, signatures=both).obs
    assert list(joined["rna_plate"]) == ["Q", "P"]
    assert list(joined["sig_id"]) == ["other 2", "other 1"]


def test_values_that_are_there_stay_and_gaps_are_filled(bare: AnnData) -> None:
    bare.obs["pert_id"] = ["mine", None]
    bare.obs["count"] = [np.nan, 3.0]
    table = pd.DataFrame({"sig_id": ["S1", "S2"], "pert_id": ["theirs 1", "theirs 2"], "count": [7, 8]})
    obs = l1000.join_metadata(bare, signatures=table).obs
    assert list(obs["pert_id"]) == ["mine", "theirs 2"]
    np.testing.assert_array_equal(obs["count"], [7, 3])
    flags = pd.DataFrame({"sig_id": ["S2", "S1"], "is_gold": [True, False]})
    assert l1000.join_metadata(bare, signatures=flags).obs["is_gold"].tolist() == [False, True]


def test_genes_are_looked_up_by_entrez_id_where_var_has_it(bare: AnnData) -> None:
    bare.var.index = ["200814_at", "222103_at", "201453_x_at"]
    bare.var["pr_gene_id"] = ["5720", "466", "6009"]
    table = pd.DataFrame({"pr_gene_id": [6009.0, 466.0, 5720.0], "pr_gene_title": ["c", "b", "a"]})
    assert list(l1000.join_metadata(bare, genes=table).var["pr_gene_title"]) == ["a", "b", "c"]


def test_metadata_that_does_not_fit_is_named(bare: AnnData, signatures: Path, tmp_path: Path) -> None:
    bare.obs.index = ["S1", "S7"]
    message = r"GSE_sig_info.txt.gz: no metadata for 1 of 2 samples \('S7'; sig_id 'S7'\): give the table of the same"
    with pytest.raises(DataError, match=message):
        l1000.join_metadata(bare, signatures=signatures)
    bare.obs.index = ["S1", "S2"]
    with pytest.raises(DataError, match=r"signatures table: no id column 'sig_id', 'inst_id', .* there are 'name'"):
        l1000.join_metadata(bare, signatures=pd.DataFrame({"name": ["S1"]}))
    with pytest.raises(DataError, match=r"perturbations: obs has no column 'pert_id' .*; join signatures=... first"):
        l1000.join_metadata(bare, perturbations=pd.DataFrame({"pert_id": ["x"]}))
    with pytest.raises(DataError, match=r"genes table: no metadata for 2 of 3 genes \('466', '6009'"):
        l1000.join_metadata(bare, genes=pd.DataFrame({"pr_gene_id": [5720]}))
    twice = pd.DataFrame({"sig_id": ["S1", "S2", "S2"], "cell_id": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"signatures table: rows that differ for one sig_id: 'S2'"):
        l1000.join_metadata(bare, signatures=twice)
    repeated = twice.assign(cell_id="a")  # the same row twice says nothing false
    assert list(l1000.join_metadata(bare, signatures=repeated).obs["cell_id"]) == ["a", "a"]
    ragged = tmp_path / "ragged.txt"
    ragged.write_text("sig_id\tcell_id\nS1\tA375\n\nS2\n")
    with pytest.raises(DataError, match=r"ragged.txt, line 4: 1 fields where the header has 2"):
        l1000.join_metadata(bare, signatures=ragged)
    ragged.write_text("sig_id\tcell_id\tcell_id\nS1\tA\tB\n")
    with pytest.raises(DataError, match=r"ragged.txt, line 1: duplicate columns: 'cell_id'; each must appear once"):
        l1000.join_metadata(bare, signatures=ragged)
    ragged.write_text("sig_id\tcell_id\n")
    with pytest.raises(DataError, match=r"ragged.txt has no rows"):
        l1000.join_metadata(bare, signatures=ragged)
    with pytest.raises(DataError, match=r"there is no file .*absent.txt"):
        l1000.join_metadata(bare, signatures=tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        ("10.0 um", None, 10.0),
        ("10 µM", None, 10.0),
        ("10 \u03bcM", None, 10.0),
        ("0.04 uM", None, 0.04),
        ("500 nM", None, 0.5),
        ("40nM", None, 0.04),
        ("2.5 mM", None, 2500.0),
        ("3 pM", None, 3e-6),
        ("1e-1 UM", None, 0.1),
        (1.5, "um", 1.5),
        (np.float32(44.4), "UM", 44.4),
        (500, "nM", 0.5),
        ("10 um", "nM", 10.0),
        ("300 um|300.0 um", None, 300.0),
        (0, "um", 0.0),
    ],
)
def test_doses_are_converted_to_micromolar(value: object, unit: object, expected: float) -> None:
    assert l1000.parse_dose(value, unit) == expected


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        ("-666", "um"),
        (-666, "um"),
        (-666.0, None),
        ("", "um"),
        (None, "um"),
        (float("nan"), "um"),
        ("restricted", None),
        ("1 %", None),
        (2.0, "UL"),
        ("300 ng", None),
        ("10 um|20 um", None),
        ("1.5", None),
        (1.5, "-666"),
        ("-1 um", None),
        ("ten um", None),
        ("1.2.3 um", None),
    ],
)
def test_doses_that_are_unknown_or_no_concentration_are_nan(value: object, unit: object) -> None:
    assert np.isnan(l1000.parse_dose(value, unit))


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        ("24 h", None, 24.0),
        ("6 H", None, 6.0),
        ("30 m", None, 0.5),
        ("2 days", None, 48.0),
        (np.float32(96), "H", 96.0),
        ("90", "min", 1.5),
        ("6 h|6 h", None, 6.0),
    ],
)
def test_times_are_converted_to_hours(value: object, unit: object, expected: float) -> None:
    assert l1000.parse_time(value, unit) == expected


@pytest.mark.parametrize("value", ["-666", "", "24", "24 fortnights", None])
def test_times_that_are_unknown_are_nan(value: object) -> None:
    assert np.isnan(l1000.parse_time(value))


def _wells(**columns: Any) -> AnnData:
    n = len(next(iter(columns.values())))
    obs = pd.DataFrame(columns, index=[f"w{i}" for i in range(n)])
    return AnnData(X=np.zeros((n, 2), np.float32), obs=obs, var=pd.DataFrame(index=["g1", "g2"]))


def test_standardise_reads_the_columns_of_the_current_release() -> None:
    adata = l1000.standardise(
        _wells(
            pert_iname=["DMSO", "trametinib", None, "UnTrt"],
            pert_id=["DMSO", "BRD-1", "BRD-2", "CMAP-000"],
            pert_type=["ctl_vehicle", "trt_cp", "trt_cp", "ctl_untrt.cns"],
            pert_idose=[None, "0.37 um", None, None],
            pert_dose=[np.nan, 0.3704, 500.0, 3.0],
            pert_dose_unit=[None, "um", "nM", "um"],
            pert_time=[24, 24, 6, 6],
            pert_time_unit=["h", "h", "h", "h"],
            cell_id=["A375", "A375", "PC3", "PC3"],
            canonical_smiles=[None, "CCO", None, None],
            det_plate=["P_B19", "P_B19", "P_B19", "P_B19"],
            rna_plate=["P", "P", None, "P"],
            det_well=["A01", "A02", "A03", "A04"],
        )
    )
    obs = adata.obs
    assert list(obs["perturbation"]) == ["DMSO", "trametinib", "BRD-2", "UnTrt"]
    np.testing.assert_array_equal(obs["dose"], [0, 0.37, 0.5, 0])
    np.testing.assert_array_equal(obs["time"], [24, 24, 6, 6])
    assert list(obs["cell_line"]) == ["A375", "A375", "PC3", "PC3"]
    assert list(obs["smiles"]) == [None, "CCO", None, None]
    assert list(obs["plate"]) == ["P", "P", "P_B19", "P"]
    assert list(obs["well"]) == ["A01", "A02", "A03", "A04"]
    assert obs["control"].dtype == bool
    assert list(obs["control"]) == [True, False, False, True]
    again = l1000.standardise(adata).obs
    pd.testing.assert_frame_equal(again, obs)


def test_standardise_reads_the_columns_of_older_files() -> None:
    obs = l1000.standardise(
        _wells(
            pert_desc=["DMSO", "GELDANAMYCIN", "GELDANAMYCIN"],
            pert_type=["CTL_VEHICLE", "TRT_CP", "TRT_CP"],
            exp_pert_dose=np.array([10, 11.1, 44.4], np.float32),
            exp_pert_dose_unit=["UM", "UM", "UM"],
            exp_pert_time=[6.0, 6.0, 6.0],
            exp_pert_time_unit=["H", "H", "H"],
        )
    ).obs
    assert list(obs["pert_type"]) == ["ctl_vehicle", "trt_cp", "trt_cp"]
    np.testing.assert_array_equal(obs["dose"], [0, 11.1, 44.4])  # a vehicle has no dose; float32 leaves no 11.1000003
    np.testing.assert_array_equal(obs["time"], [6, 6, 6])
    assert not {"cell_line", "smiles", "plate", "well", "pert_id"} & set(obs)


def test_control_perturbations_can_be_named() -> None:
    wells = _wells(pert_desc=["EMPTY", "gfp", "STAT1", "dmso"], pert_type=["TRT_SHRNA"] * 4)
    assert list(l1000.standardise(wells).obs["control"]) == [False, False, False, True]
    named = l1000.standardise(wells, control_names=("Empty", "GFP"))
    assert list(named.obs["control"]) == [True, True, False, False]


def test_standardise_needs_to_know_the_perturbation() -> None:
    message = r"no obs column of 'pert_iname', .* names the perturbation: obs has 'cell_id'; join the sig_info"
    with pytest.raises(DataError, match=message):
        l1000.standardise(_wells(cell_id=["A375"]))


@pytest.fixture
def two_plates() -> AnnData:
    """Plate P: vehicles 1, 3, 8 (median 3, MAD 2, mean 4); plate Q: 10, 20 (median 15). Gene 2 is saturated."""
    first = [1.0, 3.0, 8.0, 5.0, 10.0, 20.0, 18.0]
    obs = pd.DataFrame(
        {"plate": list("PPPPQQQ"), "control": [True, True, True, False, True, True, False]},
        index=[f"w{i}" for i in range(7)],
    )
    return AnnData(X=np.array([[v, 15.0] for v in first], np.float32), obs=obs, var=pd.DataFrame(index=["g1", "g2"]))


def test_the_vehicle_median_of_each_plate_is_subtracted(two_plates: AnnData) -> None:
    centred = l1000.centre_on_vehicle(two_plates)
    np.testing.assert_array_equal(centred.X[:, 0], [-2, 0, 5, 2, -5, 5, 3])
    np.testing.assert_array_equal(centred.X[:, 1], 0)
    assert centred.uns["l1000_centred"] == {"statistic": "median", "scaled": False}
    assert two_plates.X[0, 0] == 1.0  # a copy
    assert "l1000_centred" not in two_plates.uns


def test_the_mean_can_be_subtracted_instead(two_plates: AnnData) -> None:
    centred = l1000.centre_on_vehicle(two_plates, statistic="mean")
    np.testing.assert_array_equal(centred.X[:, 0], [-3, -1, 4, 1, -5, 5, 3])


def test_scaling_divides_by_the_robust_spread_of_the_vehicles(two_plates: AnnData) -> None:
    two_plates.X[3, 1] = 16.0
    scaled = l1000.centre_on_vehicle(two_plates, scale=True)
    expected = np.array([-2, 0, 5, 2, -5, 5, 3]) / np.array([2, 2, 2, 2, 5, 5, 5]) / 1.4826
    np.testing.assert_allclose(scaled.X[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(scaled.X[3, 1], 1 / (0.1 * 1.4826), rtol=1e-6)  # the MAD is 0: the floor stands in
    wider = l1000.centre_on_vehicle(two_plates, scale=True, floor=4.0)
    np.testing.assert_allclose(wider.X[:4, 0], np.array([-2, 0, 5, 2]) / 4 / 1.4826, rtol=1e-6)


def test_missing_and_sparse_values_and_other_column_names(two_plates: AnnData) -> None:
    two_plates.obs = two_plates.obs.rename(columns={"plate": "batch", "control": "is_vehicle"})
    two_plates.X[2, 0] = np.nan  # vehicles 1 and 3 remain
    two_plates.X[[4, 5], 1] = np.nan  # no vehicle of plate Q has gene 2
    centred = l1000.centre_on_vehicle(two_plates, plate="batch", control="is_vehicle")
    np.testing.assert_array_equal(centred.X[:4, 0], [-1, 1, np.nan, 3])
    assert np.isnan(centred.X[4:, 1]).all()
    two_plates.X = sp.csr_matrix(np.nan_to_num(two_plates.X))
    sparse = l1000.centre_on_vehicle(two_plates, plate="batch", control="is_vehicle")
    np.testing.assert_array_equal(sparse.X[:4, 0], [0, 2, -1, 4])


def test_centring_that_cannot_be_done_is_refused(two_plates: AnnData) -> None:
    two_plates.obs.loc["w4", "control"] = False
    with pytest.raises(
        DataError, match=r"plate 'Q': fewer than 2 vehicle wells \('control' is true in none or too few"
    ):
        l1000.centre_on_vehicle(two_plates, scale=True)
    two_plates.obs.loc["w5", "control"] = False
    with pytest.raises(DataError, match=r"plate 'Q': fewer than 1 vehicle wells .* drop the plate"):
        l1000.centre_on_vehicle(two_plates)
    with pytest.raises(DataError, match=r"statistic='mode': expected 'median' or 'mean'"):
        l1000.centre_on_vehicle(two_plates, statistic="mode")
    with pytest.raises(DataError, match=r"floor=0: the smallest MAD must be positive"):
        l1000.centre_on_vehicle(two_plates, floor=0)
    with pytest.raises(DataError, match=r"no obs column 'batch': run standardise first; obs has 'plate', 'control'"):
        l1000.centre_on_vehicle(two_plates, plate="batch")
    with pytest.raises(DataError, match=r"obs column 'plate' has type object: expected booleans"):
        l1000.centre_on_vehicle(two_plates, control="plate")
    two_plates.obs.loc["w0", "plate"] = None
    with pytest.raises(DataError, match=r"obs column 'plate' is missing in 1 samples \('w0'\)"):
        l1000.centre_on_vehicle(two_plates)


@pytest.mark.parametrize("level", [4, 5])
def test_z_scores_are_never_centred(two_plates: AnnData, level: int) -> None:
    two_plates.uns["l1000_level"] = level
    with pytest.raises(DataError, match=rf"these are level {level} z-scores, which are relative to controls already"):
        l1000.centre_on_vehicle(two_plates)
    two_plates.uns["l1000_level"] = 3
    assert l1000.centre_on_vehicle(two_plates).X[3, 0] == 2.0


def _plate(folder: Path, name: str, genes: dict[str, str], first: float, wells: list[str]) -> Path:
    """A plate of constant genes: value of gene k is first + k, with 100 x well added."""
    values = np.array([[first + k + 100 * w for w in range(len(wells))] for k in range(len(genes))], np.float32)
    return write_gctx(
        folder,
        values,
        [f"{gene}_at" for gene in genes],
        [f"{name}:{well}" for well in wells],
        row={"pr_gene_id": np.array([float(g) for g in genes]), "pr_gene_symbol": list(genes.values())},
        column={
            "pert_iname": ["DMSO", *(f"drug {w}" for w in wells[1:])],
            "rna_plate": [name] * len(wells),
            "rna_well": wells,
        },
        name=f"{name}_level3.gctx",
    )


def test_plates_are_stacked_on_their_common_genes_by_entrez_id(tmp_path: Path) -> None:
    one = _plate(tmp_path, "P1", {"11": "CABC1", "22": "B", "33": "C"}, 0, ["A01", "A02"])
    two = _plate(tmp_path, "P2", {"44": "D", "33": "C", "11": "ADCK3"}, 10, ["A01", "A02", "A03"])
    adata = l1000.load_plates([one, two])
    assert list(adata.var_names) == ["CABC1", "C"]  # the first file's symbols
    assert list(adata.var["pr_gene_id"]) == ["11", "33"]
    assert list(adata.obs_names) == ["P1:A01", "P1:A02", "P2:A01", "P2:A02", "P2:A03"]
    np.testing.assert_array_equal(adata.X, [[0, 2], [100, 102], [12, 11], [112, 111], [212, 211]])
    assert list(adata.obs["plate"]) == ["P1", "P1", "P2", "P2", "P2"]
    assert list(adata.obs["control"]) == [True, False, True, False, False]
    assert adata.uns["l1000_level"] == 3
    chosen = l1000.load_plates([one, two], genes=["33", "CABC1"])
    assert list(chosen.var_names) == ["C", "CABC1"]
    np.testing.assert_array_equal(chosen.X, adata.X[:, ::-1])


def test_plates_without_entrez_ids_are_matched_by_symbol_or_row_id(tmp_path: Path) -> None:
    one = _plate(tmp_path, "P1", {"11": "A", "22": "B"}, 0, ["A01"])
    two = _plate(tmp_path, "P2", {"99": "B", "22": "Z"}, 10, ["A01"])
    with h5py.File(two, "r+") as file:
        del file["0/META/ROW/pr_gene_id"]
    by_symbol = l1000.load_plates([one, two])
    assert list(by_symbol.var_names) == ["B"]
    np.testing.assert_array_equal(by_symbol.X, [[1], [10]])
    with h5py.File(two, "r+") as file:
        del file["0/META/ROW/pr_gene_symbol"]
    by_row = l1000.load_plates([one, two])
    np.testing.assert_array_equal(by_row.X, [[1], [11]])  # row 22_at
    assert list(by_row.var_names) == ["B"]
    assert list(l1000.load_plates([two]).var_names) == ["99_at", "22_at"]


def test_annotation_is_added_by_well_or_by_sample_and_wins(tmp_path: Path) -> None:
    one = _plate(tmp_path, "P1", {"11": "A"}, 0, ["A01", "A02"])
    two = _plate(tmp_path, "P2", {"11": "A"}, 10, ["A01"])
    table = tmp_path / "obs.csv"
    table.write_text('plate,well,perturbation,smiles\nP2,A01,,\nP1,A02,"aspirin, pure",CCO\nP1,A01,,\nP9,A01,other,C\n')
    obs = l1000.load_plates([one, two], obs=table).obs
    assert list(obs["perturbation"]) == ["DMSO", "aspirin, pure", "DMSO"]
    assert list(obs["smiles"]) == [None, "CCO", None]
    by_sample = pd.DataFrame({"id": ["P2:A01", "P1:A01", "P1:A02"], "cell_line": ["c", "a", "b"]})
    assert list(l1000.load_plates([one, two], obs=by_sample).obs["cell_line"]) == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"obs table: no metadata for 1 of 3 samples \('P2:A01'"):
        l1000.load_plates([one, two], obs=pd.DataFrame({"plate": ["P1", "P1"], "well": ["A01", "A02"], "x": [1, 2]}))


def test_plates_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    one = _plate(tmp_path, "P1", {"11": "A"}, 0, ["A01"])
    two = _plate(tmp_path, "P2", {"22": "B"}, 10, ["A01"])
    with pytest.raises(DataError, match=r"the files have no gene in common: '11', but '22'"):
        l1000.load_plates([one, two])
    with pytest.raises(DataError, match=r"samples in more than one file: 'P1:A01'"):
        l1000.load_plates([one, one])
    with pytest.raises(DataError, match=r"genes 'B', 'X' are not in all files; 1 are, e.g. '11'"):
        l1000.load_plates([one], genes=["A", "B", "X"])
    with pytest.raises(DataError, match=r"genes is empty"):
        l1000.load_plates([one], genes=[])
    with pytest.raises(DataError, match=r"genes: named twice: '11'"):
        l1000.load_plates([one], genes=["A", "11"])
    with pytest.raises(DataError, match=r"paths=\[\]: give a list"):
        l1000.load_plates([])
    with pytest.raises(DataError, match=r"paths=.*: give a list"):
        l1000.load_plates(one)  # type: ignore[arg-type]
    scores = _plate(tmp_path, "P3", {"11": "A"}, 0, ["A01"]).rename(tmp_path / "P3_level5.gctx")
    with pytest.raises(DataError, match=r"levels \[3, 5\] do not go together in one matrix"):
        l1000.load_plates([one, scores])


@pytest.fixture
def a375(data_folder: Path) -> Path:
    return data_folder / "l1000_a375"


@pytest.mark.parametrize(("plate_name", "file"), A375)
def test_real_plates_hold_the_values_that_were_aligned_independently(a375: Path, plate_name: str, file: str) -> None:
    reference = np.load(a375 / "l1000_a375_level3.npz", allow_pickle=False)
    table = pd.read_csv(a375 / "obs.csv.gz")
    mine = (table["plate"] == plate_name).to_numpy()
    adata = l1000.standardise(gct.read(a375 / file))
    order = pd.Index(adata.var["pr_gene_id"].astype(int)).get_indexer(reference["entrez"])
    assert (order >= 0).all()
    np.testing.assert_array_equal(adata.X[:, order], reference["X"][mine])
    obs, expected = adata.obs, table[mine]
    pairs = [("plate", "plate"), ("well", "well"), ("pert_type", "pert_type"), ("pert_id", "pert_id")]
    for ours, theirs in [*pairs, ("perturbation", "pert_iname"), ("cell_line", "cell_line"), ("time", "time_h")]:
        assert obs[ours].tolist() == expected[theirs].tolist(), ours
    treated = ~obs["control"].to_numpy()
    assert list(treated) == (expected["pert_type"] != "ctl_vehicle").tolist()
    np.testing.assert_allclose(obs["dose"][treated], expected["dose_um"][treated.tolist()], rtol=1e-6)
    assert (obs["dose"][~treated] == 0).all()


def test_real_plates_are_stacked_and_centred(a375: Path) -> None:
    reference = np.load(a375 / "l1000_a375_level3.npz", allow_pickle=False)
    adata = l1000.load_plates([a375 / file for _, file in A375], obs=a375 / "obs.csv.gz")
    np.testing.assert_array_equal(adata.X, reference["X"])
    assert list(adata.var_names) == list(reference["genes"])
    assert int(adata.obs["control"].sum()) == 64
    assert int(adata.obs["smiles"].notna().sum()) == 1048
    obs, centred = adata.obs, l1000.centre_on_vehicle(adata)
    for (name, _), count in zip(A375, (26, 22, 16), strict=True):
        vehicle = ((obs["plate"] == name) & obs["control"]).to_numpy()
        assert vehicle.sum() == count
        np.testing.assert_allclose(np.median(centred.X[vehicle], axis=0), 0, atol=2e-6)
    assert np.isfinite(l1000.centre_on_vehicle(adata, scale=True).X).all()


def test_centring_makes_plates_comparable(a375: Path) -> None:
    """Dabrafenib (BRAF, plate LJP009) is like the MEK inhibitors of plate LJP005, and not like all that is on it."""
    adata = l1000.load_plates([a375 / file for _, file in A375[:2]])
    obs, x = adata.obs, l1000.centre_on_vehicle(adata).X
    treated = (obs["dose"] >= 1).to_numpy()
    profile = x[treated & (obs["perturbation"] == "dabrafenib").to_numpy()].mean(0)
    others = pd.DataFrame(x[treated]).groupby(obs["perturbation"][treated].to_numpy()).mean()
    others = others.loc[obs["perturbation"][treated & (obs["plate"] == "LJP005_A375_24H_X1").to_numpy()].unique()]
    similarity = others.T.corrwith(pd.Series(profile))
    assert similarity[["trametinib", "PD-0325901", "AZD-8330"]].min() > 0.6
    assert similarity.median() < 0.4


def test_real_signatures_have_doses_and_cell_lines(data_folder: Path) -> None:
    adata = l1000.standardise(gct.read(data_folder / "l1000_multicell" / "modzs_n272x978.gctx"))
    assert adata.shape == (272, 978)
    assert adata.uns["l1000_level"] == 5
    assert l1000.landmarks(adata.var).all()
    assert int((adata.obs["dose"] == 10).sum()) == 218
    assert adata.obs["perturbation"].nunique() == 3
    joined = l1000.join_metadata(adata, cells=data_folder / "l1000_multicell" / "cellinfo_dhimmel.tsv.gz")
    assert joined.obs.loc[joined.obs["cell_line"] == "A549", "cell_lineage"].unique().tolist() == ["lung"]
    with pytest.raises(DataError, match="these are level 5 z-scores"):
        l1000.centre_on_vehicle(adata)


def test_real_hairpins_agree_with_their_table(data_folder: Path) -> None:
    folder = data_folder / "l1000_shrna_pc3"
    controls = ("EMPTY", "pgw", "GFP", "LUCIFERASE", "lacZ", "RFP")
    adata = gct.read(folder / "LITMUS001_PC3_96H_X2_X5_zscore_n757x978.gctx")
    adata = l1000.standardise(adata, control_names=controls)
    table = pd.read_csv(folder / "litmus001_obs.csv.gz").set_index("id").loc[adata.obs_names]
    assert adata.obs["perturbation"].tolist() == table["pert_desc"].tolist()
    assert adata.obs["well"].tolist() == table["rna_well"].tolist()
    assert adata.obs["control"].tolist() == table["pert_desc"].isin(controls).tolist()
    assert adata.uns["l1000_level"] == 4
    np.testing.assert_array_equal(adata.obs["time"], 96)
    assert adata.obs.loc[~adata.obs["control"], "dose"].isna().all()  # microlitres of virus are no concentration

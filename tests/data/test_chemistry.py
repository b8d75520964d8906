import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rdkit import Chem, DataStructs
from rdkit.Chem import Descriptors, rdFingerprintGenerator

from pyro_scm.data import chemistry
from pyro_scm.errors import DataError

CHEAP = settings(derandomize=True, deadline=None, max_examples=40, database=None)

IMATINIB = "CN1CCN(CC1)Cc1ccc(cc1)C(=O)Nc1ccc(C)c(Nc2nccc(n2)-c2cccnc2)c1"
METFORMIN = "CN(C)C(=N)NC(N)=N"
HYDROXYZINE = "OCCOCCN1CCN(CC1)C(c1ccccc1)c1ccc(Cl)cc1"
PAMOIC_ACID = "OC(=O)c1cc2ccccc2c(Cc2c(O)c(cc3ccccc23)C(O)=O)c1O"
R_ALANINE, S_ALANINE = "C[C@@H](N)C(O)=O", "C[C@H](N)C(O)=O"
DRUGS = [
    IMATINIB,
    METFORMIN,
    HYDROXYZINE,
    "CC(=O)Oc1ccccc1C(O)=O",  # aspirin
    "CN1C=NC2=C1C(=O)N(C)C(=O)N2C",  # caffeine
    "COc1ccc2[nH]c(nc2c1)[S@](=O)Cc1ncc(C)c(OC)c1C",  # esomeprazole
    "CC(C)C[C@H](NC(=O)[C@H](Cc1ccccc1)NC(=O)c1cnccn1)B(O)O",  # bortezomib
    "C[C@]12CC[C@H]3[C@@H](CCc4cc(O)ccc34)[C@@H]1CC[C@@H]2O",  # oestradiol
    "ONC(=O)CCCCCCC(=O)Nc1ccccc1",  # vorinostat
    "O=C1O[Pt]2(N[C@@H]3CCCC[C@H]3N2)OC1=O",  # oxaliplatin
]


def rewritten(smiles: str, seed: int) -> str:
    """The same molecule with its atoms in another order."""
    mol = Chem.MolFromSmiles(smiles)
    order = np.random.default_rng(seed).permutation(mol.GetNumAtoms()).tolist()
    return Chem.MolToSmiles(Chem.RenumberAtoms(mol, order), canonical=False)


class TestCanonical:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("OCC", "CCO"),
            ("C1=CC=CC=C1", "c1ccccc1"),
            ("[H]C([H])([H])[H]", "C"),
            ("[CH3:7][OH:1]", "CO"),
            ("  CCO\n", "CCO"),
            ("C1=CC=CC=C1 |c:0,2,4|", "c1ccccc1"),
            ("N[C@@H](C)C(O)=O", S_ALANINE),
        ],
    )
    def test_writings_of_one_molecule_agree(self, one: str, other: str) -> None:
        assert chemistry.canonical(one) == chemistry.canonical(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (R_ALANINE, S_ALANINE),
            ("C", "[13CH4]"),
            ("C/C=C/C", "C/C=C\\C"),
            ("CC(=O)O", "CC(=O)[O-]"),
            ("CC=O", "C=CO"),
        ],
    )
    def test_different_molecules_differ(self, one: str, other: str) -> None:
        assert chemistry.canonical(one) != chemistry.canonical(other)

    @CHEAP
    @given(st.sampled_from(DRUGS), st.integers(0, 2**16))
    def test_does_not_depend_on_the_order_of_atoms(self, smiles: str, seed: int) -> None:
        other = rewritten(smiles, seed)
        assert chemistry.canonical(other) == chemistry.canonical(smiles)
        assert chemistry.parent(other) == chemistry.parent(smiles)
        assert chemistry.scaffold(other) == chemistry.scaffold(smiles)

    def test_is_the_form_that_rdkit_writes(self) -> None:
        assert chemistry.canonical("C(C)(=O)O") == "CC(=O)O"
        assert chemistry.canonical("[Na+].[O-]C(C)=O") == "CC(=O)[O-].[Na+]"


class TestInvalidStrings:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "'' is empty"),
            ("   ", "is empty"),
            ("-666", "'-666' is not a molecule that RDKit can read"),
            ("restricted", "'restricted' is not a molecule"),
            ("nan", "'nan' is not a molecule"),
            ("C1CC", "'C1CC' is not a molecule"),
            ("C(C)(C)(C)(C)C", "is not a molecule"),
            ("c1cccc1", "is not a molecule"),
            ("CC>>CO", "is not a molecule"),
            ("CC |c:1", "holds text after a blank"),
            ("C\0C", "not printable ASCII"),
            ("CC\ud800", "not printable ASCII"),
            ("CÖ", "not printable ASCII"),
            ("CC\nCC", "not printable ASCII"),
            ("N A", r"holds text after a blank that is not a \|...\| block"),
            ("CCO ethanol", "holds text after a blank"),
            ("C" * 2001, "has 2001 characters, more than 2000"),
            ("*", r"'\*' has no atom"),
            (float("nan"), "is of type float, not a string"),
            (None, "is of type NoneType, not a string"),
        ],
    )
    def test_every_reader_names_drug_and_string(self, text: str, reason: str) -> None:
        assert not chemistry.is_smiles(text)
        for read in (chemistry.canonical, chemistry.parent, chemistry.scaffold):
            with pytest.raises(DataError, match=f"drug 'Foretinib': the SMILES .*{reason}.*expected one molecule"):
                read(text, name="Foretinib")
        with pytest.raises(DataError, match=f"drug 'Foretinib': .*{reason}"):
            chemistry.morgan(["CCO", text], names=["ethanol", "Foretinib"])

    def test_limit_of_length_is_inclusive_and_long_strings_are_cut_in_messages(self) -> None:
        assert chemistry.is_smiles("C" * 2000)
        with pytest.raises(DataError) as error:
            chemistry.canonical("C" * 5000)
        assert len(str(error.value)) < 300
        assert "a drug without a name" in str(error.value)

    def test_valid_strings_are_smiles(self) -> None:
        assert all(chemistry.is_smiles(text) for text in (*DRUGS, "[H][H]", "*C", "O", np.str_("CC"), "CC |c:0|"))

    def test_a_table_reports_all_unusable_rows(self) -> None:
        smiles = ["CCO", "restricted", "CC", "restricted", "", None]
        with pytest.raises(DataError, match=r"^row 1: .*'restricted'.*; 3 more .*: 'row 3', 'row 4', 'row 5'$"):
            chemistry.morgan(smiles)  # type: ignore[list-item]
        names = ["a", "b", "c", "d", "e", "f"]
        with pytest.raises(DataError, match=r"^drug 'b': .*; 3 more cannot be used: \"drug 'd'\""):
            chemistry.scaffold_groups(smiles, names)  # type: ignore[arg-type]

    def test_one_string_is_not_a_sequence_of_molecules(self) -> None:
        with pytest.raises(DataError, match="smiles is the one string 'CCO'; expected a sequence"):
            chemistry.morgan("CCO")
        with pytest.raises(DataError, match="names: the one string 'abc' for 3 SMILES"):
            chemistry.morgan(["C", "CC", "CCC"], names="abc")

    def test_names_must_match_rows(self) -> None:
        for call in (
            lambda: chemistry.morgan(["C", "CC"], names=["a"]),
            lambda: chemistry.descriptors(["C", "CC"], ["a"]),
            lambda: chemistry.scaffold_groups(["C", "CC"], ["a"]),
            lambda: chemistry.same_compound(["C", "CC"], ["a"]),
        ):
            with pytest.raises(DataError, match="names: 1 for 2 SMILES; expected one name per SMILES"):
                call()

    def test_molecule_that_rdkit_reads_but_cannot_write(self) -> None:
        broken = "[Br-].COCC[N]1C(=[N+](CCB2=CN=CC=N:2)C3=C1C(=O)C4=C(C=CC=C4)C3=O)C"
        assert Chem.MolFromSmiles(broken) is not None
        with pytest.raises(DataError, match=r"drug 'x': RDKit reads the SMILES .* but cannot handle.*kekulize"):
            chemistry.parent(broken, name="x")

    @CHEAP
    @given(st.text(alphabet="CNOSPnco()[]=#+-12@H/\\.*:% |\0é", max_size=12))
    def test_random_text_gives_a_molecule_or_a_data_error(self, text: str) -> None:
        try:
            known = chemistry.canonical(text)
        except DataError:
            assert not chemistry.is_smiles(text)
        else:
            assert chemistry.is_smiles(text)
            assert chemistry.canonical(known) == known

    def test_rdkit_log_is_silent_here_and_untouched_elsewhere(self) -> None:
        program = (
            "import sys\n"
            "from rdkit import Chem\n"
            "from pyro_scm.data import chemistry\n"
            "chemistry.is_smiles('C1CC'); chemistry.is_smiles('C(C)(C)(C)(C)C'); chemistry.parent('CC(=O)O[Na]')\n"
            "print('between', file=sys.stderr, flush=True)\n"
            "Chem.MolFromSmiles('C1CC')\n"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
        before, after = done.stderr.split("between")
        line = r"(?m)^\[\d\d:\d\d:\d\d\] "  # how RDKit starts one
        assert re.search(line, before) is None
        assert re.search(line + "SMILES Parse Error", after) is not None

    def test_rdkit_is_not_imported_with_the_module(self) -> None:
        program = "import sys, pyro_scm.data.chemistry; sys.exit('rdkit' in sys.modules)"
        root = Path(__file__).parents[2]
        assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


class TestParent:
    @pytest.mark.parametrize(
        ("salt", "base"),
        [
            (IMATINIB + ".CS(O)(=O)=O", IMATINIB),
            (IMATINIB.replace("N1CCN", "[NH+]1CCN") + ".CS([O-])(=O)=O", IMATINIB),
            ("CC(=O)[O-].[Na+]", "CC(=O)O"),
            ("CC(=O)O[Na]", "CC(=O)O"),
            ("[Ca+2].CC([O-])=O.CC([O-])=O", "CC(=O)O"),
            (METFORMIN + ".Cl", METFORMIN),
            (METFORMIN + ".O.O.Cl.Cl", METFORMIN),
            ("[NH3+]CC([O-])=O", "NCC(=O)O"),
            ("C[N+](C)(C)CC(O)CC([O-])=O", "Cl.C[N+](C)(C)CC(O)CC(O)=O"),
            ("CCCC(CCC)C(O)=O.CCCC(CCC)C([O-])=O.[Na+]", "CCCC(CCC)C(O)=O"),
            ("CNC(=O)Oc1ccc(C)cc1.CNC(=O)Oc1ccc(C)cc1", "CNC(=O)Oc1ccc(C)cc1"),
            ("C[S+]([O-])CCCCN=C=S", "CS(=O)CCCCN=C=S"),
            ("C[S+2]([O-])([O-])C", "CS(C)(=O)=O"),
            ("C[P+](C)(C)[O-]", "CP(C)(C)=O"),
        ],
    )
    def test_salts_and_charge_forms_share_the_parent(self, salt: str, base: str) -> None:
        assert chemistry.canonical(salt) != chemistry.canonical(base)
        assert chemistry.parent(salt) == chemistry.parent(base)

    def test_neutral_single_compound_is_its_own_parent(self) -> None:
        for smiles in DRUGS:
            assert chemistry.parent(smiles) == chemistry.canonical(smiles)

    def test_counter_ion_larger_than_the_drug_is_still_the_counter_ion(self) -> None:
        drug, acid = Chem.MolFromSmiles(HYDROXYZINE), Chem.MolFromSmiles(PAMOIC_ACID)
        assert drug.GetNumHeavyAtoms() < acid.GetNumHeavyAtoms()
        assert chemistry.parent(f"{PAMOIC_ACID}.{HYDROXYZINE}") == chemistry.canonical(HYDROXYZINE)
        tartrate = "OC(=O)[C@H](O)[C@@H](O)C(O)=O"  # stereochemistry of the counter-ion is ignored
        assert chemistry.parent(f"{tartrate}.C=CCN") == chemistry.canonical("C=CCN")

    def test_counter_ions_alone_are_compounds(self) -> None:
        assert chemistry.parent(PAMOIC_ACID) == chemistry.canonical(PAMOIC_ACID)
        assert chemistry.parent("[Na+].[Na+].[O-]C(=O)CCC([O-])=O") == chemistry.canonical("OC(=O)CCC(O)=O")
        assert chemistry.parent("NC(CO)(CO)CO.CC(O)=O") == chemistry.canonical("NC(CO)(CO)CO")

    def test_every_listed_counter_ion_is_recognised(self) -> None:
        for name, ion in chemistry._COUNTER_IONS.items():
            assert chemistry.parent(f"{ion}.C1CC1N") == chemistry.canonical("C1CC1N"), name

    def test_larger_of_two_drugs_is_taken_whatever_the_order(self) -> None:
        diphenhydramine, theoclate = "CN(C)CCOC(c1ccccc1)c1ccccc1", "Cn1c2nc(Cl)[nH]c2c(=O)n(C)c1=O"
        expected = chemistry.canonical(diphenhydramine)
        assert chemistry.parent(f"{theoclate}.{diphenhydramine}") == expected
        assert chemistry.parent(f"{diphenhydramine}.{theoclate}") == expected
        # same size: heavier first, then the order of the SMILES
        assert chemistry.parent("CCF.CCBr") == chemistry.parent("CCBr.CCF") == "CCBr"
        assert chemistry.parent(f"{R_ALANINE}.{S_ALANINE}") == chemistry.parent(f"{S_ALANINE}.{R_ALANINE}")

    @pytest.mark.parametrize("whole", ["[Cl-].[Li+]", "Cl[Pt]Cl", "CC[Hg]Sc1ccccc1C(O)=O", DRUGS[-1]])
    def test_inorganic_salts_and_metal_complexes_stay_whole(self, whole: str) -> None:
        assert chemistry.parent(whole) == chemistry.canonical(whole)

    def test_permanent_charge_stereochemistry_and_isotopes_stay(self) -> None:
        assert chemistry.parent("C[N+](C)(C)CCO.[Cl-]") == "C[N+](C)(C)CCO"
        assert chemistry.parent(R_ALANINE + ".Cl") != chemistry.parent(S_ALANINE + ".Cl")
        assert chemistry.parent("[2H]C([2H])([2H])N.Cl") == "[2H]C([2H])([2H])N"

    def test_charge_that_holds_a_valence_together_stays(self) -> None:
        ate = "S=[P-](N1C#C1)(N2CC2)N3CC3"
        assert chemistry.parent(ate) == chemistry.canonical(ate)

    @CHEAP
    @given(st.lists(st.sampled_from([*DRUGS, "Cl", "O", "CS(O)(=O)=O", "[Na+]", "CC([O-])=O"]), min_size=1, max_size=3))
    def test_is_its_own_parent(self, parts: list[str]) -> None:
        once = chemistry.parent(".".join(parts))
        assert chemistry.parent(once) == once


class TestMorgan:
    def test_bits_are_those_of_rdkit(self) -> None:
        for radius, bits, chirality in [(2, 1024, False), (3, 256, True)]:
            generator = rdFingerprintGenerator.GetMorganGenerator(
                radius=radius, fpSize=bits, includeChirality=chirality
            )
            table = chemistry.morgan(DRUGS, radius=radius, bits=bits, chirality=chirality)
            assert table.dtype == np.float32
            assert table.shape == (len(DRUGS), bits)
            for row, smiles in zip(table, DRUGS, strict=True):
                on = set(generator.GetFingerprint(Chem.MolFromSmiles(smiles)).GetOnBits())
                assert set(np.flatnonzero(row)) == on
                assert set(np.unique(row)) == {0.0, 1.0}

    def test_counts_of_a_molecule_counted_by_hand(self) -> None:
        # radius 0 of propane: two CH3 and one CH2; of ethane: two CH3
        propane, ethane = chemistry.morgan(["CCC", "CC"], radius=0, counts=True)
        assert sorted(propane[propane > 0].tolist()) == [1, 2]
        assert ethane[ethane > 0].tolist() == [2]
        assert int(np.flatnonzero(ethane)[0]) == int(np.flatnonzero(propane == 2)[0])

    def test_bits_are_the_counts_above_zero(self) -> None:
        np.testing.assert_array_equal(chemistry.morgan(DRUGS), chemistry.morgan(DRUGS, counts=True) > 0)

    def test_larger_radius_adds_neighbourhoods(self) -> None:
        totals = [chemistry.morgan([IMATINIB], radius=r, counts=True).sum() for r in range(4)]
        assert totals[0] == Chem.MolFromSmiles(IMATINIB).GetNumHeavyAtoms()
        assert totals == sorted(set(totals))

    def test_fewer_bits_keep_counts_and_fold_positions(self) -> None:
        wide, narrow = (chemistry.morgan(DRUGS, bits=bits, counts=True) for bits in (2048, 64))
        np.testing.assert_array_equal(wide.sum(axis=1), narrow.sum(axis=1))
        assert (np.count_nonzero(narrow, axis=1) <= np.count_nonzero(wide, axis=1)).all()
        assert np.count_nonzero(narrow) < np.count_nonzero(wide)

    def test_chirality_tells_enantiomers_apart(self) -> None:
        flat = chemistry.morgan([R_ALANINE, S_ALANINE])
        np.testing.assert_array_equal(flat[0], flat[1])
        handed = chemistry.morgan([R_ALANINE, S_ALANINE], chirality=True)
        assert (handed[0] != handed[1]).any()

    def test_desalt_removes_the_counter_ion(self) -> None:
        pair = [IMATINIB, IMATINIB + ".CS(O)(=O)=O"]
        salted, free = chemistry.morgan(pair), chemistry.morgan(pair, desalt=True)
        assert (salted[0] != salted[1]).any()
        np.testing.assert_array_equal(free[0], free[1])
        np.testing.assert_array_equal(free[0], salted[0])

    @CHEAP
    @given(st.sampled_from(DRUGS), st.integers(0, 2**16), st.booleans(), st.booleans())
    def test_does_not_depend_on_the_order_of_atoms(self, smiles: str, seed: int, counts: bool, chirality: bool) -> None:
        one, other = chemistry.morgan([smiles, rewritten(smiles, seed)], counts=counts, chirality=chirality)
        np.testing.assert_array_equal(one, other)

    def test_each_distinct_string_is_read_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[object] = []
        original = chemistry._molecule
        monkeypatch.setattr(chemistry, "_molecule", lambda text, label: read.append(text) or original(text, label))
        table = chemistry.morgan(["CCO", "CC", "CCO", "CCO"])
        assert read == ["CCO", "CC"]
        np.testing.assert_array_equal(table[0], table[3])
        assert (table[0] != table[1]).any()
        table[0] = 7  # rows of one string are copies, not views of each other
        assert table[2].max() == 1

    def test_no_molecules(self) -> None:
        assert chemistry.morgan([], bits=16).shape == (0, 16)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"radius": -1}, "radius -1 is out of range; expected a whole number of 0 or more"),
            ({"radius": 1.5}, "radius 1.5 is out of range"),
            ({"bits": 0}, "bits 0 is out of range; expected a whole number of 1 or more"),
            ({"bits": True}, "bits True is out of range"),
        ],
    )
    def test_parameters_out_of_range(self, wrong: dict[str, int], message: str) -> None:
        with pytest.raises(DataError, match=message):
            chemistry.morgan(["C"], **wrong)  # type: ignore[arg-type]


class TestDescriptors:
    def test_columns_are_standardised_and_in_the_order_of_rdkit(self) -> None:
        values, columns = chemistry.descriptors(DRUGS[:8])
        assert values.shape == (8, len(columns))
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(values.std(axis=0), 1, atol=1e-5)
        order = list(Descriptors.CalcMolDescriptors(Chem.MolFromSmiles("C")))
        assert columns == [name for name in order if name in columns]

    def test_weights_worked_out_by_hand(self) -> None:
        # methane, ethane, propane: 1, 2, 3 heavy atoms have mean 2 and variance 2/3; no rings, so no ring count
        values, columns = chemistry.descriptors(["C", "CC", "CCC"])
        expected = [-np.sqrt(1.5), 0, np.sqrt(1.5)]
        np.testing.assert_allclose(values[:, columns.index("HeavyAtomCount")], expected, atol=1e-6)
        assert "RingCount" not in columns

    def test_small_differences_count_and_constants_do_not(self) -> None:
        # 40 and 41 carbons differ by 2.5 %; neither has an oxygen; two columns of two rows are +1 and -1
        values, columns = chemistry.descriptors(["C" * 40, "C" * 41])
        np.testing.assert_allclose(values[:, columns.index("HeavyAtomCount")], [-1, 1], atol=1e-6)
        assert "NumHeteroatoms" not in columns
        assert "Ipc" in columns

    def test_infinite_values_are_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = {1: {"finite": 1.0, "infinite": np.inf, "huge": 1e300}, 2: {"finite": 2.0, "infinite": 0.0, "huge": 0.0}}
        monkeypatch.setattr(Descriptors, "CalcMolDescriptors", lambda mol: rows[mol.GetNumAtoms()])
        values, columns = chemistry.descriptors(["C", "CC"])
        assert columns == ["finite", "huge"]
        assert values.tolist() == [[-1, 1], [1, -1]]

    def test_columns_not_finite_for_one_molecule_are_dropped(self) -> None:
        assert np.isnan(Descriptors.CalcMolDescriptors(Chem.MolFromSmiles(DRUGS[-1]))["BCUT2D_MWHI"])
        assert "BCUT2D_MWHI" in chemistry.descriptors(DRUGS[:9])[1]
        assert "BCUT2D_MWHI" not in chemistry.descriptors(DRUGS)[1]

    def test_fewer_than_two_molecules(self) -> None:
        for smiles in ([], ["CCO"], ["CCO", "OCC"]):
            with pytest.raises(DataError, match=f"descriptors: {len(smiles)} SMILES of . different molecules"):
                chemistry.descriptors(smiles)

    def test_invalid_molecule_is_named(self) -> None:
        with pytest.raises(DataError, match="drug 'b': the SMILES 'restricted'"):
            chemistry.descriptors(["CC", "restricted"], ["a", "b"])


class TestTanimoto:
    def test_bits_by_hand(self) -> None:
        a = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
        b = np.array([[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
        expected = [[1 / 3, 1, 0], [2 / 4, 2 / 4, 0], [0, 0, 1]]
        np.testing.assert_array_equal(chemistry.tanimoto(a, b), expected)
        np.testing.assert_array_equal(chemistry.tanimoto(a > 0, b > 0), expected)

    def test_counts_by_hand(self) -> None:
        # minima 1 + 0 + 3 = 4; maxima 2 + 5 + 7 = 14
        assert chemistry.tanimoto([[2, 0, 3]], [[1, 5, 7]]).tolist() == [[4 / 14]]
        assert chemistry.tanimoto([[100000, 0]], [[300000, 0]]).tolist() == [[1 / 3]]

    @pytest.mark.parametrize("counts", [False, True])
    def test_agrees_with_rdkit(self, counts: bool) -> None:
        generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
        write = generator.GetCountFingerprint if counts else generator.GetFingerprint
        prints = [write(Chem.MolFromSmiles(smiles)) for smiles in DRUGS]
        expected = [[DataStructs.TanimotoSimilarity(p, q) for q in prints] for p in prints]
        table = chemistry.morgan(DRUGS, counts=counts)
        np.testing.assert_allclose(chemistry.tanimoto(table, table), expected, rtol=0, atol=1e-12)

    @CHEAP
    @given(
        arrays(np.int64, (5, 6), elements=st.integers(0, 4)),
        arrays(np.int64, (3, 6), elements=st.integers(0, 4)),
        st.integers(1, 40),
    )
    def test_is_the_ratio_of_minima_to_maxima_in_blocks_of_any_size(self, a, b, block) -> None:  # type: ignore[no-untyped-def]
        smaller = np.minimum(a[:, None], b[None]).sum(axis=2)
        larger = np.maximum(a[:, None], b[None]).sum(axis=2)
        expected = np.where(larger == 0, 1.0, smaller / np.maximum(larger, 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chemistry, "BLOCK", block)
            result = chemistry.tanimoto(a, b)
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(chemistry.tanimoto(b, a), result.T)
        np.testing.assert_array_equal(np.diag(chemistry.tanimoto(a, a)), 1)

    def test_empty_tables(self) -> None:
        assert chemistry.tanimoto(np.zeros((0, 4)), np.ones((3, 4))).shape == (0, 3)
        assert chemistry.tanimoto(np.ones((3, 4)), np.zeros((0, 4))).shape == (3, 0)

    @pytest.mark.parametrize(
        ("a", "b", "message"),
        [
            ([[1, 0]], [[1, 0, 1]], "a has 2 and b has 3 bits; expected fingerprints of one length"),
            ([1, 0], [[1, 0]], r"a is an array of shape \(2,\) and type int64; expected fingerprints"),
            ([[1, 0]], [["x", "y"]], "b is an array of shape"),
            ([[1, 0], [0, -1]], [[1, 0]], "a: row 1, bit 1 is -1; expected whole numbers"),
            ([[1, 0]], [[0.5, 0]], "b: row 0, bit 0 is 0.5; expected whole numbers"),
            ([[1, np.nan]], [[1, 0]], "a: row 0, bit 1 is nan"),
            ([[1, np.inf]], [[1, 0]], "a: row 0, bit 1 is inf"),
            ([[1, 2**24]], [[1, 0]], "a: row 0, bit 1 is 16777216"),
        ],
    )
    def test_tables_that_are_not_fingerprints(self, a, b, message) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(DataError, match=message):
            chemistry.tanimoto(a, b)


class TestTanimotoGroups:
    def test_chain_is_one_group(self) -> None:
        # similarities 0-1 and 1-2 are 3/5, 0-2 is 2/6: linked through 1; row 3 shares nothing, rows 4 and 5 are equal
        table = np.zeros((6, 12), dtype=np.float32)
        table[0, [0, 1, 2, 3]] = table[1, [1, 2, 3, 4]] = table[2, [2, 3, 4, 5]] = 1
        table[3, 6] = table[4, 7] = table[5, 7] = 1
        assert chemistry.tanimoto(table[:3], table[:3])[0].tolist() == [1, 3 / 5, 2 / 6]
        assert chemistry.tanimoto_groups(table, 0.6).tolist() == [0, 0, 0, 1, 2, 2]
        assert chemistry.tanimoto_groups(table, 0.61).tolist() == [0, 1, 2, 3, 4, 4]
        assert chemistry.tanimoto_groups(table).tolist() == [0, 0, 0, 1, 2, 2]
        assert chemistry.tanimoto_groups(table, 1.0).dtype == np.int64

    @CHEAP
    @given(
        arrays(np.int8, (9, 8), elements=st.integers(0, 2)),
        st.sampled_from([0.2, 0.5, 0.6, 0.8, 1.0]),
        st.integers(1, 60),
    )
    def test_no_pair_across_groups_reaches_the_threshold(self, table, threshold, block) -> None:  # type: ignore[no-untyped-def]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chemistry, "BLOCK", block)
            groups = chemistry.tanimoto_groups(table, threshold)
        near = chemistry.tanimoto(table, table) >= threshold
        reach = np.linalg.matrix_power(near.astype(np.int64), len(table)) > 0
        np.testing.assert_array_equal(groups[:, None] == groups[None], reach)
        seen = list(dict.fromkeys(groups.tolist()))
        assert seen == list(range(len(seen)))

    def test_permutation_of_rows_permutes_the_groups(self) -> None:
        table = chemistry.morgan([IMATINIB, *DRUGS, METFORMIN])
        order = np.random.default_rng(0).permutation(len(table))
        there, back = chemistry.tanimoto_groups(table, 0.3), chemistry.tanimoto_groups(table[order], 0.3)
        same = there[:, None] == there
        np.testing.assert_array_equal(same[order][:, order], back[:, None] == back)
        assert there[0] == there[1]

    def test_no_rows(self) -> None:
        assert chemistry.tanimoto_groups(np.zeros((0, 4))).tolist() == []

    @pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
    def test_threshold_out_of_range(self, threshold: float) -> None:
        with pytest.raises(DataError, match="is not a similarity; expected a number above 0 and at most 1"):
            chemistry.tanimoto_groups(np.ones((2, 2)), threshold)

    def test_table_that_is_not_fingerprints(self) -> None:
        with pytest.raises(DataError, match=r"fingerprints: row 0, bit 1 is 0\.3"):
            chemistry.tanimoto_groups([[1, 0.3]])


class TestScaffolds:
    @pytest.mark.parametrize(
        ("smiles", "expected"),
        [
            ("CCO", ""),
            (METFORMIN, ""),
            ("CC(=O)Oc1ccccc1C(O)=O", "c1ccccc1"),
            ("CCc1ccc(CCc2ccccc2C)nc1", "c1ccc(CCc2ccccn2)cc1"),
            ("CC1CCCCC1=O", "O=C1CCCCC1"),
            ("Cl.C[C@H](N)C1CC1", "C1CC1"),
            ("CCCN.Cc1ccc(cc1)S(O)(=O)=O", ""),
        ],
    )
    def test_by_hand(self, smiles: str, expected: str) -> None:
        assert chemistry.scaffold(smiles) == (expected and Chem.CanonSmiles(expected))

    def test_stereoisomers_share_a_scaffold(self) -> None:
        cis, trans = "O[C@@H]1CCC[C@H]1c1ccccc1", "O[C@@H]1CCC[C@@H]1c1ccccc1"
        assert chemistry.canonical(cis) != chemistry.canonical(trans)
        assert chemistry.scaffold(cis) == chemistry.scaffold(trans)

    def test_groups_by_scaffold_and_acyclic_ones_by_parent(self) -> None:
        smiles = ["CCO", "Cc1ccccc1", "CCN", "Oc1ccccc1.Cl", "Cl.NCC", "CC1CC1", "OCC"]
        assert chemistry.scaffold_groups(smiles).tolist() == [0, 1, 2, 1, 2, 3, 0]

    def test_no_molecules(self) -> None:
        assert chemistry.scaffold_groups([]).tolist() == []


class TestSameCompound:
    def test_synonyms_and_salts(self) -> None:
        names = ["imatinib", "imatinib mesylate", "STI-571", "aspirin", "vinegar", "sodium acetate"]
        smiles = [
            IMATINIB,
            IMATINIB + ".CS(O)(=O)=O",
            rewritten(IMATINIB, 3),
            DRUGS[3],
            "CC(O)=O",
            "[Na+].CC([O-])=O",
        ]
        table = chemistry.same_compound(smiles, names)
        base = chemistry.canonical(IMATINIB)
        expected = pd.DataFrame(
            [
                ("sodium acetate", smiles[5], "CC(=O)O", False),
                ("vinegar", smiles[4], "CC(=O)O", False),
                ("STI-571", smiles[2], base, True),
                ("imatinib", smiles[0], base, True),
                ("imatinib mesylate", smiles[1], base, False),
            ],
            columns=["name", "smiles", "parent", "identical"],
        )
        pd.testing.assert_frame_equal(table, expected)

    def test_one_string_under_two_names(self) -> None:
        table = chemistry.same_compound(["CCO", "CC", "CCO"], ["train", "train", "held out"])
        assert table[["name", "identical"]].values.tolist() == [["held out", True], ["train", True]]

    def test_repeated_wells_of_one_drug_are_one_name(self) -> None:
        table = chemistry.same_compound(["CCO", "CCO", "OCC", "CC"], ["ethanol", "ethanol", "ethanol", "ethane"])
        assert table.empty
        assert list(table.columns) == ["name", "smiles", "parent", "identical"]
        assert table["identical"].dtype == bool

    def test_no_molecules(self) -> None:
        assert chemistry.same_compound([], []).empty

    def test_invalid_molecule_is_named(self) -> None:
        with pytest.raises(DataError, match="drug 'b': the SMILES '-666'"):
            chemistry.same_compound(["CC", "-666"], ["a", "b"])


class TestRealCompounds:
    def test_l1000_a375(self, data_folder: Path) -> None:
        wells = pd.read_csv(data_folder / "l1000_a375" / "obs.csv.gz")
        drugs = wells.dropna(subset=["smiles"]).drop_duplicates(["pert_iname", "smiles"])
        smiles, names = drugs["smiles"].tolist(), drugs["pert_iname"].tolist()
        assert len(set(smiles)) == 457
        table = chemistry.morgan(smiles, names=names)
        assert 10 < table.sum(axis=1).mean() < 100
        groups = chemistry.tanimoto_groups(table, 0.6)
        near = chemistry.tanimoto(table, table) >= 0.6
        assert (groups[:, None] == groups)[near].all()
        shared = chemistry.same_compound(smiles, names)
        assert shared["identical"].all()
        assert shared.groupby("parent")["name"].nunique().min() == 2

    def test_sciplex_salts(self, data_folder: Path) -> None:
        design = pd.read_csv(data_folder / "compounds" / "sciplex3_well_design_smiles.txt", sep="\t")
        drugs = design.dropna(subset=["SMILES"]).drop_duplicates(["name", "SMILES"])
        smiles = drugs["SMILES"].tolist()
        assert len(smiles) == 188
        salts = [text for text in smiles if "." in chemistry.canonical(text)]
        assert len(salts) == 29
        assert not any("." in chemistry.parent(text) for text in salts)
        names = drugs["name"].str.strip().tolist()
        parents = {name: chemistry.parent(text, name=name) for name, text in zip(names, smiles, strict=True)}
        assert parents["Mesna"] == chemistry.canonical("OS(=O)(=O)CCS")
        assert parents["Toremifene Citrate"] == chemistry.canonical("CN(C)CCOc1ccc(cc1)/C(=C(/CCCl)c1ccccc1)c1ccccc1")
        # written with an atom "*" that stands for nothing
        assert parents["Tranylcypromine (2-PCPA) HCl"] == chemistry.canonical("N[C@@H]1C[C@H]1c1ccccc1")
        shared = chemistry.same_compound(smiles, names)
        assert set(shared["name"]) == {
            "Divalproex Sodium",
            "Valproic acid sodium salt (Sodium valproate)",
            "ENMD-2076",
            "ENMD-2076 L-(+)-Tartaric acid",
        }
        assert not shared["identical"].any()

    def test_lincs_placeholders_are_the_only_unusable_strings(self, data_folder: Path) -> None:
        table = pd.read_csv(data_folder / "compounds" / "lincs_pert_info2_2020.tsv.gz", sep="\t")
        known = table["canonical_smiles"].dropna()
        sample = [*known.unique()[::20], "restricted"]
        assert [text for text in sample if not chemistry.is_smiles(text)] == ["restricted"]
        assert (known == "restricted").sum() == 16

    def test_pairs_of_salts_in_lincs(self, data_folder: Path) -> None:
        table = pd.read_csv(data_folder / "compounds" / "lincs_pert_info2_2020.tsv.gz", sep="\t")
        pairs = [("theophylline", "aminophylline"), ("physostigmine", "eserine"), ("debrisoquin", "debrisoquine")]
        by_name = table.dropna(subset=["canonical_smiles"]).groupby("pert_iname")["canonical_smiles"].first()
        for one, other in pairs:
            shared = chemistry.same_compound([by_name[one], by_name[other]], [one, other])
            assert set(shared["name"]) == {one, other}
        for one, other in combinations((pair[0] for pair in pairs), 2):
            assert chemistry.same_compound([by_name[one], by_name[other]], [one, other]).empty

"""Compounds as numbers: fingerprints, descriptors, similarity, scaffolds and salt-free parents of SMILES strings.

Every function reads SMILES in the same way: the text, without surrounding blanks, is one SMILES, optionally followed
by one ``|...|`` block of CXSMILES. Any other trailing text is an error, because RDKit would take it for a title, so
that ``"N A"`` would pass for ammonia. Atom maps are labels and are dropped; isotopes and stereochemistry are kept.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyro_scm.errors import DataError, listing

__all__ = [
    "bounded_descriptors",
    "canonical",
    "descriptors",
    "is_smiles",
    "morgan",
    "parent",
    "same_compound",
    "scaffold",
    "scaffold_groups",
    "tanimoto",
    "tanimoto_groups",
]

T = TypeVar("T")

LONGEST = 2000
"""Characters of the longest SMILES that is read; the longest of 28,574 LINCS compounds has 454."""

BLOCK = 2**23
"""Entries of the largest table that a block of similarities needs: 64 MiB of float64."""

_LAYOUT = re.compile(r"\S+(?:[ \t]+\|[^|]*\|)?")

# Metals of groups 1 and 2 are counter-ions; every other metal (platinum, gold, mercury, tin ...) is the active part of
# its complex, which must not be taken apart.
_COUNTER_METALS = "Li,Na,K,Rb,Cs,Be,Mg,Ca,Sr,Ba"
_NOT_METALS = "*,H,He,B,C,N,O,F,Ne,Si,P,S,Cl,Ar,Ge,As,Se,Br,Kr,Te,I,Xe,At,Rn"

# Organic counter-ions that may be larger than the drug they come with (hydroxyzine has 26 heavy atoms, its pamoate 29),
# so that "the largest fragment" alone would give all their salts one parent.
_COUNTER_IONS = {
    "acetic": "CC(O)=O",
    "adipic": "OC(=O)CCCCC(O)=O",
    "benzathine": "C(CNCc1ccccc1)NCc1ccccc1",
    "benzenesulfonic": "OS(=O)(=O)c1ccccc1",
    "benzoic": "OC(=O)c1ccccc1",
    "camphorsulfonic": "CC1(C)C2CCC1(CS(O)(=O)=O)C(=O)C2",
    "citric": "OC(=O)CC(O)(CC(O)=O)C(O)=O",
    "dicyclohexylamine": "C1CCC(CC1)NC1CCCCC1",
    "dodecyl sulfuric": "CCCCCCCCCCCCOS(O)(=O)=O",
    "ethanedisulfonic": "OS(=O)(=O)CCS(O)(=O)=O",
    "ethanesulfonic": "CCS(O)(=O)=O",
    "fumaric or maleic": "OC(=O)C=CC(O)=O",
    "gluconic": "OCC(O)C(O)C(O)C(O)C(O)=O",
    "glutaric": "OC(=O)CCCC(O)=O",
    "glycolic": "OCC(O)=O",
    "hydroxynaphthoic": "OC(=O)c1ccc2ccccc2c1O",
    "lactic": "CC(O)C(O)=O",
    "lactobionic": "OCC(O)C(OC1OC(CO)C(O)C(O)C1O)C(O)C(O)C(O)=O",
    "malic": "OC(CC(O)=O)C(O)=O",
    "malonic": "OC(=O)CC(O)=O",
    "mandelic": "OC(C(O)=O)c1ccccc1",
    "meglumine": "CNCC(O)C(O)C(O)C(O)CO",
    "methanesulfonic": "CS(O)(=O)=O",
    "naphthalenedisulfonic": "OS(=O)(=O)c1cccc2c(cccc12)S(O)(=O)=O",
    "naphthalenesulfonic": "OS(=O)(=O)c1ccc2ccccc2c1",
    "oleic": "CCCCCCCCC=CCCCCCCCC(O)=O",
    "oxalic": "OC(=O)C(O)=O",
    "palmitic": "CCCCCCCCCCCCCCCC(O)=O",
    "pamoic": "OC(=O)c1cc2ccccc2c(Cc2c(O)c(cc3ccccc23)C(O)=O)c1O",
    "stearic": "CCCCCCCCCCCCCCCCCC(O)=O",
    "succinic": "OC(=O)CCC(O)=O",
    "tartaric": "OC(C(O)C(O)=O)C(O)=O",
    "toluenesulfonic": "Cc1ccc(cc1)S(O)(=O)=O",
    "trifluoroacetic": "OC(=O)C(F)(F)F",
    "trifluoromethanesulfonic": "OS(=O)(=O)C(F)(F)F",
    "tromethamine": "NC(CO)(CO)CO",
}


def is_smiles(text: object) -> bool:
    """Whether `text` is a SMILES string that `canonical` reads.

    Args:
        text: anything; what is not a string (None, nan) is not a SMILES.

    Returns:
        True for a molecule of one atom or more.
    """
    try:
        _computed(text, "text", _smiles_of)
    except DataError:
        return False
    return True


def canonical(smiles: str, *, name: str | None = None) -> str:
    """Canonical isomeric SMILES of a molecule: one string for all ways of writing it.

    Args:
        smiles: the molecule, salts included.
        name: of the drug, for the message.

    Returns:
        The same string for the same atoms, bonds, charges, isotopes and stereochemistry. Tautomers differ.

    Raises:
        DataError: a string that is no molecule; names the drug and the string.
    """
    return _computed(smiles, _label(name), _smiles_of)


def parent(smiles: str, *, name: str | None = None) -> str:
    """Canonical SMILES of the neutralised, largest organic fragment that is not a known counter-ion.

    Two salts or solvates of a compound share a parent. Bonds to metals of groups 1 and 2 count as ionic. A string with
    another metal (oxaliplatin), and one without any carbon (lithium chloride), is its own parent. A counter-ion such
    as pamoate is dropped even where it is larger than the drug, unless nothing else is left. S(+)-O(-) and
    P(+)-O(-) are written with a double bond. Tautomers and stereoisomers keep different parents. Of two drugs in one
    string (dimenhydrinate) the larger is taken.

    Args:
        smiles: the molecule.
        name: of the drug, for the message.

    Returns:
        A canonical isomeric SMILES; charged only where no hydrogen can be moved (quaternary nitrogen).

    Raises:
        DataError: a string that is no molecule; names the drug and the string.
    """
    return _computed(smiles, _label(name), lambda mol: _smiles_of(_parent_of(mol)))


def scaffold(smiles: str, *, name: str | None = None) -> str:
    """Bemis-Murcko scaffold of the parent: rings, the chains between them, and atoms double-bonded to either.

    Stereochemistry is left out, so that the stereoisomers of a compound share a scaffold, and so do its salts, because
    the scaffold is that of the parent (Bemis and Murcko, J. Med. Chem. 39, 2887, 1996, as RDKit has it).

    Args:
        smiles: the molecule.
        name: of the drug, for the message.

    Returns:
        Canonical SMILES without stereochemistry; ``""`` for an acyclic molecule.

    Raises:
        DataError: a string that is no molecule; names the drug and the string.
    """
    return _computed(smiles, _label(name), lambda mol: _scaffold_of(_parent_of(mol)))


def morgan(
    smiles: Sequence[str],
    *,
    radius: int = 2,
    bits: int = 1024,
    counts: bool = False,
    chirality: bool = False,
    names: Sequence[str] | None = None,
    desalt: bool = False,
) -> NDArray[np.float32]:
    """Morgan fingerprints: circular neighbourhoods of every atom, hashed into `bits` positions.

    Rogers and Hahn, J. Chem. Inf. Model. 50, 742 (2010); radius 2 corresponds to ECFP4.

    Args:
        smiles: n molecules; each distinct string is computed once.
        radius: bonds from the central atom to the edge of the largest neighbourhood, 0 or more.
        bits: length of the fingerprint, 1 or more.
        counts: number of neighbourhoods per position instead of 0 or 1.
        chirality: tell enantiomers apart.
        names: n names of drugs, for messages; without them a message gives the row, counted from 0.
        desalt: take the fingerprint of the `parent`.

    Returns:
        Table [n, bits]; row i is molecule i.

    Raises:
        DataError: a string that is no molecule, a wrong number of names, or a radius or length out of range.
    """
    from rdkit.Chem import rdFingerprintGenerator

    _whole("radius", radius, 0)
    _whole("bits", bits, 1)
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=bits, includeChirality=chirality)
    write = generator.GetCountFingerprintAsNumPy if counts else generator.GetFingerprintAsNumPy

    def fingerprint(mol: Any) -> NDArray[np.float32]:
        return np.asarray(write(_parent_of(mol) if desalt else mol), dtype=np.float32)

    rows = _each(smiles, names, fingerprint)
    return np.stack(rows) if rows else np.zeros((0, bits), dtype=np.float32)


def descriptors(smiles: Sequence[str], names: Sequence[str] | None = None) -> tuple[NDArray[np.float32], list[str]]:
    """RDKit's 2-D descriptors, standardised: column j is (v_j - mean_j) / std_j over the n rows.

    The mean and standard deviation (divisor n) are those of the molecules given, so molecules that are to be compared,
    such as training and held-out drugs, belong in one call. A column that is constant, or not finite for one of the
    molecules, is dropped.

    Args:
        smiles: n molecules, two different ones at least; each distinct string is computed once.
        names: n names of drugs, for messages.

    Returns:
        Table [n, k] and the k names of its columns, in RDKit's order.

    Raises:
        DataError: a string that is no molecule, a wrong number of names, or fewer than two different molecules.
    """
    from rdkit.Chem import Descriptors

    rows = _each(smiles, names, lambda mol: (_smiles_of(mol), Descriptors.CalcMolDescriptors(mol)))
    different = len({text for text, _ in rows})
    if different < 2:
        raise DataError(
            f"descriptors: {len(rows)} SMILES of {different} different molecules cannot be standardised; "
            "give two different molecules or more"
        )
    columns = list(rows[0][1])
    values = np.array([[row[column] for column in columns] for _, row in rows], dtype=np.float64)
    finite = np.isfinite(values).all(axis=0)
    # Ipc, an information content, reaches 1e30 and more: scaled first, its square stays in range
    largest = np.abs(values).max(axis=0, initial=np.finfo(np.float64).tiny)
    scaled = np.divide(values, largest, out=np.zeros_like(values), where=finite)
    kept = np.ptp(scaled, axis=0) > 1e-12
    scaled = scaled[:, kept]
    scaled = (scaled - scaled.mean(axis=0)) / scaled.std(axis=0)
    return scaled.astype(np.float32), [column for column, keep in zip(columns, kept, strict=True) if keep]


def bounded_descriptors(
    smiles: Sequence[str], names: Sequence[str] | None = None
) -> tuple[NDArray[np.float32], list[str]]:
    """RDKit's 2-D descriptors, each as asinh(v) / 4 within -3 and 3, 0 where it is not finite.

    A function of the molecule alone, unlike `descriptors`: a molecule that comes later, or from another data set, is
    described by the same numbers.

    Args:
        smiles: n molecules; each distinct string is computed once.
        names: n names of drugs, for messages.

    Returns:
        Table [n, k] and the k names of its columns, in RDKit's order.

    Raises:
        DataError: a string that is no molecule, or a wrong number of names.
    """
    from rdkit.Chem import Descriptors

    columns = [name for name, _ in Descriptors.descList]
    rows = _each(smiles, names, Descriptors.CalcMolDescriptors) if len(smiles) else []
    values = np.array([[row[column] for column in columns] for row in rows], dtype=np.float64)
    bounded = np.clip(np.arcsinh(np.nan_to_num(values, posinf=0, neginf=0)) / 4, -3, 3)
    return bounded.reshape(len(rows), len(columns)).astype(np.float32), columns


def tanimoto(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Similarity s_ij = sum_k min(a_ik, b_jk) / sum_k max(a_ik, b_jk) of two sets of fingerprints.

    For fingerprints of 0 and 1 this is the number of shared bits over the number of bits set in either. Two all-zero
    fingerprints do not differ: their similarity is 1 (RDKit's TanimotoSimilarity gives 0 there).

    Args:
        a: [n, bits] of whole numbers, 0 or more.
        b: [m, bits] of whole numbers, 0 or more.

    Returns:
        Table [n, m] in [0, 1]; memory beyond the result and two tables of the size of b is bounded by `BLOCK`.

    Raises:
        DataError: not two tables of equal width, or entries that are not whole numbers of 0 or more.
    """
    left, right = _fingerprints("a", a), _fingerprints("b", b)
    if left.shape[1] != right.shape[1]:
        raise DataError(
            f"a has {left.shape[1]} and b has {right.shape[1]} bits; expected fingerprints of one length: "
            "compute both with the same `bits`"
        )
    result = np.empty((len(left), len(right)))
    for rows in _blocks(len(left), max(right.shape)):
        result[rows] = _similarity(left[rows], right)
    return result


def tanimoto_groups(fingerprints: ArrayLike, threshold: float = 0.6) -> NDArray[np.int64]:
    """Connected components of the graph of molecules with an edge where Tanimoto similarity >= threshold.

    This is single linkage: no pair of molecules in different groups reaches the threshold, so a split by groups keeps
    close analogues on one side. Members of one group may be less similar than the threshold, through a chain.

    Args:
        fingerprints: [n, bits] of whole numbers, 0 or more.
        threshold: in (0, 1].

    Returns:
        Number of the group of each row [n]; groups are numbered from 0 in order of first appearance.

    Raises:
        DataError: entries that are not whole numbers of 0 or more, or a threshold outside (0, 1].
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not 0 < threshold <= 1:
        raise DataError(f"threshold {threshold!r} is not a similarity; expected a number above 0 and at most 1")
    table = _fingerprints("fingerprints", fingerprints)
    n = len(table)
    group: NDArray[np.integer[Any]] = np.arange(n)
    for rows in _blocks(n, max(table.shape)):
        # edges of one block at a time, between the groups found so far: the whole graph may not fit into memory
        near = _similarity(table[rows], table[rows.start :]) >= threshold
        i, j = np.nonzero(near)
        ends = group[i + rows.start], group[j + rows.start]
        graph = coo_array((np.ones(len(i), dtype=np.int8), ends), shape=(n, n))
        group = connected_components(graph, directed=False)[1][group]
    return _numbered(group.tolist())


def scaffold_groups(smiles: Sequence[str], names: Sequence[str] | None = None) -> NDArray[np.int64]:
    """Groups of molecules with one Bemis-Murcko scaffold; an acyclic molecule is in the group of its own parent.

    Args:
        smiles: n molecules; each distinct string is computed once.
        names: n names of drugs, for messages.

    Returns:
        Number of the group of each row [n]; groups are numbered from 0 in order of first appearance.

    Raises:
        DataError: a string that is no molecule, or a wrong number of names.
    """

    def key(mol: Any) -> str:
        base = _parent_of(mol)
        return _scaffold_of(base) or _smiles_of(base)

    return _numbered(_each(smiles, names, key))


def same_compound(smiles: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    """Names that share a parent with another name: synonyms, and different salts of one compound.

    Two of these names in a training and a held-out environment mean that the held-out compound was seen in training.

    Args:
        smiles: n molecules.
        names: n names of drugs or environments; repeated pairs of name and string count once.

    Returns:
        Table with columns name, smiles (as given), parent, identical (True where another name of the same parent has
        the same canonical SMILES, False where the others are only different salts); sorted by parent, then name. It has
        no rows where all names are different compounds.

    Raises:
        DataError: a string that is no molecule, or a wrong number of names.
    """
    forms = _each(smiles, names, lambda mol: (_smiles_of(_parent_of(mol)), _smiles_of(mol)))
    table = pd.DataFrame(
        {
            "name": list(names),
            "smiles": list(smiles),
            "parent": [form[0] for form in forms],
            "canonical": [form[1] for form in forms],
        }
    ).drop_duplicates(["name", "smiles"])
    shared = table.groupby("parent")["name"].transform("nunique") > 1
    table["identical"] = table.groupby("canonical")["name"].transform("nunique") > 1
    table = table.loc[shared, ["name", "smiles", "parent", "identical"]]
    return table.sort_values(["parent", "name", "smiles"], ignore_index=True).astype({"identical": bool})


def _label(name: str | None) -> str:
    """How a message calls a compound."""
    return "a drug without a name" if name is None else f"drug {name!r}"


def _refusal(text: object) -> str | None:
    """Why `text` is not worth reading as SMILES, or None."""
    if not isinstance(text, str):
        return f"is of type {type(text).__name__}, not a string"
    stripped = text.strip()
    if not stripped:
        return "is empty"
    if len(text) > LONGEST:
        return f"has {len(text)} characters, more than {LONGEST}"
    if not (stripped.replace("\t", " ").isascii() and stripped.replace("\t", " ").isprintable()):
        return "holds characters that are not printable ASCII"
    if _LAYOUT.fullmatch(stripped) is None:
        return "holds text after a blank that is not a |...| block"
    return None


def _molecule(text: object, label: str) -> Any:
    """The RDKit molecule of a string, without atom maps.

    Args:
        text: what should be a SMILES.
        label: how a message calls the compound.

    Returns:
        A sanitised rdkit.Chem.Mol of one atom or more.

    Raises:
        DataError: names the label, the text and what is wrong with it.
    """
    from rdkit import Chem

    reason = _refusal(text)
    if reason is None:
        mol = Chem.MolFromSmiles(str(text).strip())
        if mol is not None and any(atom.GetAtomicNum() for atom in mol.GetAtoms()):
            for atom in mol.GetAtoms():
                atom.SetAtomMapNum(0)
            return mol
        reason = "is not a molecule that RDKit can read" if mol is None else "has no atom"
    raise DataError(
        f"{label}: the SMILES {_shown(text)} {reason}; expected one molecule, such as 'CC(=O)O': "
        "correct the string or leave this drug out"
    )


def _shown(text: object) -> str:
    """The text as a message quotes it, cut to 80 characters."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else quoted[:77] + "..."


def _computed(text: object, label: str, compute: Callable[[Any], T]) -> T:
    """The value of `compute` for the molecule of one string, without RDKit's own lines in the log.

    Args:
        text: what should be a SMILES.
        label: how a message calls the compound.
        compute: function of an RDKit molecule.

    Returns:
        The value.

    Raises:
        DataError: a string that is no molecule, or a molecule that RDKit reads but cannot write or standardise.
    """
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        mol = _molecule(text, label)
        try:
            return compute(mol)
        except Chem.MolSanitizeException as error:
            raise DataError(
                f"{label}: RDKit reads the SMILES {_shown(text)} but cannot handle the molecule ({error}); "
                "expected aromatic rings and valences that hold together: correct the string or leave this drug out"
            ) from error


def _each(smiles: Sequence[str], names: Sequence[str] | None, compute: Callable[[Any], T]) -> list[T]:
    """The value of `compute` for the molecule of each row, computed once per distinct string.

    Args:
        smiles: n strings.
        names: n names, or None, where messages give the row.
        compute: function of an RDKit molecule.

    Returns:
        n values; rows with one string share one object.

    Raises:
        DataError: the message of the first unusable row, followed by the other unusable rows.
    """
    if isinstance(smiles, str):
        raise DataError(f"smiles is the one string {_shown(smiles)}; expected a sequence of SMILES: put it in a list")
    texts = list(smiles)
    if names is not None and (isinstance(names, str) or len(names) != len(texts)):
        given = f"the one string {names!r}" if isinstance(names, str) else str(len(names))
        raise DataError(f"names: {given} for {len(texts)} SMILES; expected one name per SMILES, in the same order")
    labels = [f"row {i}" for i in range(len(texts))] if names is None else [_label(str(name)) for name in names]
    values: dict[str, T] = {}
    wrong: list[str] = []
    message = ""
    for text, label in zip(texts, labels, strict=True):
        if isinstance(text, str) and text in values:
            continue
        try:
            values[text] = _computed(text, label, compute)
        except DataError as error:
            wrong.append(label)
            message = message or str(error)
    if wrong:
        others = f"; {len(wrong) - 1} more cannot be used: {listing(wrong[1:])}" if len(wrong) > 1 else ""
        raise DataError(message + others)
    return [values[text] for text in texts]


def _smiles_of(mol: Any) -> str:
    """Canonical isomeric SMILES of an RDKit molecule."""
    from rdkit import Chem

    return str(Chem.MolToSmiles(mol))


@cache
def _standardisers() -> tuple[Any, Any, Any]:
    """The metal disconnector, pattern of charged oxides and uncharger, which take longer to build than to apply."""
    from rdkit import Chem
    from rdkit.Chem.MolStandardize import rdMolStandardize

    disconnector = rdMolStandardize.MetalDisconnector()
    disconnector.SetMetalNof(Chem.MolFromSmarts(f"[{_COUNTER_METALS}]~[#7,#8,#9,#16,#17,#35,#53]"))
    # `force`: carnitine hydrochloride and the carnitine zwitterion have one parent only if the acid of both is
    # protonated although the quaternary nitrogen stays charged
    uncharger = rdMolStandardize.Uncharger(canonicalOrder=True, force=True)
    return disconnector, Chem.MolFromSmarts("[#15,#16;+1,+2]-[O-;X1]"), uncharger


@cache
def _counter_ions() -> frozenset[str]:
    """Canonical SMILES, without stereochemistry, of the organic counter-ions."""
    from rdkit import Chem

    return frozenset(Chem.MolToSmiles(Chem.MolFromSmiles(text)) for text in _COUNTER_IONS.values())


def _parent_of(mol: Any) -> Any:
    """The parent of an RDKit molecule, as an RDKit molecule; see `parent`."""
    from rdkit import Chem

    symbols = {atom.GetSymbol() for atom in mol.GetAtoms()}
    separable = {*_NOT_METALS.split(","), *_COUNTER_METALS.split(",")}
    if "C" not in symbols or not symbols <= separable:
        return mol
    disconnector, charged_oxide, uncharger = _standardisers()
    parts = Chem.GetMolFrags(_oxides(disconnector.Disconnect(mol), charged_oxide), asMols=True)
    organic = [part for part in parts if any(atom.GetAtomicNum() == 6 for atom in part.GetAtoms())]
    neutral = [uncharger.uncharge(part) for part in organic]
    drugs = [part for part in neutral if Chem.MolToSmiles(part, isomericSmiles=False) not in _counter_ions()]
    chosen = max(drugs or neutral, key=_size)
    # read back, so that aromaticity and stereochemistry are those of the changed bonds and charges; where a charge
    # holds a valence together (a hexavalent phosphorus), the molecule stays as it is
    return Chem.MolFromSmiles(_smiles_of(chosen)) or mol


def _oxides(mol: Any, charged_oxide: Any) -> Any:
    """The molecule with S(+)-O(-) and P(+)-O(-) written as S=O and P=O.

    RDKit's Normalizer writes sulphoxides the other way round, unlike most databases, so that the parent of a compound
    without salt would have another fingerprint than the compound.
    """
    from rdkit import Chem

    pairs = mol.GetSubstructMatches(charged_oxide)
    if not pairs:
        return mol
    editable = Chem.RWMol(mol)
    for centre, oxygen in pairs:
        for atom, change in ((editable.GetAtomWithIdx(centre), -1), (editable.GetAtomWithIdx(oxygen), 1)):
            atom.SetFormalCharge(atom.GetFormalCharge() + change)
        editable.GetBondBetweenAtoms(centre, oxygen).SetBondType(Chem.BondType.DOUBLE)
    return editable.GetMol()


def _size(mol: Any) -> tuple[int, float, str]:
    """Order of fragments: heavy atoms, then weight, then SMILES, so that the order in the string does not matter."""
    from rdkit.Chem import rdMolDescriptors

    return mol.GetNumHeavyAtoms(), round(rdMolDescriptors.CalcExactMolWt(mol), 3), _smiles_of(mol)


def _scaffold_of(base: Any) -> str:
    """Bemis-Murcko scaffold of an RDKit molecule, without stereochemistry."""
    from rdkit import Chem
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return str(Chem.MolToSmiles(MurckoScaffold.GetScaffoldForMol(base), isomericSmiles=False))


def _numbered(keys: Sequence[object]) -> NDArray[np.int64]:
    """Keys replaced by whole numbers, from 0 in order of first appearance."""
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys], dtype=np.int64)


def _whole(what: str, value: int, least: int) -> None:
    """Check a whole number against its lower limit."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise DataError(f"{what} {value!r} is out of range; expected a whole number of {least} or more")


def _fingerprints(what: str, table: ArrayLike) -> NDArray[np.float32]:
    """A table of fingerprints as float32, checked.

    Args:
        what: how a message calls it.
        table: [n, bits].

    Returns:
        Table [n, bits] of whole numbers, 0 or more.

    Raises:
        DataError: not a table, or the first entry that is not a whole number of 0 or more.
    """
    values = np.asarray(table)
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise DataError(
            f"{what} is an array of shape {values.shape} and type {values.dtype}; "
            "expected fingerprints [molecules, bits], such as those of `morgan`"
        )
    if values.dtype.kind == "b":
        return values.astype(np.float32)
    # sums of more than 2^24 would no longer be exact in float32
    wrong = ~((values >= 0) & (values < 2**24) & (values == np.floor(values)))
    if wrong.any():
        row, bit = np.argwhere(wrong)[0]
        raise DataError(
            f"{what}: row {row}, bit {bit} is {values[row, bit]}; expected whole numbers from 0 to 2^24: "
            "give fingerprints or counts, not scaled features"
        )
    return values.astype(np.float32)


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Slices of n rows such that a block of rows times `width` stays below `BLOCK` entries."""
    step = max(1, BLOCK // max(1, width))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Tanimoto similarity [n, m] of checked tables, with sum of maxima = sum(a) + sum(b) - sum of minima."""
    smaller = _sum_of_minima(a, b)
    larger = a.sum(axis=1, dtype=np.float64)[:, None] + b.sum(axis=1, dtype=np.float64)[None, :] - smaller
    result = np.ones_like(smaller)
    np.divide(smaller, larger, out=result, where=larger > 0)
    return result


def _sum_of_minima(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """sum_k min(a_ik, b_jk) = sum_l (v_l - v_{l-1}) sum_k [a_ik >= v_l] [b_jk >= v_l] over the distinct values v_l.

    One product of matrices per distinct count, over the columns that reach it in both tables: a fingerprint of bits has
    one, and the high counts of a molecule lie in few columns. Products of 0 and 1 are exact in float32.
    """
    total = np.zeros((len(a), len(b)))
    top = np.minimum(a.max(axis=0, initial=0), b.max(axis=0, initial=0))
    values = np.union1d(a[a > 0], b[b > 0])
    lower = 0.0
    for value in values[values <= top.max(initial=0)].tolist():
        columns = top >= value
        left, right = a[:, columns] >= value, b[:, columns] >= value
        total += (value - lower) * (left.astype(np.float32) @ right.astype(np.float32).T)
        lower = value
    return total

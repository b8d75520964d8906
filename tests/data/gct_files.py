"""A plate as GCT and GCTX files, and the public plates of one cell line."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

GENES = ["5720", "466", "6009"]
SAMPLES = ["P1:A01", "P1:A02", "P1:A03", "P1:A04"]
# genes x samples, as a GCT holds them; all exact in float32
VALUES = np.array([[1.5, -2.0, 3.25, 0.0], [8.0, 9.5, 10.0, 11.75], [0.5, 0.25, 0.125, 4.0]], np.float32)
GCT = """#1.3
3\t4\t2\t6
id\tpr_gene_symbol\tpr_is_lmark\tP1:A01\tP1:A02\tP1:A03\tP1:A04
pert_iname\tna\tna\tDMSO\tDMSO\tdrug A\t89671
pert_type\tna\tna\tctl_vehicle\tctl_vehicle\ttrt_cp\ttrt_cp
pert_dose\tna\tna\t-666\t-666\t10\t500
pert_dose_unit\tna\tna\t-666\t-666\tum\tnM
qc_slope\tna\tna\t58\t57\t-666\t60.5
canonical_smiles\tna\tna\t-666\trestricted\t\tCCO
5720\tPSME1\t1\t1.5\t-2\t3.25\t0
466\tATF1\t1\t8\t9.5\t10.0\t11.75
6009\tRHEB\t0\t.5\t0.25\t1.25e-1\t4
"""


def write_gct(folder: Path, text: str = GCT, name: str = "plate_level3.gct") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def write_gctx(
    folder: Path,
    values: Any = VALUES,
    genes: Any = GENES,
    samples: Any = SAMPLES,
    row: dict[str, Any] | None = None,
    column: dict[str, Any] | None = None,
    chunks: tuple[int, int] | None = None,
    name: str = "plate.gctx",
) -> Path:
    """A GCTX file: the matrix is stored samples x genes, strings as bytes."""
    path = folder / name
    with h5py.File(path, "w") as file:
        file.attrs["version"] = "GCTX1.0"
        file.create_dataset("0/DATA/0/matrix", data=np.asarray(values).T, chunks=chunks)
        for group, ids, extra in (("ROW", genes, row), ("COL", samples, column)):
            for key, items in {"id": ids, **(extra or {})}.items():
                array = np.asarray(items)
                file[f"0/META/{group}/{key}"] = np.char.encode(array, "utf-8") if array.dtype.kind == "U" else array
    return path


A375 = (
    ("LJP005_A375_24H_X1", "LJP005_A375_24H_X1_level3.gct"),
    ("LJP009_A375_24H_X1", "LJP009_A375_24H_X1_level3_qnorm.gct"),
    ("CPC006_A375_6H_X1", "CPC006_A375_6H_X1_level3.gctx"),
)

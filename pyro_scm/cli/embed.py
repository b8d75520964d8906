"""`pyro-scm embed`: latent coordinates of cells."""

from argparse import Namespace

from pyro_scm.cli.outputs import claim, remark, write_h5ad
from pyro_scm.cli.parsing import Verbs, add_verb, path
from pyro_scm.cli.runs import add_run_options, cells_for, load_run

__all__ = ["add"]

DESCRIPTION = """\
Add each cell's latent coordinates to the file, for plots, clustering and distances.

Writes a copy of the data with obsm 'z' (the noise: what is particular to the cell and its environment) and obsm 'c'
(the causal variables, which the genes are made from), posterior means, [cells, D]. They are those of the best member of
the ensemble, the one with the lowest loss: the latents of different members differ in order, sign and scale, so an
average over members would mean nothing. --all-members adds every member's as 'z_all' and 'c_all', [cells, members, D].
Entries 'z' and 'c' that the file has already (the truth of a simulation, say) are kept as 'z_before' and 'c_before'.
"""

EXAMPLES = """\
  pyro-scm simulate --out sim.h5ad
  pyro-scm fit sim.h5ad --model environment_vae --environment perturbation --control control --latent 5 --epochs 30 \
--out run
  pyro-scm embed run sim.h5ad --out embedded.h5ad
  pyro-scm embed run sim.h5ad --all-members --out embedded.h5ad
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "embed",
        run,
        summary="latent coordinates of cells",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add_run_options(parser)
    parser.add_argument("--all-members", action="store_true", help="also write every member's, as 'z_all' and 'c_all'")
    parser.add_argument("--out", metavar="FILE.h5ad", type=path, required=True, help="file to write")


def run(args: Namespace) -> None:
    """Embed and write."""
    out = claim(args.out, ".h5ad", [args.data])
    import pyro_scm
    from pyro_scm.data.stored import StoredCells

    fitted, memory = load_run(args.folder, args.model)
    adata, cells = cells_for(fitted, memory, args)
    found = pyro_scm.embed(fitted, cells)
    if isinstance(adata, StoredCells):
        adata = adata.annotation()
        remark(args, "note: expression stays where it is; the file that is written holds obs, var, obsm and uns")
    for name in ("z", "c"):
        if name in adata.obsm:
            adata.obsm[f"{name}_before"] = adata.obsm[name]
        adata.obsm[name] = found[name][fitted.best]
        if args.all_members:
            adata.obsm[f"{name}_all"] = found[name].swapaxes(0, 1)
    write_h5ad(adata, out)
    remark(
        args,
        f"{out}: obsm 'z' and 'c' of {len(cells)} cells, {found['z'].shape[2]} latents, of the best of {len(fitted)} "
        f"members (seed {fitted.seeds[fitted.best]})",
    )

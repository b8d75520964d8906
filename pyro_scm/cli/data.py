"""`pyro-scm data`: public data sets."""

from argparse import Namespace

from pyro_scm.cli.outputs import claim_folder, columns
from pyro_scm.cli.parsing import Formatter, Verbs, add_general, add_verb, path

__all__ = ["add"]

DESCRIPTION = """\
List public data sets, or fetch one into a folder.

Files are checked against the checksums that their source publishes. An interrupted transfer goes on where it stopped
when the command is run again. The L1000 matrices are large (5 to 50 GB); --match chooses single files.
"""

EXAMPLES = """\
  pyro-scm data list
  pyro-scm data get l1000-phase2 --match "*info*" --out l1000
"""


def add(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs,
        "data",
        run_list,
        summary="list public data sets, or fetch one",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    shown = actions.add_parser(
        "list",
        help="list the data sets and their files",
        description="List the data sets that can be fetched, their files, and sizes in MB where they are known.",
        epilog="examples:\n  pyro-scm data list\n",
        formatter_class=Formatter,
    )
    shown.set_defaults(run_verb=run_list)
    fetched = actions.add_parser(
        "get",
        help="fetch a data set",
        description="Fetch a data set into a folder: resumed after an interruption, checked against its checksums.",
        epilog='examples:\n  pyro-scm data get l1000-phase2 --match "*info*" --out l1000\n',
        formatter_class=Formatter,
    )
    fetched.set_defaults(run_verb=run_get, interrupted=interrupted)
    fetched.add_argument("name", metavar="NAME", help="of the data set, as `pyro-scm data list` shows it")
    fetched.add_argument("--out", metavar="DIR", type=path, required=True, help="folder to put the files into")
    fetched.add_argument("--match", metavar="PATTERN", default="*", help="only files whose names match, such as *info*")
    for action in (shown, fetched):
        add_general(action)


def run_list(args: Namespace) -> None:
    """Print the catalogue."""
    from pyro_scm.data.download import CATALOGUE

    for source in CATALOGUE.values():
        print(f"{source.name}: {source.description}")
        print(columns([(f"  {f.name}", f"{f.size / 1e6:,.1f} MB" if f.size else "size unknown") for f in source.files]))


def run_get(args: Namespace) -> None:
    """Fetch, and print where the files are."""
    from pyro_scm.data.download import get

    folder = claim_folder(args.out)
    for file in get(args.name, folder, progress=not args.quiet, match=args.match):
        print(file)


def interrupted(args: Namespace) -> str:
    """What an interrupted transfer leaves behind."""
    return f"; what has arrived is kept in {args.out} as *.part: run the same command again to go on"

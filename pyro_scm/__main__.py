"""`python -m pyro_scm` is `pyro-scm`."""

import sys

from pyro_scm.cli import main

if __name__ == "__main__":
    sys.exit(main())

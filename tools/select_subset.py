"""``lotus select`` as a file, for launchers: ``python tools/select_subset.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["select", *sys.argv[1:]]))

"""``lotus select`` as a file, for launchers: ``python tools/select_subset.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["select", *sys.argv[1:]])

"""``lotus prune`` as a file, for launchers: ``python tools/prune.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["prune", *sys.argv[1:]])

"""``lotus patches`` as a file, for launchers: ``python tools/patches.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["patches", *sys.argv[1:]])

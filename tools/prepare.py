"""``lotus prepare`` as a file, for launchers: ``python tools/prepare.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["prepare", *sys.argv[1:]])

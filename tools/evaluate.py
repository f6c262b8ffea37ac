"""``lotus evaluate`` as a file, for launchers: ``python tools/evaluate.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["evaluate", *sys.argv[1:]])

"""``lotus run`` as a file, for launchers: ``python tools/run.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["run", *sys.argv[1:]])

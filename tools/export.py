"""``lotus export`` as a file, for launchers: ``python tools/export.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["export", *sys.argv[1:]])

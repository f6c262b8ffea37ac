"""``lotus score`` as a file, for launchers: ``python tools/score.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["score", *sys.argv[1:]])

"""``lotus train`` as a file, for launchers: ``python tools/train.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])

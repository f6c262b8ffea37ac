"""``lotus train`` as a file, for launchers: ``python tools/train.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

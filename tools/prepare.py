"""``lotus prepare`` as a file, for launchers: ``python tools/prepare.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))

"""``lotus evaluate`` as a file, for launchers: ``python tools/evaluate.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

"""``lotus prune`` as a file, for launchers: ``python tools/prune.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))

"""``lotus patches`` as a file, for launchers: ``python tools/patches.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["patches", *sys.argv[1:]]))

"""``lotus export`` as a file, for launchers: ``python tools/export.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))

"""``lotus score`` as a file, for launchers: ``python tools/score.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))

"""``lotus run`` as a file, for launchers: ``python tools/run.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))

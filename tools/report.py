"""``lotus report`` as a file, for launchers: ``python tools/report.py ...``."""

import sys

from lotus.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))

"""``lotus report`` as a file, for launchers: ``python tools/report.py ...``."""

import sys

from lotus.cli import program

if __name__ == "__main__":
    program(["report", *sys.argv[1:]])

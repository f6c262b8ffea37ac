"""``python -m lotus``."""

from lotus.cli import program

if __name__ == "__main__":
    program()

"""A whole run from Python: what `lotus run` does with a config, stage by stage, on scikit-learn's digits.

    python examples/whole_run.py

A run is a folder. The second time every stage is done, and nothing is trained again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lotus import config, events, stages

ROOT = Path(__file__).resolve().parent.parent


def main(folder: str = "runs/example", *changes: str) -> dict[str, Any]:
    """Run what is not done yet in ``folder``.

    Args:
        changes: any settings, as on the command line: ``"train.epochs=3"``
    """
    settings = config.read(ROOT / "configs" / "staged.yaml", [f"folder={folder}", "select.keep=0.4", *changes])
    for event in stages.go(settings):
        match event:
            case events.Began(stage, why):
                print(f"{stage}: begins, {why}")
            case events.Skipped(stage):
                print(f"{stage}: is done")
            case events.Evaluated(stage, epoch, values):
                print(f"{stage}: top-1 {values['top1']:.2f} % after epoch {epoch}")
            case events.Ended(stage, seconds):
                print(f"{stage}: {seconds:.1f} s")
    results: dict[str, Any] = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])

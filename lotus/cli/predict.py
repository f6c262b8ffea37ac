"""``lotus predict``: what a model says of pictures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotus.cli.shared import Verbs, as_json, tell
from selection.errors import Refused
from selection.shown import shown

if TYPE_CHECKING:
    from lotus.predict import Answer

DAMAGED = 3
"""Exit code where some pictures could not be read; the others have their answers."""


def add(verb: Verbs) -> None:
    parser = verb("predict", "say the class of pictures, and how probable it is", _predict)
    parser.add_argument("model", help="a run's folder, the folder of a model, or a model.onnx")
    parser.add_argument("photos", nargs="+", help="pictures, or folders of them")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time (64)")
    as_json(parser)


def _shipped(place: Path) -> Path:
    """The folder of the model that ships, of a run's; any other place as it is."""
    from lotus.stage import named
    from lotus.stages import STAGES

    if not (place / "stages").is_dir():
        return place
    folder = place / named({stage.name: stage for stage in STAGES}, "shipped")
    if not (folder / "spec.json").is_file():
        raise Refused(f"{place}: this run has no model to ship yet. Finish it first: lotus run CONFIG.")
    return folder


def _predict(options: argparse.Namespace) -> int:
    from lotus import predict

    if options.batch < 1:
        raise Refused(f"--batch: at least 1, not {options.batch}.")
    files = predict.files_of(options.photos)
    model = predict.open_model(_shipped(Path(options.model)))
    wide, answers = max(len(shown(str(file))) for file in files), []
    for one in predict.predict(model, files, batch=options.batch):
        answers.append(one)
        if not (options.json or one.fault):
            tell(f"{shown(one.file):<{wide}}  {shown(one.label)}  {100 * one.probability:.1f} %")
        _count(len(answers), len(files), options.batch)
    if options.json:
        print(json.dumps([_told(one) for one in answers]))
    faults = [one for one in answers if one.fault]
    for one in faults:
        tell(f"! {shown(one.file)}: cannot be read ({shown(one.fault)})", file=sys.stderr)
    if faults:
        tell(f"! passed over: {len(faults)} of {len(files)} pictures", file=sys.stderr)
    return DAMAGED if faults else 0


def _told(one: Answer) -> dict[str, Any]:
    if one.fault:
        return {"file": one.file, "error": one.fault}
    return {"file": one.file, "class": one.label, "probability": round(one.probability, 6)}


def _count(done: int, files: int, batch: int) -> None:
    """How far it is, where the answers go elsewhere than the terminal."""
    if sys.stderr.isatty() and not sys.stdout.isatty() and (done % batch == 0 or done == files):
        print(f"\r{done} of {files} pictures", end="\n" if done == files else "", file=sys.stderr)

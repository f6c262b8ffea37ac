"""``lotus predict``: what a model says of pictures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lotus.cli.shared import Verbs, as_json, tell
from selection.errors import Refused
from selection.shown import shown

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
    live = sys.stderr.isatty()
    wide, faults, answers = max(len(shown(str(file))) for file in files), [], []
    for number, one in enumerate(predict.predict(model, files, batch=options.batch), 1):
        if one.fault:
            faults.append(one)
        if options.json:
            answers.append(
                {"file": one.file, "error": one.fault}
                if one.fault
                else {"file": one.file, "class": one.label, "probability": round(one.probability, 6)}
            )
        elif not one.fault:
            tell(f"{shown(one.file):<{wide}}  {shown(one.label)}  {100 * one.probability:.1f} %")
        if live and not sys.stdout.isatty() and (number % options.batch == 0 or number == len(files)):
            print(f"\r{number} of {len(files)} pictures", end="\n" if number == len(files) else "", file=sys.stderr)
    if options.json:
        print(json.dumps(answers, ensure_ascii=False))
    for one in faults:
        tell(f"! {shown(one.file)}: cannot be read ({shown(one.fault)})", file=sys.stderr)
    if faults:
        tell(f"! {len(faults)} of {len(files)} pictures were passed over", file=sys.stderr)
    return DAMAGED if faults else 0

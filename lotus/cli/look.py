"""Verbs that look at what is there: patches, evaluate, verify, report, doctor."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from lotus.cli.shared import Verbs, as_json, load_shelves, overrides, tell, with_files
from selection import regular
from selection.errors import Refused


def add(verb: Verbs) -> None:
    patches = verb("patches", "make the patch ticket of a run: what each patch of each training image scores", _patches)
    patches.add_argument("config", help="the run's config file, its folder, or a folder with a train.beton")
    overrides(patches)
    patches.add_argument("--score", default="", help="a score of lotus/vit/patch_scores.py (train.patches.score)")
    patches.add_argument(
        "--model", default="", help="a folder written by LOTUS: the model to ask (train.patches.model)"
    )
    patches.add_argument(
        "--keep", type=float, help="the fraction of the patches that stays (train.patches.keep, else 0.7)"
    )
    patches.add_argument("--picture", metavar="OUT.png", help="a contact sheet: what leaves is dimmed")
    patches.add_argument("--images", type=int, default=12, help="images on it (12)")
    with_files(patches)
    patches.add_argument("--plain", action="store_true", help="plain lines instead of live progress")
    as_json(patches)

    evaluate = verb("evaluate", "measure a model of a run on the validation images", _evaluate)
    evaluate.add_argument("config", help="the run's config file, or its folder")
    overrides(evaluate)
    evaluate.add_argument("--model", metavar="STAGE", help="the stage that left it, or a folder (the model that ships)")
    with_files(evaluate)
    as_json(evaluate)
    evaluate.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    verify = verb("verify", "check that the folder of a model is what its spec says", _verify)
    verify.add_argument("folder", help="a folder of spec.json and model.safetensors")
    verify.add_argument("--against", metavar="FOLDER", help="the folder of the model that it was cut from")
    as_json(verify)

    report = verb("report", "write report.html of a run again and show its last page", _report)
    report.add_argument("folder", help="the run's folder, e.g. runs/digits")
    with_files(report)

    doctor = verb("doctor", "check this machine, or a run, and say what to do", _doctor)
    doctor.add_argument("folder", nargs="?", metavar="RUN", help="a run's folder: what is whole in it, and what to do")
    with_files(doctor)
    doctor.add_argument("--brief", action="store_true", help="say only what is wrong")


def _patches(options: argparse.Namespace) -> int:
    from lotus import stages
    from lotus.config import read
    from lotus.report.live import Terminal
    from lotus.report.terminal import patches_page

    folder = Path(options.config)
    bare = folder.is_dir() and not (folder / "config.yaml").is_file()
    if bare and not (folder / "train.beton").is_file():
        raise Refused(
            f"{folder}: neither a run nor prepared images are here. Give a config file, or run: lotus prepare."
        )
    config = read(None, [f"data.folder={folder}", *options.overrides]) if bare else read(folder, options.overrides)
    if options.images < 1:
        raise Refused(f"--images: at least 1, not {options.images}.")
    making = stages.patch_ticket(
        config,
        score=options.score,
        model=options.model,
        keep=options.keep,
        prepared=bare,
        picture=Path(options.picture) if options.picture else None,
        shown=options.images,
        shelves=load_shelves(options.shelves),
    )
    with contextlib.nullcontext() if options.json else Terminal(plain=options.plain or None) as terminal:
        while True:
            try:
                event = next(making)
            except StopIteration as stop:
                ticket = stop.value
                break
            if terminal is not None:
                terminal.show(event)
    if options.json:
        print(json.dumps(ticket))
    else:
        patches_page(ticket)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from lotus import stages
    from lotus.config import read
    from lotus.report.numbers import accuracy
    from lotus.stage import named

    config = read(options.config, options.overrides)
    shelves = load_shelves(options.shelves)
    which = options.model or named(stages.run_of(config, shelves).stages, "shipped")
    values = stages.evaluate_model(config, which, shelves)
    where = "" if values["own_data"] else f" of {config.data.path or config.data.name}, not the run's own"
    if options.json:
        print(json.dumps(values))
    else:
        tell(
            f"{which}: top-1 {accuracy(values['top1'], values['images'])}, macro average {values['macro']:.2f} %, "
            f"top-5 {values['top5']:.2f} %, loss {values['loss']:.4f} on {values['images']:.0f} images{where}; {values['params'] / 1e6:.3f} M parameters, {values['macs'] / 1e6:.2f} M MACs"
        )
    if values["outdated"]:
        tell(
            f"! {which} is older than what it was made from, or of other settings; lotus run makes it again",
            file=sys.stderr,
        )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from lotus.pruning import verify

    verified = verify(options.folder, against=options.against)
    if options.json:
        print(json.dumps({"folder": options.folder, "faults": list(verified.faults), **verified.facts}))
    else:
        for fault in verified.faults:
            tell(f"{options.folder}: {fault.removeprefix(f'{options.folder}: ')}", file=sys.stderr)
        if verified:
            facts = verified.facts
            tell(
                f"{options.folder}: whole. {facts['name']}, {facts['tensors']} tensors, {facts['params']:,} parameters, {facts['macs']:,} MACs."
            )
            if options.against:
                tell(
                    f"Against {options.against}: names the same class for {100 * facts['agree']:.0f} % of a few drawn images, "
                    f"logits differ by {facts['distance']:.2g} (relative)."
                )
    return 0 if verified else 2


def _report(options: argparse.Namespace) -> int:
    from lotus.config import read
    from lotus.report import html
    from lotus.report.terminal import last_page
    from lotus.stages import run_of

    folder = Path(options.folder)
    results = folder / "results.json"
    if not results.is_file():
        raise Refused(f"{folder}: no results.json here, so no finished run. Run: lotus run CONFIG.")
    run = run_of(read(folder), load_shelves(options.shelves))
    run.check_file(run.results)
    page = html.write(folder, run.stages)
    run.written_again(page)
    last_page(json.loads(regular.text(results)), page, run.stages)
    if older := run.outdated(run.plan()):
        tell(
            f"! {', '.join(older)}: older than what they were made from, or of other settings; lotus run makes them again",
            file=sys.stderr,
        )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from lotus import doctor
    from lotus.report.terminal import doctor_page

    if options.folder:
        from lotus.config import read
        from lotus.stages import run_of
        from lotus.stages.whole import run_checks

        if not (Path(options.folder) / "config.yaml").is_file():
            raise Refused(f"{options.folder}: no run is here. Name its folder, e.g. runs/digits.")
        checks = list(run_checks(run_of(read(options.folder), load_shelves(options.shelves))))
    else:
        checks = list(doctor.checks())
    told = [check for check in checks if check.cure] if options.brief else checks
    doctor_page(told, of="the run" if options.folder else "")
    return 2 if any(check.fatal and check.cure for check in checks) else 0

"""What of a run is whole, and what to do: ``lotus doctor RUN``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lotus.doctor import Check
from lotus.run import Run
from selection.errors import Refused


def run_checks(run: Run) -> Iterator[Check]:
    """What of a run is whole, stage by stage: all that it left is read through, about a second a gigabyte. Then its checkpoints."""
    from lotus.data import beton
    from lotus.training import checkpoint

    goes_on = "lotus run goes on from there."
    try:
        run.check_kinds()
    except Refused as fault:
        yield Check("folder", "something of another kind", str(fault), fatal=True)
    for stage in run.plan():
        why = run.why(stage)
        if why is not None:
            yield Check(stage, why, f"To be done: {goes_on}", fatal=run.is_hurt(stage))
            continue
        try:
            run.check_whole([stage])
            for file in run.outputs(stage).values():
                if file.suffix == ".beton":
                    beton.verify(file)
        except Refused as fault:
            yield Check(stage, "done, and damaged since", str(fault), fatal=True)
        else:
            yield Check(stage, f"done, {len(run.outputs(stage))} file(s) whole")
    folders: list[Path] = sorted((run.folder / "checkpoints").glob("**/state.json"))
    for folder in (file.parent for file in folders):
        try:
            checkpoint.verify(folder)
        except checkpoint.Damaged as fault:
            cure = "It is passed over: the training goes on from an older one. Delete it to save room."
            yield Check(str(folder.relative_to(run.folder)), f"damaged: {fault}", cure)
        else:
            yield Check(str(folder.relative_to(run.folder)), "whole")
    if strangers := run.strangers():
        yield Check(
            "models", f"{', '.join(strangers)}: no stage of this run left them", "Delete them if they are not yours."
        )

"""The stage ``export``: the model leaves the house, and is timed beside the one before the cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lotus.events import Said, Step, Wrote
from lotus.run import Run, write_json
from lotus.stage import Outcome, Stage, Work
from lotus.stages.ahead import Ahead, check_batch
from lotus.stages.context import Context


def export(context: Context) -> Work:
    import lotus.pruning
    from lotus.export import export as send
    from lotus.export import lines
    from lotus.vit import cost

    run, settings, device = context.run, context.config.export, context.world.device
    model = lotus.pruning.load(run.of("finetune"))
    sent = send(model, run.of("export"), onnx=settings.onnx)
    for note in sent["notes"]:
        yield Said("export", note)
    for line in lines(sent["timm"], run.of("export")):
        yield Said("export", line)
    latency, widths = {}, []
    for number, name in enumerate(("train", "finetune")):
        uncut = name == "train" and context.config.train.shrink is not None  # which nobody kept: as it started
        timed = (context.new_model().eval() if uncut else lotus.pruning.load(run.of(name))).to(device)
        widths.append(cost.outline(timed).width)
        latency[name] = {
            "batch_1": cost.latency(timed, 1, device=device),
            "batch_N": cost.latency(timed, settings.latency_batch, device=device),
            "batch": settings.latency_batch,
            "device": str(device),
            "dtype": "fp32",
        }
        yield Step("export", number + 1, 2, unit="models timed")
    tokens = cost.outline(model).tokens
    write_json(run.of("export") / "export.json", {**sent, "latency_ms": latency})
    yield Wrote("export", str(run.of("export")))
    return Outcome(values={"latency_ms": latency, "tokens": tokens, "width": {"kept": widths[1], "of": widths[0]}})


def _check(ahead: Ahead) -> None:
    check_batch("export.latency_batch", ahead.config.export.latency_batch, ahead.shape, ahead.config.device)


def _tell(run: Run, results: dict[str, Any]) -> None:
    exported = results["export"]
    timed = exported["latency_ms"]
    results["device"] = timed["train"]["device"]
    for name, like in (("train", "train"), ("finetune", "finetune"), ("baseline", "train")):
        if name in results and results[name].get("kind") != "small":
            results[name]["latency_ms"] = timed[like]
    results["kept"]["tokens"] = _tokens_kept(exported["tokens"], results["train"].get("patches"))
    if exported["width"]["kept"] < exported["width"]["of"]:
        results["kept"]["width"] = exported["width"]


def _tokens_kept(tokens: int, patches: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the report tells of the patches that the lottery's training went through."""
    if not patches:
        return {"kept": tokens, "of": tokens}
    told = {name: patches[name] for name in ("mode", "keep", "evaluated", "train_macs", "joint") if name in patches}
    return {"kept": round(patches["share"] * tokens), "of": tokens, **told}


STAGE = Stage(
    "export",
    "leave the house: timm, ONNX, latency",
    export,
    settings=("export",),
    after=("finetune",),
    outputs=("export/export.json",),
    check=_check,
    tell=_tell,
)

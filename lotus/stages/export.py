"""The stage ``export``: the model leaves the house, and is timed beside the one before the cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lotus.config import Config
from lotus.events import Said, Step, Wrote
from lotus.files import write_json
from lotus.report.numbers import accuracy
from lotus.run import Run
from lotus.stage import Outcome, Section, Stage, Work, named
from lotus.stages.ahead import Ahead, check_batch
from lotus.stages.context import CALIBRATION, Context
from selection.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor

_CALIBRATED = 256
"""Images that show the ranges of activations, where ``prune.calibration`` does not say."""


def export(context: Context) -> Work:
    import lotus.pruning
    from lotus.export import add_eight_bits, lines
    from lotus.export import export as send
    from lotus.vit import cost

    run, settings, device = context.run, context.config.export, context.world.device
    trained, shipped = _models(run)
    model = lotus.pruning.load(run.of(shipped))
    record = run.record(shipped)
    known = {
        **lotus.pruning.spec.read(run.of(shipped))["about"],
        "top1": record.values.get("top1") if record else None,
        "measured_on": _validated(run),
    }
    sent = send(model, run.of("export"), onnx=settings.onnx, onnx_input=settings.onnx_input, about=known)
    for note in sent["notes"]:
        yield Said("export", note)
    for line in lines(sent["timm"], run.of("export")):
        yield Said("export", line)
    latency, widths = {}, []
    for number, name in enumerate((trained, shipped)):
        uncut = name == trained and context.config.train.shrink is not None  # which nobody kept: as it started
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
    values: dict[str, Any] = {
        "latency_ms": latency, "tokens": tokens, "width": {"kept": widths[1], "of": widths[0]},
    }  # fmt: skip
    if settings.int8 and sent["onnx"]:
        values["int8"] = told = _eight_bits(context, model)
        reached = [told[name]["top1"] for name in ("fp32", "int8")]
        add_eight_bits(run.of("export"), told["calibrated_on"], reached, told["images"])
    write_json(run.of("export") / "export.json", {**sent, "latency_ms": latency, "int8": values.get("int8")})
    yield Wrote("export", str(run.of("export")))
    left = tuple(
        run.of("export") / name for name in ("model.onnx", "model.int8.onnx") if (run.of("export") / name).is_file()
    )
    return Outcome(values=values, left=left)


def _models(run: Run) -> tuple[str, str]:
    """The stages that left the model that was trained, and the one that ships: of those that come before."""
    before = {name: run.stages[name] for name in run.plan(STAGE.name)}
    return named(before, "training"), named(before, "shipped")


def _eight_bits(context: Context, model: Any) -> dict[str, Any]:
    """model.int8.onnx, and what it is beside model.onnx: top-1, bytes, milliseconds of onnxruntime on this CPU."""
    from lotus import onnx_file
    from selection.subset import Subset

    run, config = context.run, context.config
    whole, small = (run.of("export") / name for name in ("model.onnx", "model.int8.onnx"))
    rows = Subset.load(run.ticket).rows
    rng = np.random.default_rng([config.seed, CALIBRATION])  # the draw of the stage prune
    count = min(config.prune.calibration or _CALIBRATED, len(rows))
    calibration = np.sort(rng.choice(rows, size=count, replace=False))
    onnx_file.quantize(whole, small, (images for images, _ in _given(context, model, calibration)))
    batch, _ = next(_given(context, model, calibration))
    large = batch.repeat(-(-config.export.latency_batch // len(batch)), 1, 1, 1)[: config.export.latency_batch]
    files = {"fp32": whole, "int8": small}
    one, many = (onnx_file.latencies([*files.values()], images) for images in (large[:1], large))
    told: dict[str, Any] = {"calibrated_on": count, "batch": len(large), "images": _validated(run)}
    for number, (name, file) in enumerate(files.items()):
        told[name] = {
            "top1": onnx_file.top1(file, _given(context, model, None)), "bytes": file.stat().st_size,
            "batch_1": one[number], "batch_N": many[number],
        }  # fmt: skip
    return told


def _validated(run: Run) -> int:
    """How many images a top-1 is measured on."""
    from lotus.data.beton import Manifest

    return Manifest.load(run.val_beton).n


def _given(context: Context, model: Any, rows: np.ndarray | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images as model.onnx takes them, and labels: of the training images ``rows``, or all that validate."""
    file = context.run.val_beton if rows is None else context.run.train_beton
    in_bytes = context.config.export.onnx_input == "uint8"
    with context.images(file, rows, context.config.train, model) as loader:
        for batch in loader.epoch(0):
            yield context.pixels(batch.images) if in_bytes else batch.images.float().cpu(), batch.labels.cpu()


def _check(ahead: Ahead) -> None:
    settings = ahead.config.export
    check_batch("export.latency_batch", settings.latency_batch, ahead.shape, ahead.config.device)
    if settings.int8 and not settings.onnx:
        raise Refused("export.int8: is made of model.onnx. Set export.onnx=true, or export.int8=false.")
    if settings.int8:
        import importlib.util

        if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
            raise Refused("export.int8: needs the extra onnx: pip install 'lotus-vit[onnx]'. Or set export.int8=false.")


def _tell(run: Run, results: dict[str, Any]) -> Section | None:
    exported = results["export"]
    timed = exported["latency_ms"]
    trained, shipped = _models(run)
    results["device"] = next(iter(timed.values()))["device"]
    for name, like in ((trained, trained), (shipped, shipped), (named(run.stages, "dense"), trained)):
        if name in results and results[name].get("kind") != "small":
            results[name]["latency_ms"] = timed[like]
    results["kept"]["tokens"] = _tokens_kept(exported["tokens"], results[trained].get("patches"))
    if exported["width"]["kept"] < exported["width"]["of"]:
        results["kept"]["width"] = exported["width"]
    return _eight_bits_told(exported["int8"]) if exported.get("int8") else None


def _eight_bits_told(told: Mapping[str, Any]) -> Section:
    rows = tuple(
        (
            name,
            accuracy(one["top1"], told.get("images")),
            f"{one['bytes'] / 1e6:.2f} MB",
            f"{one['batch_1']:.2f} ms",
            f"{one['batch_N']:.1f} ms",
        )
        for name, one in ((name, told[name]) for name in ("fp32", "int8"))
    )
    columns = ("ONNX", "top-1", "file", "batch 1", f"batch {told['batch']}")
    text = f"Calibrated on {told['calibrated_on']} training images; latency of onnxruntime on the CPU, both in turn."
    return Section("8 bits", text, columns, rows)


def _after(config: Config) -> tuple[str, ...]:
    return ("prepare", "select", "finetune") if config.export.int8 else ("finetune",)


def _tokens_kept(tokens: int, patches: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the report tells of the patches that the lottery's training went through."""
    if not patches:
        return {"kept": tokens, "of": tokens}
    told = {
        name: patches[name] for name in ("mode", "keep", "until", "evaluated", "train_macs", "joint") if name in patches
    }
    return {"kept": round(patches["share"] * tokens), "of": tokens, **told}


STAGE = Stage(
    "export",
    "write the model for timm and ONNX, measure its latency",
    export,
    settings=("export",),
    after=_after,
    outputs=("export/export.json",),
    check=_check,
    tell=_tell,
)

"""The last stages: ``export`` the model and time it, ``report`` what was kept and what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lotus.events import Said, Step, Wrote
from lotus.files import write_json
from lotus.run import Run
from lotus.stages.shop import Making, Outcome, Shop, plan


def export(shop: Shop) -> Making:
    import lotus.pruning
    from lotus.export import export as send
    from lotus.export import lines
    from lotus.vit import cost

    run, wants, device = shop.run, shop.config.export, shop.world.device
    model = lotus.pruning.load(run.final)
    sent = send(model, run.export, onnx=wants.onnx)
    for note in sent["notes"]:
        yield Said("export", note)
    for line in lines(sent["timm"], run.export):
        yield Said("export", line)
    latency, widths = {}, []
    for number, (name, folder) in enumerate((("dense", run.trained), ("final", run.final))):
        timed = lotus.pruning.load(folder).to(device)
        widths.append(cost.outline(timed).width)
        latency[name] = {
            "batch_1": cost.latency(timed, 1, device=device),
            "batch_N": cost.latency(timed, wants.latency_batch, device=device),
            "batch": wants.latency_batch,
            "device": str(device),
            "dtype": "fp32",
        }
        yield Step("export", number + 1, 2, unit="models timed")
    tokens = cost.outline(model).tokens
    write_json(run.export / "export.json", {**sent, "latency_ms": latency})
    yield Wrote("export", str(run.export))
    return Outcome(values={"latency_ms": latency, "tokens": tokens, "width": {"kept": widths[1], "of": widths[0]}})


def report(shop: Shop) -> Making:
    from lotus.report import html

    found = results(shop.run)
    if "weights" in found["kept"]:
        from lotus.pruning.unstructured import compressed

        sizes = [compressed(folder / "model.safetensors") for folder in (shop.run.trained, shop.run.final)]
        found["kept"]["weights"] |= {"bytes": sizes[1], "of_bytes": sizes[0]}
    if shop.config.train.sparsity.attention is not None:
        found["attention"] = _focused(shop)
    write_json(shop.run.results, found)
    yield Wrote("report", str(shop.run.results))
    html.write(shop.run.folder)
    yield Wrote("report", str(shop.run.report))
    return Outcome()


LOOKED_AT = 512
"""Validation images on which attention is measured."""


def _focused(shop: Shop) -> dict[str, Any]:
    """How peaked attention was before training, is after it, and is in the dense baseline, which saw no penalty."""
    import lotus.pruning
    from lotus.data import beton
    from lotus.sparsity.focus import focus

    run, config = shop.run, shop.config
    models = {"start": shop.new_model(), "trained": lotus.pruning.load(run.trained)}
    if "baseline" in plan(config):
        models["baseline"] = lotus.pruning.load(run.baseline)
    rows = np.arange(min(LOOKED_AT, beton.Manifest.load(run.val_beton).n))
    found: dict[str, Any] = {}
    for name, model in models.items():
        with shop.images(run.val_beton, rows, config.train, model) as loader:
            found[name] = focus(model, loader.epoch(0), shop.world.device)
    settings = config.train.sparsity.attention
    return {"kind": settings.kind, "layers": settings.layers, "models": found} if settings else {}


def results(run: Run) -> dict[str, Any]:
    """results.json, out of the records of the stages."""
    from lotus.report import ledger

    records = {name: record for name in plan(run.config) if (record := run.record(name)) is not None}
    final, latency = records["finetune"], records["export"].values["latency_ms"]
    dense = records["train"].values
    spec = [json.loads((folder / "spec.json").read_text(encoding="utf-8")) for folder in (run.trained, run.final)]
    kernels = spec[1].get("convolutions", {})
    found: dict[str, Any] = {
        "format": 1,
        "name": run.config.name,
        "device": latency["dense"]["device"],
        "trained": {**dense, "latency_ms": latency["dense"]},
        "after_prune": records["prune"].values,
        "final": {**final.values, "latency_ms": latency["final"]},
        "kept": {
            "images": {"kept": records["select"].values["kept"], "of": records["select"].values["of"]},
            "tokens": _tokens_kept(records["export"].values["tokens"], dense.get("patches")),
            "dimensions": {
                "macs": final.values["macs"] / dense["macs"],
                "params": final.values["params"] / dense["params"],
            },
            "blocks": [
                {
                    "heads": new["heads"],
                    "of_heads": old["heads"],
                    "head_dim": new["v_dim"],
                    "of_head_dim": old["v_dim"],
                    "hidden": new["hidden"],
                    "of_hidden": old["hidden"],
                    **({"kernel": kernels[str(place)]} if str(place) in kernels else {}),
                }
                for place, (old, new) in enumerate(zip(spec[0]["blocks"], spec[1]["blocks"]))
            ],
        },
    }
    width, timed = records["export"].values.get("width"), records["prune"].values.get("latency")
    if width is not None and width["kept"] < width["of"]:
        found["kept"]["width"] = width
    if timed is not None:
        found["kept"]["latency"] = timed
    measured = final.values.get("patches") or {"evaluated": "dense"}
    found["evaluated"] = {
        "patches": measured["evaluated"],
        "share": measured.get("evaluated_share", 1.0),
        "macs": measured.get("evaluated_macs", final.values["macs"]),
    }
    if "weights" in final.values:
        found["kept"]["weights"] = {**final.values["weights"], "list": run.config.prune.weights}
        found["sweep"] = records["prune"].values.get("sweep")
    has_baseline = "baseline" in records  # the plan knows whether it takes part
    if has_baseline:
        found["baseline"] = {**records["baseline"].values, "latency_ms": latency["dense"]}
    costs = [
        {"stage": name, "seconds": record.seconds, "image_forwards": record.image_forwards, "macs": record.macs}
        for name, record in records.items()
        if name != "report" and (name != "baseline" or has_baseline)
    ]
    images = found["kept"]["images"]
    share = images["kept"] / images["of"]
    if run.config.train.redraw is not None:  # of all times that an epoch could have shown an image of the ticket
        found["kept"]["passes"] = {"kept": dense["images_seen"], "of": dense["passes_of"]}
        share *= dense["images_seen"] / dense["passes_of"]
    found["ledger"] = ledger.account(costs, kept_share=share, asks_baseline=run.asks_baseline)
    return found


def _tokens_kept(tokens: int, patches: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the report tells of the patches that the lottery's training went through."""
    if not patches:
        return {"kept": tokens, "of": tokens}
    told = {name: patches[name] for name in ("mode", "keep", "evaluated", "train_macs", "joint") if name in patches}
    return {"kept": round(patches["share"] * tokens), "of": tokens, **told}

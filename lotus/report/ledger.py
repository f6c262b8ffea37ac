"""What it cost, against what it saved: pure functions from what the stages recorded.

A MAC is a multiply-accumulate. Forward and backward of an image cost 2.99 forwards (measured on ViT-S with a FLOP
counter), so training an image counts as three; the stages record their cost by that rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lotus.report.numbers import accuracy, count, duration, listed, milliseconds, percent, si, times
from lotus.report.numbers import standard_error as standard_error
from lotus.stage import Stage, named

Stages = Mapping[str, Stage]
"""Of the run, by name, in order."""

FORMAT = 2
"""Of results.json."""


def account(
    stages: Iterable[Mapping[str, Any]],
    *,
    kept_share: float,
    spent_share: float = 1.0,
    asks_dense: bool = False,
    small: bool = False,
    planned: float | None = None,
) -> dict[str, Any]:
    """The ledger of a run.

    Args:
        stages: a row a stage that was done: ``stage``, ``part`` (:attr:`lotus.stage.Stage.part`), ``seconds``,
            ``image_forwards``, ``macs``
        kept_share: fraction of the images that the ticket keeps, in (0, 1]
        spent_share: fraction of the dense model's MACs that the training took for its average image, where it was cut on the way
        asks_dense: the dense model chose patches, so that its training is a part of what the lottery cost
        small: what all is compared with is a smaller model, whose training says nothing of the dense one's
        planned: MACs of the dense training that a budget is a fraction of, where there is a budget

    Returns:
        stages: the rows, as given
        dense_macs: of training the dense model on all images by the same recipe; what the baseline cost, or, where
            there was none or a ``small`` one, what is ``planned``, or the training on the ticket cost over both shares
        baseline_macs: of training what all is compared with; None where nothing is
        lottery_macs: of all parts of the lottery together
        selection_macs: of choosing images
        saved_macs_a_training: what training on the ticket saves each time, 0 at least
        break_even_trainings: trainings on one ticket until choosing it has paid: selection / saved; 0.0 where
            choosing cost nothing, None where it never pays
        verdict: one honest sentence
    """
    rows = [dict(row) for row in stages]
    macs: dict[str, float] = {}
    for row in rows:
        macs[row["part"]] = macs.get(row["part"], 0.0) + float(row["macs"])
    trained, selection = macs.get("training", 0.0), macs.get("choosing", 0.0)
    baseline = macs.get("dense")
    alike = trained / (kept_share * spent_share) if small or baseline is None else baseline
    dense = planned if planned and (small or baseline is None) else alike
    lottery = sum(spent for part, spent in macs.items() if part not in ("apart", "dense"))
    lottery += baseline or 0.0 if asks_dense else 0.0
    saved = max(0.0, alike - trained)
    break_even = 0.0 if selection == 0 else selection / saved if saved > 0 else None
    return {
        "stages": rows,
        "dense_macs": dense,
        "baseline_macs": baseline,
        "lottery_macs": lottery,
        "selection_macs": selection,
        "saved_macs_a_training": saved,
        "break_even_trainings": break_even,
        "verdict": verdict(
            dense=dense,
            lottery=lottery,
            selection=selection,
            saved=saved,
            kept_share=kept_share,
            small=baseline if small else None,
            planned=planned,
        ),
    }


def verdict(
    *,
    dense: float,
    lottery: float,
    selection: float,
    saved: float,
    kept_share: float,
    small: float | None = None,
    planned: float | None = None,
) -> str:
    """Whether it was worth it, in one sentence; all but ``kept_share`` in MACs, ``small`` of a small model's training, ``planned`` of the
    dense training that a budget is a fraction of."""
    whole = f"all in all the lottery took {times(lottery / dense)} the computing of the dense training" if dense else ""
    whole += f" and {times(lottery / small)} the small model's" if whole and small else ""
    if whole and planned:
        beside = "" if dense == planned else f", {times(lottery / planned)} that of the one"
        whole += f"{beside} of which the budget is a fraction"
    if kept_share >= 1:
        told = "No image was left out"
        told += f", so the {si(selection)} MACs of scoring bought nothing" if selection else ""
    elif selection == 0:
        told = f"Choosing the images cost nothing and saves {si(saved)} MACs a training"
    elif saved <= 0:
        told = f"Choosing the images cost {si(selection)} MACs and saves nothing, so it never pays"
    elif selection > saved:
        needed = math.ceil(selection / saved - 1e-9)
        told = (
            f"Choosing the images cost more than it saves: {si(selection)} MACs once against {si(saved)} a training, so "
            f"the ticket pays only when {needed} or more trainings use it"
        )
    else:
        told = (
            f"Choosing the images cost {si(selection)} MACs and saves {si(saved)} a training, so the ticket pays from "
            "the first training on"
        )
    return f"{told}; {whole}." if whole else f"{told}."


class Line(NamedTuple):
    """A line of the table that compares the dense model with the one that ships."""

    what: str
    dense: str
    lotus: str
    change: str
    """A difference for top-1 and loss, lotus over dense for all else; empty where nothing can be compared."""
    better: bool | None
    """Whether the change is to the better; None where there is none."""


def compared(results: Mapping[str, Any], stages: Stages) -> list[Line]:
    """The table of the report's first screen, from ``results.json``; lines without figures are left out.

    The dense side is the baseline, or, in a run without one, the trained model before the cut. What the lottery's
    training took is the training on the ticket and the fine-tune together.
    """
    dense, final = reference(results, stages), shipped(results, stages)
    lines, images = [], results.get("validation_images")
    if "top1" in dense and "top1" in final:
        gain = final["top1"] - dense["top1"]
        lines.append(
            Line(
                "Top-1",
                _top1(dense["top1"], images),
                _top1(final["top1"], images),
                f"{_signed(gain, 2)} points",
                _up(gain),
            )
        )
    lines += _macro(results.get("accuracy") or {})
    if dense.get("loss") is not None and final.get("loss") is not None:
        gain = final["loss"] - dense["loss"]
        lines.append(Line("Loss, nats", f"{dense['loss']:.4f}", f"{final['loss']:.4f}", _signed(gain, 4), _up(-gain)))
    lines += _ratio("Parameters", dense.get("params"), final.get("params"), si)
    lines += _ratio("MACs an image", dense.get("macs"), final.get("macs"), si)
    if has_dense(results, stages):
        trained = results.get(named(stages, "training"), {})
        for name, key, show in (
            ("Images trained on, choosing aside", "images_seen", count),
            ("Training, choosing aside", "train_seconds", duration),
        ):
            lotus = sum(one.get(key) or 0 for one in (trained, final))
            lines += _ratio(name, dense.get(key), lotus, show)
        ledger = results.get("ledger", {})
        lines += _ratio("MACs spent, choosing included", _baseline_macs(ledger), ledger.get("lottery_macs"), si)
    slow, fast = dense.get("latency_ms") or {}, final.get("latency_ms") or {}
    for key, size in (("batch_1", 1), ("batch_N", slow.get("batch", "N"))):
        where = f", {fast['device']} {fast.get('dtype', '')}".rstrip() if fast.get("device") else ""
        lines += _ratio(f"Latency, batch of {size}{where}", slow.get(key), fast.get(key), milliseconds)
    return lines


def _macro(told: Mapping[str, Any]) -> list[Line]:
    """The mean of each class's top-1, where both models were measured class by class."""
    if "dense_macro" not in told:
        return []
    gain = told["macro"] - told["dense_macro"]
    before, after = (f"{told[name]:.2f} %" for name in ("dense_macro", "macro"))
    return [Line("Macro average of the classes", before, after, f"{_signed(gain, 2)} points", _up(gain))]


def has_dense(results: Mapping[str, Any], stages: Stages) -> bool:
    """Whether the dense model was trained on all images, to compare with."""
    return bool(results.get(named(stages, "dense")))


def side(results: Mapping[str, Any], stages: Stages) -> str:
    """What stands opposite LOTUS in the table, in a word or three."""
    if not has_dense(results, stages):
        return "dense" if _is_planned_whole(results) else "before the cut"
    return "small" if is_small(results, stages) else "dense"


def is_small(results: Mapping[str, Any], stages: Stages) -> bool:
    """Whether what all is compared with is a smaller model, trained from scratch."""
    return (results.get(named(stages, "dense")) or {}).get("kind") == "small"


def _is_planned_whole(results: Mapping[str, Any]) -> bool:
    """Whether a budget was planned for a model that is not cut: a smaller one from scratch, or the dense one."""
    return results.get("budget", {}).get("way") in ("small", "dense")


def _baseline_macs(ledger: Mapping[str, Any]) -> Any:
    """Of training what all is compared with; older ledgers knew no other than the dense model."""
    return ledger.get("baseline_macs") or ledger.get("dense_macs")


def reference(results: Mapping[str, Any], stages: Stages) -> Mapping[str, Any]:
    """What the shipped model is compared with: the dense baseline, else the trained model before its cut, or, where a budget was planned
    for a model that is never cut, what is known of the dense one."""
    trained: Mapping[str, Any] = results.get(named(stages, "training")) or {}
    if _is_planned_whole(results) and not has_dense(results, stages):
        return dict(results["budget"]["dense_model"])
    if "uncut" in trained:  # it was cut within its training
        trained = {name: trained[name] for name in ("latency_ms",) if name in trained} | trained["uncut"]
    return results.get(named(stages, "dense")) or trained


def shipped(results: Mapping[str, Any], stages: Stages) -> Mapping[str, Any]:
    """What was measured of the model that ships."""
    found: Mapping[str, Any] = results[named(stages, "shipped")]
    return found


def told_by(results: Mapping[str, Any], stages: Stages, what: str) -> tuple[str, Any]:
    """The first stage that measured ``what``, and that; nothing where none has."""
    return next(((name, results[name][what]) for name in stages if (results.get(name) or {}).get(what)), ("", {}))


BASELINES = {
    "textbook": "the dense model trained on all images by the textbook",
    "small": "a small model trained from scratch on all images",
}
"""What the baseline is, where it is not the dense model by the training's own recipe."""


def compare_top1(dense: float, lotus: float, images: int) -> dict[str, Any]:
    """Two top-1 in percent on the same ``images``, with their standard errors in points.

    Unpaired: the two errors are taken as independent. Models that fail on the same images differ more surely than this says.
    """
    errors = standard_error(dense, images), standard_error(lotus, images)
    gap, error = lotus - dense, math.hypot(*errors)
    return {
        "images": images, "dense_error": errors[0], "lotus_error": errors[1], "difference": gap, "error": error,
        "test": "unpaired", "beyond_chance": abs(gap) > 2 * error,
    }  # fmt: skip


def chance(results: Mapping[str, Any], stages: Stages) -> str:
    """How sure the top-1 is, in a sentence; empty where nothing was counted."""
    images = results.get("validation_images")
    dense, final = reference(results, stages), shipped(results, stages)
    if not images or "top1" not in final:
        return ""
    if "top1" not in dense:
        return f"Top-1 is of n = {count(images)} images: {_with_error(final['top1'], images)}."
    comparison = compare_top1(dense["top1"], final["top1"], images)
    what = "a difference" if comparison["beyond_chance"] else "no difference"
    return (
        f"On n = {count(images)} images: {_with_error(final['top1'], images)} against {_with_error(dense['top1'], images)} "
        f"(standard errors), {what} beyond chance ({_signed(comparison['difference'], 2)} ± {comparison['error']:.2f} points, unpaired)."
    )


def _top1(top1: float, images: int | None) -> str:
    return _with_error(top1, images) if images else f"{top1:.2f} %"


def _with_error(top1: float, images: int) -> str:
    return f"{top1:.2f} ± {standard_error(top1, images):.2f} %"


def headline(results: Mapping[str, Any], stages: Stages) -> str:
    """What came out, in one sentence: cost and accuracy against the baseline first."""
    dense, final = reference(results, stages), shipped(results, stages)
    shares = _shares(results, stages)
    if "top1" not in final or ("top1" not in dense and not shares):
        return "The model is done."
    top1 = accuracy(final["top1"], results.get("validation_images"))
    if "top1" not in dense:
        return f"{_opening(results, stages, shares)}LOTUS reaches a top-1 of {top1}."
    name = "its own model before the cut"
    if has_dense(results, stages):
        name = BASELINES.get(dense.get("kind", "best"), "the dense model trained on all images")
    gap = final["top1"] - dense["top1"]
    size = f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}" if abs(gap) >= 0.005 else "level with"
    told = f"{_opening(results, stages, shares)}LOTUS reaches a top-1 of {top1}, {size} {name}"
    return f"{told}{_evaluated(results)}{_faster(results, stages)}."


def _shares(results: Mapping[str, Any], stages: Stages) -> list[str]:
    """With how much of everything."""
    dense, final, kept = reference(results, stages), shipped(results, stages), results.get("kept", {})

    def part(what: str) -> str:
        return percent(kept[what]["kept"] / kept[what]["of"])

    shares = [f"{part('images')} of the images"] if kept.get("images") else []
    if kept.get("passes") and kept["passes"]["kept"] < kept["passes"]["of"]:
        shares.append(f"{part('passes')} of their passes")
    if kept.get("weights"):
        shares.append(f"{part('weights')} of the weights")
    if final.get("macs") and dense.get("macs"):
        whose = "its" if is_small(results, stages) else "the"
        shares.append(f"{percent(final['macs'] / dense['macs'])} of {whose} MACs")
    return shares


def _opening(results: Mapping[str, Any], stages: Stages, shares: list[str]) -> str:
    """What it cost beside the baseline, and with how much of everything: the start of a sentence."""
    spent = results.get("ledger") or {}
    if has_dense(results, stages) and _baseline_macs(spent):
        of = "the small model's" if is_small(results, stages) else "the dense training's"
        told = f"At {times(spent['lottery_macs'] / _baseline_macs(spent))} {of} computing, "
    elif results.get("budget") and spent.get("dense_macs"):
        epochs = results["budget"]["dense_epochs"]
        told = f"At {times(spent['lottery_macs'] / spent['dense_macs'])} the computing of the dense training for {epochs} epochs, "
    else:
        return f"With {listed(shares)}, " if shares else ""
    return told + (f"with {listed(shares)}, " if shares else "")


def _evaluated(results: Mapping[str, Any]) -> str:
    """On which patches, where the training left some out: the middle of a sentence."""
    seen = results.get("evaluated") or {}
    if seen.get("patches") == "sparse":
        return f", evaluated sparse: on {percent(seen['share'])} of the patches"
    tokens = results.get("kept", {}).get("tokens") or {}
    return ", evaluated dense: on all patches" if tokens.get("mode") else ""


def _faster(results: Mapping[str, Any], stages: Stages) -> str:
    """How fast it is beside what it is compared with: the end of a sentence. Sparse weights leave shapes and speed as they were."""
    fast, slow = (side.get("latency_ms") or {} for side in (shipped(results, stages), reference(results, stages)))
    if not (fast.get("batch_N") and slow.get("batch_N")) or results.get("kept", {}).get("weights"):
        return ""
    if shipped(results, stages).get("macs", 0) == reference(results, stages).get("macs"):
        return ""  # the same shapes: what their times differ by is chance
    ratio = slow["batch_N"] / fast["batch_N"]
    word = f"{times(ratio)} as fast" if ratio >= 1 else f"{times(1 / ratio)} slower"
    return f"; at a batch of {fast.get('batch', 'N')} it is {word}"


def patches_told(tokens: Mapping[str, Any]) -> str:
    """How patches were left out and how the model was measured: the end of a sentence; empty where nothing is known."""
    if "mode" not in tokens:
        return ""
    joint = [one["keep"] for one in tokens.get("joint", ()) if one["images"]]
    shared = f" on average ({percent(min(joint))} to {percent(max(joint))}, by the images' score)" if joint else ""
    until = f" until {tokens['until']:g} of the training, then all" if "until" in tokens else ""
    return f" a block while training, by {tokens['mode']} at keep {tokens['keep']:g}{shared}{until}; evaluated {tokens['evaluated']}"


def latency_told(latency: Mapping[str, Any]) -> str:
    """What was asked of the clock, predicted and measured, side by side, as parts of the dense model's time."""
    parts = [f"{name} {latency[name]:.3f}" for name in ("asked", "predicted", "measured") if latency[name] is not None]
    return f"{' | '.join(parts)} of the dense model's time, at a batch of {latency['batch']} on {latency['device']}"


def sizes(results: Mapping[str, Any], stages: Stages) -> list[dict[str, Any]]:
    """The sizes that were written beside the pruned model, the largest first, with the fraction of the MACs and, where they were drawn
    by it, of the latency that each takes."""
    stage, found = told_by(results, stages, "sizes")
    dense = results.get(named(stages, "training"), {}).get("macs")
    rows = []
    for name, size in found.items():
        row = {"name": f"{stage}-{name}", "share": size["macs"] / dense if dense else size["keep"], **size}
        if timed := size.get("latency"):
            row["time"] = timed["predicted"] if timed["measured"] is None else timed["measured"]
        rows.append(row)
    return sorted(rows, key=lambda row: -row["macs"])


def _ratio(what: str, dense: float | None, lotus: float | None, show: Any) -> list[Line]:
    """The line, if both sides were measured: lower is better."""
    if not dense or lotus is None:
        return []
    ratio = lotus / dense
    return [Line(what, show(dense), show(lotus), times(ratio), None if abs(ratio - 1) < 0.005 else ratio < 1)]


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def _up(gain: float) -> bool | None:
    return None if abs(gain) < 0.005 else gain > 0

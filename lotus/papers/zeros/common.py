"""What every way that makes zeros checks, tells and is refused: light, so that a shelf may read it."""

from __future__ import annotations

from typing import Any

from lotus.config import Config, Rule
from lotus.run import Run
from lotus.stage import Plot, Section, named
from lotus.stages.ahead import Ahead
from lotus.way import Options


def says(config: Config) -> str:
    """What the stage does."""
    request = config.prune
    return f"set weights to zero ({request.method.name}), keep {request.keep.weights:g}"


def check(ahead: Ahead, options: Options) -> None:
    """Refuse a pattern that does not fit the model, and a fine-tune that would move what was pruned."""
    from lotus.papers.zeros import masks, one_shot

    listed = masks.listed(ahead.shape, options["weights"])
    if pattern := options.get("pattern"):
        masks.n_of_m(listed, *masks.pattern(pattern))
    if ahead.config.finetune.epochs:
        one_shot.check_stays(ahead.config.finetune)


def looks(ahead: Ahead, options: Options) -> float:
    """Forward passes of an image in what is measured."""
    from lotus.papers.zeros.masks import SWEEP

    return (len(SWEEP) + 1 if options["sweep"] else 1) * len(ahead.sources[1].labels)


def hold(model: Any, options: Options) -> Any:
    """The guest by which zeros stay zeros."""
    from lotus.papers.zeros.one_shot import Holding

    return Holding(model, options["weights"])


def tell(run: Run, found: dict[str, Any], options: Options) -> Section | None:
    """What is left of the weights, and what they take on a disk; the sweep as a picture."""
    from lotus.papers.zeros.masks import compressed
    from lotus.papers.zeros.one_shot import essential

    weights = found.get(named(run.stages, "shipped"), {}).get("weights")
    if weights is not None:
        models = [named(run.stages, part) for part in ("training", "shipped")]
        of_bytes, of_these = (compressed(run.of(stage) / "model.safetensors") for stage in models)
        found["kept"]["weights"] = {**weights, "list": options["weights"], "bytes": of_these, "of_bytes": of_bytes}
    sweep = found["prune"].get("sweep")
    if sweep is None:
        return None
    knee, at = sweep["knee"], tuple(100 * sparsity for sparsity in sweep["sparsity"])
    name = "no knee" if knee is None else f"essential sparsity {100 * knee:.0f} %"
    plot = Plot(
        "Accuracy against sparsity, right after the weights are set to zero",
        "weights that are zero, %",
        "top-1 on the validation images, %",
        ((f"one-shot magnitude, {name}", at, tuple(sweep["top1"])),),
        (0, 100),
        (sweep["top1"][0] - 1, "1 point below the trained model"),
    )
    return Section("Essential sparsity", essential(knee), plot=plot)


def rules(name: str) -> tuple[Rule, ...]:
    """What goes with a way to zeros, by its name."""
    bad = f"prune.method={name} prune.keep.weights=0.5"
    return (
        Rule("Prune", "keep", lambda it: it.method.name == name and set(it.keep.asked) != {"weights"},
             f"{name} keeps a fraction of the weights. Say {{place}}.keep.weights=0.7, and nothing else",
             f"prune.method={name}", bad),
        Rule("Config", "prune.method", lambda it: it.prune.method.name == name and it.train.sparsity.gates,
             f"{name} cuts no dimension, and gates are for those. Set train.sparsity.gates=false",
             f"{bad} train.sparsity.gates=true", bad),
    )  # fmt: skip

"""The stage ``score``: proxies say what is to be known of each image."""

from __future__ import annotations

import warnings

import numpy as np

from lotus.config import Config
from lotus.events import Wrote
from lotus.run import Run
from lotus.stage import TRAIN_FORWARDS, Outcome, Stage, Work
from lotus.stages.ahead import LOOK, Ahead, Cost, asked_of_patches, check_recipe, check_weights
from lotus.stages.context import PARTS, Context
from lotus.stages.proxy import by_heads, by_training, proxy_model
from selection import lottery
from selection.errors import Refused


def score(context: Context) -> Work:
    """Proxies, several seeds, each watched while it trains; and those on parts of the images."""
    from lotus.data import beton
    from selection.random_subsets import random_parts
    from selection.signals import Signals

    run, config = context.run, context.config
    manifest, labels = context.manifest(), beton.labels(run.train_beton)
    if config.score.proxy == "self":
        raise Refused(
            "score.proxy: self is watched in the training, and scores nothing alone. Take training or linear_probe, or lotus run."
        )
    known: dict[str, np.ndarray] = {"labels": labels}
    if run.needs_proxy:  # refuse now what would be refused after the proxy
        lottery.affordable(labels, config.select.keep, bool(config.select.balance) or config.select.floor is not None)
    if (settings := config.score.subsets) is not None:
        rng = np.random.default_rng([config.seed, PARTS])
        known["run_in"] = random_parts(manifest.n, settings.runs, settings.fraction, rng)
    making = by_heads if config.score.proxy == "linear_probe" else by_training
    signals, spent = yield from making(context, labels, known.get("run_in"))
    if context.world.rank == 0:
        Signals(known | signals, classes=manifest.classes, fingerprint=manifest.fingerprint).save(run.signals)
        yield Wrote("score", str(run.signals))
    values = {"proxy": config.score.proxy, "epochs": config.score.epochs}
    values["seeds"] = config.score.heads if making is by_heads else config.score.seeds
    return Outcome(spent.forwards, spent.macs, values, spent.earlier)


def _check(ahead: Ahead) -> None:
    from lotus.training.precision import has_batch_norms
    from lotus.vit import anatomy
    from lotus.vit.cost import macs

    settings, proxy = ahead.config.score, ahead.shape
    if settings.model is not None or settings.side:
        proxy, side = proxy_model(ahead.config, 10, loaded=False)
        macs(proxy, side, place="score.model")
    if settings.proxy == "training" and settings.precision == "bf16" and has_batch_norms(proxy):
        raise Refused(
            "score.precision: bf16 leaves the statistics of batch norms in fp32, and torch takes no such mixture. Set "
            "score.precision=fp32, or score.proxy=linear_probe."
        )
    if settings.patches is not None and (fault := anatomy.why_not(proxy)):
        raise Refused(f"score.patches: {fault} Set score.patches=null.")
    check_recipe("train", ahead.config.train, ahead.shape)  # first: what it takes from there is told as that
    check_recipe("score", settings, proxy)
    if settings.model is not None:
        check_weights("score.model", settings.model)
        _check_fit(ahead)


def _check_fit(ahead: Ahead) -> None:
    """Refuse weights of the proxy's own model that cannot be had or are another model's: they are loaded, where one is needed."""
    own = ahead.config.score.model
    if own is not None and (own.weights or own.pretrained) and Run(ahead.config).needs_proxy:
        with warnings.catch_warnings(action="ignore"):  # said when it is made to be watched
            proxy_model(ahead.config, 10)


def _forecast(ahead: Ahead) -> Cost:
    from lotus.training import linear_probe
    from lotus.vit.cost import macs

    settings, n = ahead.config.score, ahead.images
    model, side = proxy_model(ahead.config, ahead.classes, loaded=False)
    price = macs(model, side)
    on_parts = settings.subsets.fraction * settings.subsets.runs * n if settings.subsets else 0.0
    if settings.proxy == "linear_probe":
        width = int(model.head_hidden_size)  # type: ignore[arg-type]  # timm's own
        return float(n), n * price + linear_probe.macs(
            settings.heads * n + on_parts, settings.epochs, width, ahead.classes
        )
    trained = TRAIN_FORWARDS * settings.epochs * (settings.seeds * n + on_parts)
    looked = n + (settings.subsets.runs * n if settings.subsets else 0)  # at all patches
    return trained + looked, (trained * ahead.share(settings, "score", model, n) + looked) * price


def _files(config: Config) -> dict[str, str]:
    own = config.score.model  # the proxy's, in place of the run's
    weights = {"model.weights": config.model.weights} if own is None else {"score.model.weights": own.weights}
    return {**asked_of_patches("score.patches", config.score.patches), **weights}


STAGE = Stage(
    "score",
    "train a proxy: watch what is said of each image",
    score,
    settings=("score", "model", "seed", *LOOK),
    after=("prepare",),
    outputs=("signals.npz",),
    every_rank=True,
    part="choosing",
    files=_files,
    check=_check,
    forecast=_forecast,
)

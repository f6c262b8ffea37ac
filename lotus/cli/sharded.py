"""``lotus select`` over several files, or one that is looked at in parts: two levels of facility location."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from selection.errors import Refused
from selection.images import Words

if TYPE_CHECKING:
    from selection.incoming import Incoming
    from selection.lottery import Lottery

_NOT_HERE = ("features", "embeddings", "score", "floor", "start", "max_memory", "picture")


def add(ticket: argparse.ArgumentParser) -> None:
    ticket.add_argument("more", nargs="*", help="more files with embeddings: together one data set, each a shard")
    ticket.add_argument("--shards", type=int, default=0, metavar="N", help="with --pick facility_location: greedily in each of N random "
                        "parts, then among what they took (docs/scale.md)")  # fmt: skip
    ticket.add_argument("--dask", default="", metavar="ADDRESS", help="shards go to the workers of a Dask scheduler; local: to as many as "
                        "there are cores here")  # fmt: skip


def draw(options: argparse.Namespace, pick: Mapping[str, Any], keep: float) -> tuple[Lottery, Incoming]:
    """
    Raises:
        Refused: another picker, or a flag that has no part in it; see :func:`selection.shards.select`.
    """
    import contextlib
    import dataclasses

    from selection import shards
    from selection.facility import Way
    from selection.lottery import Lottery
    from selection.methods import nearest

    settings = {name: value for name, value in pick.items() if name != "name"}
    if options.pick != "facility_location":
        raise Refused(
            f"--pick: {options.pick or 'nothing'} does not go by shards. Say --pick facility_location; pickers that go by a score read "
            "one number an image, and need no shards."
        )
    for name in _NOT_HERE:
        if getattr(options, name):
            raise Refused(f"--{name.replace('_', '-')}: has no part in a choice by shards. Leave it out.")
    if options.labels and options.more:
        raise Refused("--labels: is of one file. Of several each has its own, in an .npz.")
    known = [*(field.name for field in dataclasses.fields(Way)), "over"]
    for name in settings:
        if name not in known:
            raise Refused(
                f"--set pick.{name}: there is no such option.{nearest(name, known)} Here: {', '.join(known)}."
            )
    over = settings.pop("over", shards.Sharded.over)
    balance = False if options.no_balance else options.balance or True
    asked = shards.Sharded(
        keep, options.shards, over, balance, options.seed, Way(**settings), options.labels, Words({"labels": "--labels"}, " ")
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        run: shards.Map = map
        if options.dask:
            from lotus.dask_map import mapping

            run = stack.enter_context(mapping(options.dask))
        subset, given = shards.select([options.signals, *options.more], asked, run)
    return Lottery(subset, None, read=False), given

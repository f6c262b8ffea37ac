"""The pages that end a command, by rich. What comes from users (names, paths, messages) is never read as markup."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text as _Text

from lotus.doctor import Check
from lotus.report import ledger, lines
from lotus.report.numbers import count, percent, si
from selection.shown import shown

_CLASSES = 40  # rows of the ticket's table


def pruned_page(
    plan: str, values: Mapping[str, float], out: str, alone: Sequence[str] = (), *, console: Console | None = None
) -> None:
    """The end of ``lotus prune --model``: what stays, what it brought, how it is loaded, with LOTUS and ``alone``."""
    console = console or standard_output()
    for line in lines.pruned(plan, values, out, alone):
        console.print(Text(line), soft_wrap=True)


def standard_output() -> Console:
    """Standard output, which must not fail on a class name that its encoding does not know."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False, markup=False, emoji=False)


class Text(_Text):
    """A text as it is: never markup, and without what would act on the terminal. Names of one line go through ``shown`` first."""

    def __init__(self, text: str = "", style: str = "", **more: Any) -> None:
        super().__init__(shown(text, lines=True), style, **more)


def can_write(console: Console, text: str) -> bool:
    """Whether ``console`` can write ``text``: not everyone's speaks UTF-8."""
    try:
        text.encode(console.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- pages


def last_page(
    results: Mapping[str, Any], report_path: str | Path, stages: ledger.Stages, console: Console | None = None
) -> None:
    """The page that ends a run: what came out, dense against lotus, what was kept, what it cost, where the report is."""
    console = console or standard_output()
    console.print()
    console.print(Text(f"LOTUS  {results.get('name', '')}".rstrip(), "bold"))
    console.print(Text(ledger.headline(results, stages)))
    if sure := ledger.chance(results, stages):
        console.print(Text(sure))
    console.print()

    sides = _table("", ledger.side(results, stages), "lotus", "change")
    for line in ledger.compared(results, stages):
        style = {True: "green", False: "yellow", None: ""}[line.better]
        sides.add_row(Text(line.what), line.dense, line.lotus, Text(line.change, style))
    console.print(sides)

    for told in lines.kept_lines(results.get("kept", {})):
        console.print(Text(told))
    for told in lines.size_lines(results, stages):
        console.print(Text(told))
    for section in results.get("sections", ()):
        console.print(Text(f"{section['title']}: {section['text']}" if section["text"] else section["title"]))
        if section["rows"]:
            table(section["columns"], section["rows"], console=console)
    costs = results.get("ledger", {})
    if costs.get("stages"):
        console.print()
        console.print(_ledger_table(costs, ledger.side(results, stages)))
    if costs.get("verdict"):
        console.print(Text(costs["verdict"]))
    console.print()
    console.print(Text(f"report: {report_path}"), soft_wrap=True)  # a path broken over two lines cannot be clicked


def ticket_page(
    classes: Sequence[tuple[str, int, int]],
    scores: npt.NDArray[np.floating] | None,
    rows: npt.NDArray[np.integer],
    *,
    title: str = "",
    highest_first: bool = False,
    warnings: Iterable[str] = (),
    out: str | Path | None = None,
    console: Console | None = None,
) -> None:
    """A drawn ticket: kept rows a class, a histogram of the scores, warnings, and where it was written.

    Args:
        classes: (name, kept, of): images of each class in the ticket and in the data
        scores: (N,), higher = keep first, may hold +inf; None where the picker read none
        rows: (K,) the ticket
        title: how it was drawn
        highest_first: whether the picker keeps the highest
        warnings: a line each
        out: where it was written
        console: None: standard output
    """
    console = console or standard_output()
    if title:
        console.print(Text(f"ticket by {title}", "bold"))
    console.print(_classes_table(classes))
    if scores is not None and len(scores):
        console.print(Text(f"scores, from low to high{'; the highest are kept' if highest_first else ''}", "dim"))
        for line in lines.histogram(scores, rows, unicode=can_write(console, "█░")):
            console.print(Text(line), soft_wrap=True)
    for warning in warnings:
        console.print(Text(f"! {warning}", "yellow"))
    if out:
        console.print(Text(f"written to {out}"), soft_wrap=True)


def _classes_table(classes: Sequence[tuple[str, int, int]]) -> Table:
    """A line a class, and one of all; of many classes the first, and one for the rest."""
    table = _table("class", "kept", "of", "")
    most = len(classes) if len(classes) <= _CLASSES else _CLASSES - 1
    for name, kept, of in classes[:most]:
        told = Text(shown(name), overflow="ellipsis", no_wrap=True)
        table.add_row(told, count(kept), count(of), percent(kept / of) if of else "")
    if rest := classes[most:]:
        shares = [kept / of for _, kept, of in rest if of]
        span = f"{percent(min(shares))} to {percent(max(shares))}" if shares else ""
        table.add_row(Text(f"and {len(rest)} more", "dim"), *_summed(rest), span)
    if len(classes) != 1:  # of one class, as of images without labels, it would stand there twice
        total = sum(of for *_, of in classes)
        share = percent(sum(kept for _, kept, _ in classes) / total) if total else ""
        table.add_section()
        table.add_row("all", *_summed(classes), share, style="bold")
    return table


def _summed(classes: Sequence[tuple[str, int, int]]) -> tuple[str, str]:
    return count(sum(kept for _, kept, _ in classes)), count(sum(of for *_, of in classes))


def ticket_told(
    told: Mapping[str, Any],
    scores: npt.NDArray[np.floating] | None,
    rows: npt.NDArray[np.integer],
    *,
    place: str,
    notes: Iterable[str] = (),
    picture: str = "",
    console: Console | None = None,
) -> None:
    """What ``lotus ticket show`` tells: ``told`` as :func:`selection.exchange.describe` gives it."""
    console = console or standard_output()
    console.print(Text(place, "bold"))
    pairs = _table()
    pairs.add_column("")
    pairs.add_column("", overflow="fold")
    pairs.add_row("images", f"{count(told['kept'])} of {count(told['of'])}, {percent(told['kept'] / told['of'])}")
    unread = ("score", "score_read") if told["origin"].get("score_read") is False else ()
    for name in [name for name in told["origin"] if name not in unread]:
        pairs.add_row(Text(shown(name)), Text(lines.flat(told["origin"][name])))
    low, high = told["weights"]["low"], told["weights"]["high"]
    pairs.add_row("weights", "1 each" if low == high else f"{low:.3g} to {high:.3g}, mean 1")
    pairs.add_row("data", Text(shown(told["fingerprint"])))
    for name, values in () if unread else (told["scores"] or {}).items():
        pairs.add_row(f"scores {name}", lines.quantiles(values))
    pairs.show_header = False
    console.print(pairs)
    if told["classes"]:
        classes = [(row["class"], row["kept"], row["of"]) for row in told["classes"]]
        first = lines.flat(told["origin"].get("pick", "")).split(" ")[0] == "top_k"
        ticket_page(classes, None if unread else scores, rows, highest_first=first, warnings=notes, console=console)
    else:
        for note in notes:
            console.print(Text(f"! {note}", "yellow"))
    if picture:
        console.print(Text(f"drawn to {picture}"), soft_wrap=True)


def compare_page(
    places: Sequence[str], told: Mapping[str, Any], *, notes: Iterable[str] = (), console: Console | None = None
) -> None:
    """What ``lotus ticket compare`` tells: ``told`` as :func:`selection.exchange.compare` gives it."""
    console = console or standard_output()
    marks = [chr(ord("A") + n) if n < 26 else f"#{n + 1}" for n in range(len(places))]
    for mark, place, kept in zip(marks, places, told["kept"], strict=True):
        console.print(Text(f"{mark}  {place}: {count(kept)} of {count(told['of'])} images"), soft_wrap=True)
    pairs = _table("", "kept by both", "Jaccard", "by chance", "Spearman of the scores")
    for pair in told["pairs"]:
        rho = "" if pair["spearman"] is None else f"{pair['spearman']:.3f}"
        name = f"{marks[pair['a']]}, {marks[pair['b']]}"
        pairs.add_row(name, count(pair["both"]), f"{pair['jaccard']:.3f}", f"{pair['by_chance']:.3f}", rho)
    console.print(pairs)
    if len(places) > 2:
        console.print(Text(f"kept by all {count(told['kept_by_all'])}, by any {count(told['kept_by_any'])}", "dim"))
    if told["classes"]:
        table = _table("class", *marks, "of")
        rows = told["classes"]
        for row in rows[:_CLASSES]:
            table.add_row(
                Text(shown(row["class"]), overflow="ellipsis", no_wrap=True), *map(count, row["kept"]), count(row["of"])
            )
        if len(rows) > _CLASSES:
            table.add_row(Text(f"and {len(rows) - _CLASSES} more, see --json", "dim"))
        console.print(table)
    for note in notes:
        console.print(Text(f"! {note}", "yellow"))


def plan_page(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """What ``--dry-run`` tells.

    Args:
        rows: a row a stage: ``stage``, ``says``, ``why`` (None: it stands), ``image_forwards``, ``macs`` if it ran
        console: None: standard output
    """
    console = console or standard_output()
    table = _table()
    table.add_column("stage", no_wrap=True)
    table.add_column("what")
    table.add_column("runs, since")
    table.add_column("image-forwards", justify="right", no_wrap=True)
    table.add_column("MACs", justify="right", no_wrap=True)
    runs = [row for row in rows if row["why"] is not None]
    for row in rows:
        spent = row["why"] is not None and row["macs"]
        table.add_row(
            Text(row["stage"]),
            Text(row["says"]),
            Text(row["why"] if row["why"] is not None else "done before", "" if row["why"] is not None else "dim"),
            si(row["image_forwards"]) if spent else "",
            si(row["macs"]) if spent else "",
        )
    table.add_section()
    table.add_row(
        "", "to do", f"{len(runs)} of {len(rows)} stages",
        si(sum(row["image_forwards"] for row in runs)), si(sum(row["macs"] for row in runs)), style="bold",
    )  # fmt: skip
    console.print(table)
    console.print(Text("Estimates; training an image counts three forwards. Nothing was run.", "dim"))


def patches_page(told: Mapping[str, Any], console: Console | None = None) -> None:
    """A patch ticket: how it was scored, what is kept of the score, and where in the image that lies."""
    console = console or standard_output()
    by = f"{told['score']} of {told['model']}" if told["model"] else told["score"]
    console.print(Text(f"patches by {by}", "bold"))
    side = " x ".join(map(str, told["patch"]))
    kept = f"keep {told['keep']:g}: {told['kept']} of {told['of']} patches of {side} pixels"
    console.print(Text(f"{kept}, of each of {count(told['images'])} images"))
    if told["mass"] is not None:
        console.print(Text(f"the kept part has {percent(told['mass'])} of the score"))
    console.print(Text("mean place of each patch, in percent: 100 comes first in every image", "dim"))
    for row in told["mean_map"]:
        console.print(Text(" ".join(f"{100 * value:3.0f}" for value in row)))
    console.print(Text(f"{'written to' if told['made'] else 'was made before:'} {told['file']}"), soft_wrap=True)
    if told.get("picture"):
        console.print(Text(f"picture: {told['picture']}"), soft_wrap=True)


def doctor_page(checks: Iterable[Check], console: Console | None = None, *, of: str = "") -> None:
    """What the machine, or a run, is like, and what to do where it is not fit."""
    console = console or standard_output()
    checks = list(checks)
    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(overflow="fold")
    for check in checks:
        mark, style = ("x", "red") if check.cure and check.fatal else ("!", "yellow") if check.cure else ("✓", "green")
        table.add_row(
            Text(mark if can_write(console, mark) else "*", style), Text(check.name, "bold"), Text(check.found)
        )
        if check.cure:
            table.add_row("", "", Text(check.cure, style))
    console.print(table)
    if checks or of:
        console.print(_verdict(checks, of))


def _verdict(checks: Sequence[Check], of: str) -> Text:
    fatal = sum(bool(check.cure) and check.fatal for check in checks)
    minor = sum(bool(check.cure) and not check.fatal for check in checks)
    if fatal:
        told = f"{of}: {fatal} damaged." if of else f"Not fit: {fatal} to mend before a run can work."
        return Text(told[0].upper() + told[1:], "red")
    if of:
        return Text(f"Nothing is damaged{f'; {minor} to know of' if minor else ''}.", "green")
    return Text(f"Fit{f', with {minor} to know of' if minor else ''}.", "green")


def _ledger_table(costs: Mapping[str, Any], side: str) -> Table:
    table = _table("stage", "seconds", "image-forwards", "MACs")
    for row in costs["stages"]:
        apart = row["part"] == "dense"
        table.add_row(
            Text(f"{row['stage']}{f' ({side}, to compare)' if apart else ''}", "dim" if apart else ""),
            f"{row['seconds']:.1f}",
            count(row["image_forwards"]) if row["image_forwards"] else "",
            si(row["macs"]) if row["macs"] else "",
        )
    return table


def table(head: Sequence[str], lines: Iterable[Sequence[str]], *, console: Console | None = None) -> None:
    """Lines under their heads; all but the first column are figures, which break only where they would be cut otherwise."""
    console, shown_table, rows = (
        console or standard_output(),
        _table(),
        [[shown(cell) for cell in line] for line in lines],
    )
    wide = [max(cell_len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    fits = sum(wide[1:]) + 2 * len(wide) + min(wide[:1], default=0) // 2 <= console.width
    for number, name in enumerate(head):
        shown_table.add_column(
            name, justify="right" if number else "left", no_wrap=bool(number) and fits, overflow="fold"
        )
    for row in rows:
        shown_table.add_row(*map(Text, row))
    console.print(shown_table)


def _table(*heads: str) -> Table:
    """With these columns, all but the first of figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    return table

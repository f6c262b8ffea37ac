"""Names of classes, files and configs that carry escapes and markup: seen in terminal, page and picture, and nothing more."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from run_folder import STAGES, results

from lotus.cli import main
from lotus.events import Began, Said
from lotus.report import figures, terminal
from lotus.report.canvas import Canvas
from lotus.report.html import render
from lotus.report.live import Terminal

HOSTILE = "a\x1b[2J\x1b]0;x\x07[/x] [red]\u202e<script>\udcff"
ACTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


def page(draw: Any, *, is_terminal: bool = False) -> str:
    """What a page draws. Where colors are allowed, they are taken out again: those are rich's own."""
    out = io.StringIO()
    draw(Console(file=out, width=200, force_terminal=is_terminal, color_system=None, legacy_windows=False))
    return out.getvalue()


CLASSES = [HOSTILE, "plain"]
TICKET = {
    "kept": 1, "of": 2, "origin": {HOSTILE: {"name": HOSTILE, "more": HOSTILE}}, "weights": {"low": 1.0, "high": 1.0},
    "fingerprint": HOSTILE, "scores": None, "classes": [{"class": name, "kept": 1, "of": 1} for name in CLASSES],
}  # fmt: skip
PATCHES = {
    "score": HOSTILE, "model": HOSTILE, "patch": (4, 4), "keep": 0.5, "kept": 2, "of": 4, "images": 3, "mass": 0.5,
    "mean_map": [[0.1, 0.2]], "made": True, "file": HOSTILE, "picture": HOSTILE,
}  # fmt: skip
PAIR = {"a": 0, "b": 1, "both": 1, "jaccard": 1.0, "by_chance": 0.1, "spearman": None}
COMPARED = {"kept": [1, 1], "of": 2, "pairs": [PAIR], "kept_by_all": 1, "kept_by_any": 1,
            "classes": [{"class": HOSTILE, "kept": [1, 1], "of": 2}]}  # fmt: skip
PAGES = {
    "ticket": lambda console: terminal.ticket_page(
        [*zip(CLASSES, [1, 0], [1, 1], strict=True)],
        None,
        np.array([0]),
        title=HOSTILE,
        warnings=[HOSTILE],
        out=HOSTILE,
        console=console,
    ),
    "told": lambda console: terminal.ticket_told(
        TICKET, None, np.array([0]), place=HOSTILE, notes=[HOSTILE], picture=HOSTILE, console=console
    ),
    "compared": lambda console: terminal.compare_page([HOSTILE, HOSTILE], COMPARED, notes=[HOSTILE], console=console),
    "patches": lambda console: terminal.patches_page(PATCHES, console=console),
    "pruned": lambda console: terminal.pruned_page(HOSTILE, {}, HOSTILE, [HOSTILE], console=console),
    "plan": lambda console: terminal.plan_page(
        [{"stage": "train", "says": HOSTILE, "why": HOSTILE, "image_forwards": 0, "macs": 0}], console=console
    ),
}


@pytest.mark.parametrize("name", PAGES)
def test_no_page_acts_on_the_terminal(name: str) -> None:
    seen = page(PAGES[name])
    assert not ACTS.search(seen), seen
    assert "[/x] [red]" in seen, "and nothing of it is taken for markup"


@pytest.mark.parametrize("plain", [False, True])
def test_no_event_acts_on_the_terminal(plain: bool) -> None:
    def draw(console: Console) -> None:
        with Terminal(console, plain=plain) as live:
            live.show(Began("train", HOSTILE))
            live.show(Said("train", HOSTILE, level="warning"))

    seen = page(draw)
    assert not ACTS.search(seen), seen
    assert "[/x] [red]" in seen


def test_pictures_have_names_in_them_and_no_more() -> None:
    canvas = Canvas(100, 100)
    canvas.text(1, 1, HOSTILE)
    point = figures.Point(HOSTILE, "dense", 1.0, 2.0)
    for svg in (canvas.svg(HOSTILE, alone=True), figures.trade([point], title=HOSTILE)):
        assert not ACTS.search(svg)
        assert "<script>" not in svg
        svg.encode("utf-8")
    assert canvas.png().startswith(b"\x89PNG")


def test_the_report_shows_names_and_configs_harmlessly(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results(HOSTILE)))
    (tmp_path / "config.yaml").write_text(f"name: {HOSTILE[:-1]}\nseed: 0\n")
    (tmp_path / "log.jsonl").write_text(
        json.dumps({"event": "said", "stage": "x", "level": "warning", "text": HOSTILE}) + "\n"
    )
    seen = render(tmp_path, STAGES)
    assert not ACTS.search(seen)
    assert "[red]\\u202e&lt;script&gt;" in seen
    assert r"\x1b[2J" in seen
    seen.encode("utf-8")


def test_a_refusal_shows_names_harmlessly(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", str(tmp_path / "mk \x1b[2J [/x].yaml")]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert "[/x]" in told

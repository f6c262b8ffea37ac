"""Pages in a real browser, on a telephone and on a desk: no sideways scroll, no cut text. Skipped where no chromium is."""

from __future__ import annotations

import html as text_of
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from run_folder import BLOCKS, STAGES, results

from lotus.report import compare, html

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]
WIDTHS = (390, 1280)
# Each page lies in a frame of that width, since a window is at least 500 pixels wide; nothing is added to the page itself.
ASKS = """<script>addEventListener('load', () => {
  const told = [...document.querySelectorAll('iframe')].map(frame => {
    const there = frame.contentWindow, page = there.document, root = page.scrollingElement, wrong = [];
    if (root.scrollWidth > there.innerWidth) wrong.push('scrolls sideways: ' + root.scrollWidth);
    for (const one of page.querySelectorAll('body *')) {
      const style = there.getComputedStyle(one), words = (one.textContent || '').trim().slice(0, 40);
      const hidden = ['hidden', 'clip'].includes(style.overflowX) && style.textOverflow != 'ellipsis';
      if (hidden && one.clientWidth && one.scrollWidth > one.clientWidth + 1) wrong.push('cut: ' + words);
      if (['auto', 'scroll'].includes(style.overflowX) && one.tagName != 'PRE' && one.scrollWidth > one.clientWidth + 1)
        wrong.push('scrolls inside: ' + words);
    }
    for (const one of page.querySelectorAll('td:first-child')) {
      const long = Math.max(0, ...one.textContent.split(/\\s+/).map(word => word.length));
      if (long > 3 && one.clientWidth < 6 * Math.min(long, 12)) wrong.push('broken into letters: ' + one.textContent);
    }
    for (const one of page.querySelectorAll('svg text')) {
      const box = one.getBoundingClientRect(), all = one.ownerSVGElement.getBoundingClientRect();
      if (box.width && (box.left < all.left - 1 || box.right > all.right + 1)) wrong.push('cut: ' + one.textContent);
    }
    return {width: there.innerWidth, wrong};
  });
  document.body.innerHTML = '';
  document.body.setAttribute('data-told', JSON.stringify(told));
});</script>"""


def faults(pages: list[str], folder: Path) -> list[dict[str, Any]]:
    """What is wrong with each page at each width."""
    frames = [
        f'<iframe srcdoc="{text_of.escape(page)}" style="width:{width}px;height:800px;border:0"></iframe>'
        for page in pages
        for width in WIDTHS
    ]
    file = folder / "frames.html"
    file.write_text(f'<!doctype html><meta charset="utf-8"><body>{"".join(frames)}{ASKS}', encoding="utf-8")
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom",
         f"--user-data-dir={folder / 'profile'}", file.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    found = re.search(r'data-told="([^"]*)"', done.stdout)
    assert found, done.stderr[-1000:]
    return json.loads(text_of.unescape(found[1]))


def row(name: str, top1: float, spent: float) -> compare.Row:
    return compare.Row(
        name, top1, 10_000, 20_892_416, 1_218_186, spent, 7_260.0, ((spent / 2, top1 - 9), (spent, top1))
    )


def test_the_browser_sees_what_is_too_wide(tmp_path: Path) -> None:
    pages = ['<div style="width:2000px">wide</div>', '<svg width="100"><text x="90">cut at the edge</text></svg>']
    told = faults(pages, tmp_path)
    assert [one["width"] for one in told] == [*WIDTHS, *WIDTHS]
    assert all(one["wrong"] for one in told)


def test_a_report_fits_a_telephone_and_a_desk(finished: Path, tmp_path: Path) -> None:
    section = {
        "stage": "train", "title": "Cut in the training", "text": "It went on.", "plot": None,
        "columns": ["after step", "epoch", "MACs", "parameters", "top-1 before", "top-1 after"],
        "rows": [["1,170", "12", "0.349", "0.366", "75.42 %", "75.38 %"]],
    }  # fmt: skip
    size = {"keep": 0.4, "top1": 93.21, "loss": 0.7, "params": 81_000, "macs": 1_452_000}
    latency = {"asked": 0.4, "predicted": 0.41, "measured": 0.427, "dense_ms": 31.2, "batch": 64, "device": "cpu"}
    found = results("a-run-of-a-rather-long-name-that-nobody-broke-into-words")
    found["validation_images"] = 359  # a standard error with each top-1
    found["kept"]["blocks"] = [{**BLOCKS[0], "of_hidden": 3_072, "hidden": 1_536}, *BLOCKS[1:]]
    found["prune"]["sizes"] = {"0.4": {**size, "latency": latency}}
    more = tmp_path / "run"
    more.mkdir()
    (more / "results.json").write_text(json.dumps({**found, "sections": [section]}))
    pages = [html.render(finished, STAGES), html.render(more, STAGES)]
    assert [one["wrong"] for one in faults(pages, tmp_path)] == [[]] * 4


def test_a_comparison_fits_a_telephone_and_a_desk(tmp_path: Path) -> None:
    names = [
        "runs/cifar10",
        "/home/somebody/experiments/2026/vit-small-augreg/cifar10-half-of-the-macs-third-of-the-cost",
    ]
    page = compare.page([row(name, 75.4 - 9 * number, 3.3e15) for number, name in enumerate(names)])
    assert [one["wrong"] for one in faults([page], tmp_path)] == [[]] * 2

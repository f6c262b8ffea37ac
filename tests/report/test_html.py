"""The report: whole, escaped, self-contained, and silent about what a run did not leave."""

import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from run_folder import BLOCKS, STAGES, log, results

from lotus.report import figures, html, ledger, terminal
from lotus.report import lines as told_lines
from lotus.report.figures import Point, Series
from lotus.stage import Plot, Section
from selection.errors import Refused
from selection.subset import Subset

NASTY = '<script>alert("1")</script>&\'[b]'


class Balanced(HTMLParser):
    """Every tag that opens is closed, in order."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(text):
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return parser


def bare(tmp_path, **change):
    """A folder with results.json alone."""
    (tmp_path / "results.json").write_text(json.dumps({**results(), **change}))
    return tmp_path


def cells(text):
    """In a line, without the names of columns that a narrow screen shows beside each number."""
    return re.sub(r' data-label="[^"]*"', "", " ".join(text.split()))


def test_the_whole_report(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    file = html.write(folder, STAGES)
    assert file == folder / "report.html"
    text = file.read_text()
    page = parsed(text)
    assert page.seen.count("svg") == 8  # two of widths, accuracy, loss, trade, gates, scores, classes
    assert page.seen.count("img") == 48
    for said in (
        "0.55 points below",
        "cost more than it saves",
        "What was kept",
        "Which images",
        "config.yaml",
        "torch 2.15.0",
    ):
        assert said in text
    assert not list(folder.glob(".report*"))
    # the same folder gives the same page
    assert html.write(folder, STAGES).read_text() == text


def test_nothing_is_fetched_and_nothing_runs(finished, tmp_path):
    text = html.render(finished, STAGES)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:image/png;base64,)", text)
    assert "://" not in text
    assert "<script" not in text
    assert "default-src 'none'" in text


def test_a_narrower_stream_and_a_budget_of_latency_are_told(finished, tmp_path):
    found = results()
    latency = {"asked": 0.5, "predicted": 0.4876, "measured": 0.5049, "dense_ms": 31.2, "batch": 64, "device": "cpu"}
    found["kept"] |= {"width": {"kept": 48, "of": 64}, "latency": latency}
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text(json.dumps(found))
    text = html.write(tmp_path / "run", STAGES).read_text()
    lines = told_lines.kept_lines(found["kept"])
    assert "48 of 64 channels" in text
    assert "embed dim   48 of the residual stream's 64 channels (75 %)" in lines
    told = "asked 0.500 | predicted 0.488 | measured 0.505 of the dense model's time, at a batch of 64 on cpu"
    assert f"latency     {told}" in lines
    assert told in text.replace("&#39;", "'")
    assert ledger.latency_told({**latency, "measured": None}).startswith("asked 0.500 | predicted 0.488 of")


def test_what_is_missing_is_left_out(tmp_path):
    folder = bare(tmp_path)
    text = html.render(folder, STAGES)
    page = parsed(text)
    assert page.seen.count("svg") == 3  # two of widths, and trade: all that results.json tells
    for absent in ("Which images", "config.yaml", "Gates", "Accuracy over"):
        assert absent not in text
    few = {"format": 2, "finetune": {"top1": 90.0}}
    (tmp_path / "results.json").write_text(json.dumps(few))
    assert "The model is done." in html.render(folder, STAGES)
    without = {key: value for key, value in results().items() if key != "baseline"}
    (tmp_path / "results.json").write_text(json.dumps(without))
    assert "before the cut" in html.render(folder, STAGES)
    assert "(estimated)" in html.render(folder, STAGES)


def test_names_are_escaped(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    told = results(NASTY)
    told["ledger"]["stages"].append({"stage": NASTY, "part": "apart", "seconds": 1, "image_forwards": 0, "macs": 0})
    told["ledger"]["verdict"] = NASTY
    (folder / "results.json").write_text(json.dumps(told))
    (folder / "versions.txt").write_text(NASTY)
    (folder / "log.jsonl").write_text(json.dumps({"event": "said", "stage": "x", "level": "warning", "text": NASTY}))
    text = html.render(folder, STAGES)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 5
    parsed(text)
    for svg in (
        figures.curves([Series(NASTY, "lotus", [0, 1], [1, 2])], title=NASTY, x=NASTY, y=NASTY, level=(1, NASTY)),
        figures.trade([Point(NASTY, "dense", 1.0, 2.0)], title=NASTY),
        figures.scores(np.arange(5.0), np.array([1]), name=NASTY),
    ):
        assert "<script" not in svg
        parsed(svg)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 1, "final": {}}', '{"format": 2}'])
def test_a_folder_without_results_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(Refused, match=re.escape(str(tmp_path))):
        html.write(tmp_path, STAGES)
    assert not (tmp_path / "report.html").exists()


def test_a_training_that_was_begun_again_is_drawn_once():
    lines = log(("train",))
    first = [event for event in lines if event["event"] == "evaluated"]
    broken = [*first[:7], *first[5:9], *first]
    assert [epoch for epoch, _ in html.evaluations(broken, "train")] == list(range(1, 21))
    assert html.evaluations([*first, *first[:3]], "train")[-1][0] == 3
    assert len(html.last_course(lines + lines[:11], "train", "open_macs")) == 5
    assert html.evaluations(lines, "baseline") == []


def test_scores_of_the_users_own_are_shown_as_the_ticket_carries_them(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    ticket = Subset.load(folder / "subset.npz")
    scores = np.random.default_rng(0).normal(size=ticket.total)
    scores[-1] = 1234.5
    own = Subset(
        ticket.rows, ticket.total, fingerprint=ticket.fingerprint, weights=ticket.weights,
        known=ticket.known._replace(scores=scores), origin={"score": "mine"},
    )  # fmt: skip
    own.save(folder / "subset.npz")
    text = html.render(folder, STAGES)
    assert "Which images" in text
    assert f"row {ticket.total - 1}" in text
    assert "mine 1234" in text


def test_a_ticket_without_scores_shows_none(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    ticket = Subset.load(folder / "subset.npz")
    Subset(ticket.rows, ticket.total, fingerprint=ticket.fingerprint).save(folder / "subset.npz")
    assert "Which images" not in html.render(folder, STAGES)


def test_images_that_are_gone_are_left_out_and_the_scores_stay(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(folder / "data")
    page = parsed(html.render(folder, STAGES))
    assert "img" not in page.seen
    assert page.seen.count("svg") == 8


# ----------------------------------------------------------------------------------------------------------- figures


def svg_of(text):
    return ElementTree.fromstring(text[: text.index("</svg>") + 6])


def test_bars_are_as_long_as_what_is_kept():
    bars = [
        (bar.get("class"), float(bar.get("width"))) for text in figures.widths(BLOCKS) for bar in svg_of(text).iter("rect")
    ]  # fmt: skip
    assert len(bars) == 16
    for number, block in enumerate(BLOCKS):
        (_, was), (_, now) = bars[8 + 2 * number : 10 + 2 * number]
        assert now / was == pytest.approx(block["hidden"] / 256, abs=0.01)


def test_the_histogram_counts_every_image_once():
    rng = np.random.default_rng(0)
    values = rng.normal(size=500)
    svg = svg_of(figures.scores(values, np.flatnonzero(values > 0), name="s"))
    heights = {
        kind: sum(float(bar.get("height")) for bar in svg.iter("rect") if bar.get("class") == kind)
        for kind in ("pale", "fill lotus")
    }
    assert heights["fill lotus"] / heights["pale"] == pytest.approx((values > 0).mean(), abs=0.01)
    assert figures.scores(np.full(3, np.inf), np.array([0]), name="s") == ""
    assert "2 images without a bound" in figures.scores(np.array([1.0, np.inf, np.inf]), np.array([0]), name="s")


def test_pictures_have_titles_and_stay_inside():
    made = (
        figures.curves([Series("a", "dense", [1, 2, 3], [5, float("nan"), 7])], title="T", x="x", y="y"),
        figures.curves([Series("a", "dense", [1], [5])], title="T", x="x", y="y", bounds=(0, 100)),
        figures.trade([Point("a", "dense", 4e6, 98.0), Point("b", "lotus", 4e6, 98.0), Point("c", "tune", 2e6, 98.0)]),
        *figures.widths(BLOCKS),
    )
    for text in made:
        svg = svg_of(text)
        assert svg.find("title").text == svg.get("aria-label")
        width, height = map(float, svg.get("viewBox").split()[2:])
        for mark in svg.iter("circle"):
            assert 0 <= float(mark.get("cx")) <= width
            assert 0 <= float(mark.get("cy")) <= height
    assert figures.curves([Series("a", "dense", [], [])], title="T", x="x", y="y") == ""
    assert (figures.trade([]), figures.widths([])) == ("", [])


def test_ticks_are_round():
    assert figures.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert figures.ticks(0.31, 0.92) == pytest.approx([0.4, 0.6, 0.8])
    assert figures.ticks(0, 28_740, most=6) == [0, 5000, 10_000, 15_000, 20_000, 25_000]


def test_small_images_keep_their_pixels_and_large_ones_shrink():
    import base64

    from PIL import Image

    def back(uri):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))

    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(back(figures.tile(small)), small)
    assert back(figures.tile(np.zeros((300, 200, 3), np.uint8))).shape == (96, 64, 3)


def test_zeros_are_told_for_what_they_are(tmp_path):
    kept = {**results()["kept"], "weights": {"kept": 900, "of": 1000, "list": "linears", "bytes": 2e5, "of_bytes": 3e5}}
    text = html.render(bare(tmp_path, kept=kept), STAGES)
    parsed(text)
    assert "900 of 1,000; the others are zeros in matrices of the old shape: no MACs and no time are saved" in text
    assert "the compressed file takes 200 kB instead of 300 kB" in text
    assert "as fast" not in text.split("</h1>")[0], "a model of the same shapes is as fast"


def test_a_section_of_a_stage_shows_its_table_and_its_picture(tmp_path):
    plot = Plot("Of <all>", "x", "y", (("one & two", (0.0, 50.0), (80.0, 20.0)),), (0, 100), (79.0, "below"))
    section = Section("Its <title>", "What it says", ("", "n"), (("a", "-1"),), plot)
    told = [{"stage": "prune", **dataclasses.asdict(section)}]
    text = html.render(bare(tmp_path, sections=json.loads(json.dumps(told))), STAGES)
    parsed(text)
    for shown in ("Its &lt;title&gt;", "What it says", "<td>-1</td>", "Of &lt;all&gt;", "one &amp; two", "below"):
        assert shown in text, shown
    assert "Its &lt;title&gt;" in html.render(bare(tmp_path, sections=[{**told[0], "plot": None}]), STAGES)


def test_what_a_search_tried_is_drawn(tmp_path):
    row = {"macs": 4e6, "worse": 0.1}
    found = {
        "format": 1,
        "metric": "divergence",
        "tried": [row, {"macs": 8e6, "worse": 0.0}, {"macs": 5e6, "worse": 0.3}],
        "pareto": [{"macs": 8e6, "worse": 0.0}, row],
        "rows": [{"macs": 6e6, "worse": 0.4}],
        "rival": "CP-ViT, fixed ratio",
        "chosen": row,
    }
    folder = bare(tmp_path)
    assert "What the search tried" not in html.render(folder, STAGES)
    file = folder / "search.json"
    file.write_text(json.dumps(found))
    text = html.render(folder, STAGES)
    parsed(text)
    assert "What the search tried" in text
    assert "CP-ViT, fixed ratio" in text
    assert text.count('class="pale" cx=') == 3
    broken: Any
    for broken in (
        {**found, "tried": 3},
        {**found, "format": 9},
        [],
        {**found, "chosen": {}},
        {"format": 1, "kind": "convolve"},
    ):
        file.write_text(json.dumps(broken))
        assert "What the search tried" not in html.render(folder, STAGES)


def test_each_size_is_told(tmp_path):
    found = results()["prune"]
    size = {"keep": 0.4, "top1": 93.21, "loss": 0.7, "params": 81_000, "macs": 1_452_000}
    sizes = {"0.4": size, "0.8": {**size, "keep": 0.8, "top1": 97.02, "macs": 2_904_000}}
    text = cells(html.render(bare(tmp_path, prune={**found, "sizes": sizes}), STAGES))
    assert text.index("<td>prune-0.8</td>") < text.index("<td>prune-0.4</td>")
    assert "<td>prune-0.4</td><td>1.45 M</td><td>40 %</td><td>81 k</td><td>93.21</td>" in text
    assert "Sizes out of" not in html.render(bare(tmp_path, prune=found), STAGES)


@pytest.mark.parametrize("measured", [True, False])
def test_sizes_that_were_drawn_by_latency_tell_it(measured, tmp_path):
    timed = {"asked": 0.4, "predicted": 0.41, "measured": 0.427 if measured else None, "dense_ms": 31.2, "batch": 64, "device": "cpu"}  # fmt: skip
    size = {"keep": 0.4, "top1": 93.21, "loss": 0.7, "params": 81_000, "macs": 1_452_000, "latency": timed}
    after = {**results()["prune"], "sizes": {"0.4": size}}
    text = cells(html.render(bare(tmp_path, prune=after), STAGES))
    share = "42.7 %" if measured else "41 %"
    assert "<th>of dense</th><th>latency of dense</th><th>parameters</th>" in text
    assert f"<td>1.45 M</td><td>40 %</td><td>{share}</td><td>81 k</td>" in text
    assert f"Latency at a batch of 64 on cpu{'' if measured else ', predicted'}." in text
    written = io.StringIO()
    page = Console(width=120, file=written)
    terminal.last_page({**results(), "prune": after}, "report.html", STAGES, page)
    line = f"prune-0.4   40 % of the MACs, {share} of the latency, 81 k parameters, top-1 93.21 % right after the cut"
    assert line in written.getvalue()
    del size["latency"]
    assert told_lines.size_lines({**results(), "prune": after}, STAGES) == [
        line.replace(f"{share} of the latency, ", "")
    ]
    assert "latency of dense" not in html.render(bare(tmp_path, prune=after), STAGES)


def test_a_block_that_convolves_says_so():
    text = figures.widths([{**BLOCKS[0], "kernel": 3, "heads": 1, "head_dim": 16}])[0]
    assert "3x3 convolution" in text

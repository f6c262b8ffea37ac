"""The terminal as text: a console of fixed width that writes into a string, and a clock that we turn."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from run_folder import STAGES, results

from lotus.events import Began, Ended, Evaluated, Pruned, Said, Skipped, Step, Wrote
from lotus.report import lines, terminal
from lotus.report.live import JsonLines, Quiet, Terminal


class Page:
    """A console of 100 columns."""

    def __init__(self, **args):
        self.out = io.StringIO()
        self.console = Console(file=self.out, width=100, highlight=False, **args)

    @property
    def text(self):
        return self.out.getvalue()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def step(done, stage="train", total=100, **values):
    return Step(stage, done, total, values=values)


def play(page, events, plain, tick=1.0):
    clock = Clock()
    with Terminal(page.console, plain=plain, clock=clock) as shown:
        for event in events:
            shown.show(event)
            clock.now += tick
    return page.text


def test_speed_waiting_tokens_and_side_are_told_where_they_are_known():
    values = {"images_per_second": 1000.0, "mfu": 0.413, "stall": 0.05, "patches": 0.7, "side": 160.0, "epoch": 3}
    told = "epoch 3, 1,000 images/s, MFU 41 %, waits for images 5 %, patches 70 %, side 160, 1 min 29 s left"
    assert told in play(Page(), [step(i, **values) for i in range(1, 12)], True)
    quiet = play(Page(), [step(i, stall=0.01, patches=1.0) for i in range(1, 12)], True)
    assert "steps 11 of 100, 1 min 29 s left" in quiet


def test_of_a_long_run_it_is_told_when_all_of_it_ends():
    """Training at a step a second: 100 steps of it, then half as much again; before it came what does not count any more."""
    asked = []

    def ahead():
        asked.append(1)
        return {"prepare": 0.0, "score": 9e9, "train": 2e9, "prune": 0.0, "finetune": 1e9}

    page, clock = Page(), Clock()
    with Terminal(page.console, plain=True, clock=clock, ahead=ahead) as shown:
        shown.show(Skipped("score"))
        for done in range(1, 60):
            shown.show(step(done))
            clock.now += 1
    told = page.text.splitlines()
    assert "of the run" not in told[1] + told[2] + told[3]
    assert "steps 41 of 100, 59 s left, about 1 min 49 s of the run" in page.text
    assert len(asked) == 1


@pytest.mark.parametrize("narrow", [30, 60])
def test_no_frame_is_wider_than_the_terminal_is_by_then(narrow):
    page, clock = Page(force_terminal=True), Clock()
    values = {
        "epoch": 1,
        "images_per_second": 1e6,
        "loss": 0.4,
        "zero_gates": 0.1,
        "stall": 0.3,
        "patches": 0.6,
        "side": 96,
    }
    with Terminal(page.console, plain=False, clock=clock) as shown:
        shown.show(Began("train", "not done yet"))
        shown.show(step(1, **values))
        page.console.width, before = narrow, len(page.text)
        clock.now += 1
        shown.show(step(2, **values))
        drawn = page.text[before:]
    plain = Console(file=io.StringIO(), width=200)
    assert drawn
    assert max(len(plain.render_str(line).plain.strip()) for line in strip(drawn).splitlines()) <= narrow


def strip(text):
    """Without what moves the cursor and colors."""
    import re

    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)


def test_json_is_a_line_an_event_and_quiet_has_warnings_alone(capsys):
    events = [
        Began("train", "x"),
        step(1, loss=float("nan")),
        Said("train", "all is well"),
        Said("train", "look", "warning"),
    ]
    for event in events:
        JsonLines().show(event)
        Quiet().show(event)
    out, err = capsys.readouterr()
    told = [json.loads(line) for line in out.splitlines()]
    assert [one["event"] for one in told] == ["began", "step", "said", "said"]
    assert told[1]["values"] == {"loss": None}
    assert err == "! train: look\n"


def test_plain_lines_come_at_begin_every_ten_seconds_after_an_evaluation_and_at_the_end():
    values = {"epoch": 1, "images_per_second": 2310.4, "loss": 0.41234, "zero_gates": 0.125}
    events = [Began("train", "train.lr: 0.001 -> 0.002"), *(step(i, **values) for i in range(1, 25))]
    events += [
        Evaluated("train", 1, {"top1": 97.123, "loss": 0.3}),
        Ended("train", 26.4, {"top1": 97.5, "macs": 1.8e6}),
    ]
    lines = play(Page(), events, None).splitlines()
    assert lines == [
        "  train     begins (train.lr: 0.001 -> 0.002)",
        "  train     steps 10 of 100, epoch 1, 2,310 images/s, loss 0.412, zero gates 12 %, 1 min 30 s left",
        "  train     steps 20 of 100, epoch 1, 2,310 images/s, loss 0.412, zero gates 12 %, 1 min 20 s left",
        "  train     epoch 1: top-1 97.12 %, loss 0.3000",
        "✓ train     26 s top-1 97.50 %, 1.8 M MACs",
    ]


def test_one_is_one():
    events = [Ended("prepare", 1, {"skipped": 1}), Ended("prepare", 1, {"skipped": 2})]
    assert [line.split(" s ")[1] for line in play(Page(), events, None).splitlines()] == [
        "1 damaged image skipped",
        "2 damaged images skipped",
    ]


def test_plain_lines_are_never_broken_nor_colored():
    page = Page()
    page.console.width = 20
    text = play(page, [Said("train", "a long\nsentence " * 10, "warning"), Began("train", "x")], None)
    assert len(text.splitlines()) == 2
    assert "\x1b" not in text


def test_what_users_wrote_is_no_markup():
    events = [Began("train", "[bold]x[/]"), Said("train", "[red]careful[/red] [/nope]", "warning"), Ended("train", 1.0)]
    for plain in (True, False):
        assert "[red]careful[/red] [/nope]" in play(Page(force_terminal=True, color_system=None), events, plain)


def test_the_live_display_leaves_one_line_a_stage():
    page = Page(force_terminal=True, color_system=None)
    events = [
        Began("score", "not done yet"), step(1, "score"), Ended("score", 3.2),
        Began("train", "not done yet"), *(step(i, epoch=1, loss=2.0, images_per_second=100.0) for i in range(1, 101)),
        Evaluated("train", 1, {"top1": 50.0, "loss": 9.9}), step(100, epoch=1, loss=2.0), Wrote("train", "trained"),
        Ended("train", 101.0, {"top1": 50.0}), Skipped("prune"),
    ]  # fmt: skip
    text = play(page, events, False)
    assert text.count("✓ score") == text.count("✓ train") == 1
    assert "✓ train     1 min 41 s  top-1 50.00 %" in text
    assert "50/100" in text
    assert "epoch 1  100 images/s  loss 2.000" in text
    assert "50 s left" in text
    assert "top-1 50.00 %" in text
    assert "9.900" not in text  # the loss shown while training is the training loss
    assert text.endswith("\x1b[?25h\x1b[1A\x1b[2K") or "\x1b[?25h" in text  # the cursor is back


def test_the_cursor_comes_back_after_an_exception():
    page = Page(force_terminal=True, color_system=None)
    shown = Terminal(page.console)
    assert not shown.plain
    with pytest.raises(RuntimeError, match="broken off"), shown:
        raise _after(shown.show, Began("train", "x"))
    assert "\x1b[?25h" in page.text


def _after(act, event):
    act(event)
    return RuntimeError("broken off")


def test_a_resumed_stage_is_timed_from_where_it_went_on():
    page = Page()
    events = [Began("train", "x"), *(step(80 + i) for i in range(1, 12))]
    assert "steps 90 of 100, 10 s left" in play(page, events, True)


def test_a_second_proxy_is_timed_anew():
    text = play(Page(), [Began("score", "x"), *(step(i, "score") for i in (*range(1, 101), *range(1, 20)))], True)
    assert "steps 10 of 100, 1 min 30 s left" in text.splitlines()[-1]


def test_no_color_is_honored(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    page = Page(force_terminal=True)
    text = play(page, [Began("train", "x"), step(3), Ended("train", 1.0), Said("t", "x", "warning")], False)
    assert "\x1b[3" not in text.replace("\x1b[?25", "")


def test_a_console_without_unicode_gets_other_marks():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=out, width=100)
    with Terminal(console, plain=True) as shown:
        shown.show(Ended("train", 1.0))
        shown.show(Pruned("prune", {"macs": 4e6}, {"macs": 2e6}))
    terminal.last_page(results(), "r.html", STAGES, console)
    terminal.ticket_page([("a", 1, 2)], np.array([0.1, 0.9]), np.array([1]), console=console)
    out.seek(0)
    assert "* train" in out.read()


def test_the_last_page_says_it_all():
    page = Page()
    terminal.last_page(results(), "runs/[digits]/report.html", STAGES, page.console)
    text = " ".join(page.text.split())
    assert (
        "At 1.25 x the dense training's computing, with 50 % of the images and 49.6 % of the MACs, LOTUS reaches a top-1 of 98.06 %, 0.55 points below"
        in text
    )
    assert "Top-1 98.61 % 98.06 % -0.55 points" in text
    assert "MACs an image 3.63 M 1.8 M 0.50 x" in text
    assert "Images trained on, choosing aside 28,740 21,540 0.75 x" in text
    assert "Latency, batch of 64, cpu fp32 31.2 ms 17.9 ms 0.57 x" in text
    assert "718 of 1,437 (50 %)" in text
    assert "128 of 256 attention dimensions and 512 of 1,024 MLP units" in text
    assert "cost more than it saves" in text
    assert page.text.rstrip().endswith("report: runs/[digits]/report.html")


def test_the_last_page_of_a_run_without_a_baseline():
    page = Page()
    terminal.last_page(
        {k: v for k, v in results().items() if k not in ("baseline", "ledger")}, "report.html", STAGES, page.console
    )
    assert "before the cut" in page.text


def test_a_table_of_a_stage_has_its_heads():
    page = Page()
    told = {"title": "Cuts", "text": "Two.", "columns": ["after step", "MACs"], "rows": [["9", "0.6"], ["20", "0.35"]]}
    terminal.last_page({**results(), "sections": [told]}, "r.html", STAGES, page.console)
    lines = [line.split() for line in page.text.splitlines()]
    at = lines.index(["Cuts:", "Two."])
    assert lines[at + 1] == ["after", "step", "MACs"]
    assert lines[at + 3 : at + 5] == [["9", "0.6"], ["20", "0.35"]]


def test_the_ticket_page():
    page = Page()
    scores = np.concatenate([np.arange(100.0), [np.inf]])
    terminal.ticket_page(
        [("[cat]", 30, 50), ("dog", 21, 51)], scores, np.arange(50, 101), title="el2n, ccs", warnings=["careful"],
        out="t.npz", console=page.console,
    )  # fmt: skip
    text = page.text
    assert "[cat]" in text
    assert "60 %" in text
    assert "written to t.npz" in text
    assert "! careful" in text
    bars = [line for line in text.splitlines() if "░" in line or "█" in line]
    assert len(bars) == 17
    assert "░" not in bars[-2]
    assert "█" not in bars[0]
    assert "no bound" in bars[-1]
    assert sum(int(bar.split()[-3]) for bar in bars) == 51


def test_many_classes_are_summed_up():
    page = Page()
    terminal.ticket_page([(f"class{i}", 1, 4) for i in range(1000)], None, np.arange(1000), console=page.console)
    assert "and 961 more" in page.text
    assert "25 % to 25 %" in page.text
    assert len(page.text.splitlines()) < 50


def test_constant_scores_have_a_histogram():
    assert lines.histogram(np.ones(4), np.array([0])) == [f"{'1':>10}  {'█' * 11 + '░' * 33}  1 of 4"]
    assert len(lines.histogram(np.full(3, np.inf), np.array([0]))) == 1


def test_the_plan_page():
    page = Page()
    rows = [
        {"stage": "score", "says": "watch", "why": None, "image_forwards": 5e6, "macs": 5e12},
        {"stage": "train", "says": "train [x]", "why": "train.lr: 1 -> 2", "image_forwards": 43_110, "macs": 1.7e11},
    ]
    terminal.plan_page(rows, page.console)
    text = " ".join(page.text.split())
    assert "score watch done before train train [x] train.lr: 1 -> 2 43.1 k 170 G" in text
    assert "to do 1 of 2 stages 43.1 k 170 G" in text


def test_the_doctor_page():
    from lotus.doctor import Check

    page = Page()
    terminal.doctor_page(
        [Check("python", "3.11"), Check("ffcv", "missing", "pip install"), Check("torch", "old", "renew", True)],
        page.console,
    )
    lines = [" ".join(line.split()) for line in page.text.splitlines()]
    assert lines == [
        "✓ python 3.11",
        "! ffcv missing",
        "pip install",
        "x torch old",
        "renew",
        "Not fit: 1 to mend before a run can work.",
    ]

"""What anyone's names do to a terminal or a page: nothing."""

from __future__ import annotations

import sys

import pytest

from selection.shown import shown


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("plain", "plain"),
        ("Ölvögel [red] <b> 鳥 🐦", "Ölvögel [red] <b> 鳥 🐦"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("a\rb\nc\td", r"a\x0db\x0ac\x09d"),
        ("a\u202egpj.exe", r"a\u202egpj.exe"),
        ("a\u2028b\x7f", r"a\u2028b\x7f"),
        (b"\xff".decode("utf-8", "surrogateescape"), r"\udcff"),
        ("\U000e0041", r"\U000e0041"),
        ("می‌خواهم", "می‌خواهم"),
    ],
)
def test_what_acts_is_written_out(name: str, seen: str) -> None:
    assert shown(name) == seen


def test_a_message_keeps_its_lines() -> None:
    assert shown("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"


def test_every_sign_can_be_written_and_shown_again() -> None:
    whole = "".join(map(chr, range(sys.maxunicode + 1)))
    once = shown(whole)
    once.encode("utf-8")
    assert shown(once) == once
    assert not any(ord(sign) < 32 or 0x7F <= ord(sign) < 0xA0 for sign in once)

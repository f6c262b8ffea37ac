"""docs/troubleshooting.md has every refusal of the code, with its cure, and is as the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tools import refusals

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_is_fresh() -> None:
    assert refusals.PAGE.read_text(encoding="utf-8") == refusals.page(), "python tools/refusals.py writes it anew"


def test_every_refusal_has_its_entry_but_those_that_pass_on_the_words_of_another() -> None:
    sites = 0
    for top in ("selection", "lotus"):
        for file in sorted((ROOT / top).rglob("*.py")):
            source = file.read_text(encoding="utf-8")
            module = refusals.module(file)
            sites += source.count("Refused(")
            told = module.sites
            own = [call for call, _ in told if any(map(_sentence, ast.walk(call.args[0])))]
            texts = module.messages
            assert not own or texts, file
            for call in own:
                words = [word for node in ast.walk(call.args[0]) if (word := _sentence(node))]
                assert any(word in text for word in words for text in texts), f"{file}:{call.lineno}"
    assert sites > 500


def _sentence(node: ast.AST) -> str:
    """The longest run of words of a text in the source, as it is printed; empty where it says nothing."""
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        return ""
    found = re.sub(r"\s+", " ", node.value).strip()
    return found if re.search(r"[a-z]{3,} [a-z]", found) else ""


def test_a_message_is_put_together_from_where_it_is_said() -> None:
    source = """
def broken(why):
    return Refused(f"{file}: {why}. Run prepare.")

def opened(path, deep):
    cure = "Put it back." if deep else "Make it."
    if gone:
        raise broken("it is gone")
    raise Refused(f"{path.name}: {len(rows)} rows. " + cure)
"""
    assert sorted(refusals.Module(source).messages) == [
        "FILE: it is gone. Run prepare.", "NAME: ROWS rows. Make it.", "NAME: ROWS rows. Put it back."
    ]  # fmt: skip

"""Every refusal of LOTUS, read from its source: ``python tools/refusals.py`` writes docs/troubleshooting.md anew.

What stands in that page above :data:`MARK` is written by hand and stays. Below it each ``Refused(...)`` of the code and each row of the
table of rules has an entry, under what it speaks of: its message, and its cure. What is filled in stands there in capitals.
"""

from __future__ import annotations

import ast
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
MARK = "<!-- What follows is written by python tools/refusals.py -->"
PARTS = (  # title, and the rooms of lotus that speak of it; the last has all others
    ("Settings", ("config", "yaml_safe", "shelves", "way")),
    ("What goes with what", ()),
    ("Pictures and .beton files", ("data",)),
    ("Models and weights", ("vit",)),
    ("Training", ("training",)),
    ("Sparsity and pruning", ("sparsity", "pruning")),
    ("Published systems", ("papers",)),
    ("Signals, scores and tickets", ("ticket",)),
    ("Looking at pictures", ("inspect",)),
    ("Export and prediction", ("export", "predict", "onnx_file", "card")),
    ("Reports", ("report",)),
    ("Runs and their files", ("",)),
)
_WIDTH = 108
_MOST = 24
"""Ways in which one message may be put together, beyond which one stands for all."""


def main() -> int:
    """Writes the page; what stands above the mark stays."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """docs/troubleshooting.md as it should be."""
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    found: dict[str, set[str]] = {title: set() for title, _ in PARTS}
    for name, text in refusals():
        found[_part(name)].add(text)
    found["What goes with what"] = set(_rules())
    lines = [MARK, "", "## Every refusal", "", textwrap.fill(_ABOUT, _WIDTH), ""]
    for title, texts in found.items():
        if texts:
            lines += [f"### {title}", "", *(_entry(text) for text in sorted(texts, key=_sorted)), ""]
    return by_hand + "\n".join(lines).rstrip() + "\n"


_ABOUT = (
    "By what they speak of; search this page for a few words of yours. In capitals stands what is filled in: a file, a setting, a "
    "number. After the dash stands the cure."
)


def refusals() -> Iterator[tuple[str, str]]:
    """(module, message) of each ``Refused(...)``, as it reads with names for what is filled in."""
    for top in ("selection", "lotus", "tools"):
        for file in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            for text in module(file).messages:
                yield name, text


@functools.cache
def module(file: Path) -> Module:
    """That of a file, which is read once."""
    return Module(file.read_text(encoding="utf-8"))


class Module:
    """The refusals of one file."""

    def __init__(self, source: str) -> None:
        self._tree = ast.parse(source)
        self._functions = {node.name: node for node in ast.walk(self._tree) if isinstance(node, ast.FunctionDef)}
        self._calls = [node for node in ast.walk(self._tree) if isinstance(node, ast.Call)]
        self._top = self._assigned([node for node in self._tree.body if isinstance(node, ast.Assign)])

    @functools.cached_property
    def sites(self) -> list[tuple[ast.Call, ast.FunctionDef | None]]:
        """Each ``Refused(...)``, with the function that it is in."""

        def walk(node: ast.AST, inside: ast.FunctionDef | None) -> Iterator[tuple[ast.Call, ast.FunctionDef | None]]:
            inside = node if isinstance(node, ast.FunctionDef) else inside
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refused" and node.args:
                yield node, inside
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inside)

        return list(walk(self._tree, None))

    @functools.cached_property
    def messages(self) -> list[str]:
        """What they say; those that pass on another's words say nothing of their own."""
        told = (self._texts(call.args[0], inside, ())[:_MOST] for call, inside in self.sites)
        texts = (re.sub(r"\s+", " ", text).strip() for one in told for text in one)
        return [text for text in texts if re.search(r"[a-z]{3}", text)]

    def _texts(self, node: ast.expr, inside: ast.FunctionDef | None, seen: tuple[str, ...]) -> list[str]:
        """The texts that an expression may be."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            return _joined([self._texts(part, inside, seen) for part in node.values])
        if isinstance(node, ast.FormattedValue):
            return self._texts(node.value, inside, seen)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return _joined([self._texts(part, inside, seen) for part in (node.left, node.right)])
        if isinstance(node, ast.IfExp):
            return [text for part in (node.body, node.orelse) for text in self._texts(part, inside, seen)]
        if isinstance(node, ast.BoolOp):
            return [text for part in node.values for text in self._texts(part, inside, seen)][:1]
        if isinstance(node, ast.Name):
            return self._of_name(node.id, inside, seen)
        if isinstance(node, ast.Call):
            return self._returned(node, seen) or [_word(node)]
        return [_word(node)]

    def _of_name(self, name: str, inside: ast.FunctionDef | None, seen: tuple[str, ...]) -> list[str]:
        """What a variable was set to, or a parameter is given by the callers in this file; else its name."""
        key = f"{inside.name if inside else ''}.{name}"
        if key in seen:
            return [name.upper()]
        seen = (*seen, key)
        values = [*(self._assigned(inside.body) if inside else {}).get(name, []), *self._top.get(name, [])]
        told = [text for value in values for text in self._texts(value, inside, seen)]
        if inside is not None and not told:
            told = [text for value in self._given(name, inside) for text in self._texts(value, None, seen)]
        worded = [text for text in dict.fromkeys(told) if " " in text]
        return worded if worded and len(worded) <= _MOST else [name.upper()]

    def _given(self, name: str, function: ast.FunctionDef) -> Iterator[ast.expr]:
        names = [one.arg for one in function.args.args]
        if name not in names and name not in {one.arg for one in function.args.kwonlyargs}:
            return
        shift = 1 if names[:1] == ["self"] else 0
        for call in self._calls:
            if function.name != getattr(call.func, "id", getattr(call.func, "attr", "")):
                continue
            if name in names and len(call.args) > names.index(name) - shift >= 0:
                yield call.args[names.index(name) - shift]
            yield from (word.value for word in call.keywords if word.arg == name)

    def _returned(self, call: ast.Call, seen: tuple[str, ...]) -> list[str]:
        """What a function of this file returns, where that is text."""
        function = self._functions.get(getattr(call.func, "id", getattr(call.func, "attr", "")))
        if function is None or function.name in seen:
            return []
        values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
        told = [text for value in values for text in self._texts(value, function, (*seen, function.name))]
        return [text for text in told if len(text.split()) > 2]

    @staticmethod
    def _assigned(body: list[ast.stmt]) -> dict[str, list[ast.expr]]:
        found: dict[str, list[ast.expr]] = {}
        for node in (one for statement in body for one in ast.walk(statement) if isinstance(one, ast.Assign)):
            told = isinstance(node.value, (ast.Constant, ast.JoinedStr, ast.IfExp, ast.BinOp, ast.Call))
            if told and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, []).append(node.value)
        return found


def _joined(parts: list[list[str]]) -> list[str]:
    """Every way of putting the parts together; where there are many, the first of each is taken."""
    found = [""]
    for part in parts:
        if len(found) * len(part) > _MOST:
            part = part[:1]
        found = [f"{text}{more}" for text in found for more in part]
    return found


def _word(node: ast.AST) -> str:
    """A name for what is filled in."""
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_").upper()
    if isinstance(node, ast.Name):
        return node.id.strip("_").upper()
    if isinstance(node, ast.Subscript):
        return _word(node.value)
    if isinstance(node, ast.Call):
        inner = node.args[0] if node.args and getattr(node.func, "attr", "") in ("join", "") else node.func
        return (
            _word(inner) if not isinstance(inner, (ast.GeneratorExp, ast.ListComp)) else _word(inner.generators[0].iter)
        )
    return "..."


def _rules() -> Iterator[str]:
    """The rows of the table, by their examples."""
    from lotus.config import table

    for _, rows in table.PARTS:
        for row in table.one_by_one(rows()):
            place, told = table.sentence(row)
            yield f"{place}: {told}."


def _part(module: str) -> str:
    top, _, room = module.partition(".")
    named = (title for title, rooms in PARTS if room.split(".")[0] in rooms)
    return "Signals, scores and tickets" if top == "selection" else next(named, PARTS[-1][0])


def _sorted(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def _entry(text: str) -> str:
    """A message, and its cure after a dash."""
    parts = re.split(r"(?<!e\.g)(?<!i\.e)\. (?=\W?[A-Z])", re.sub(r"\.\.\.+", "…", text), maxsplit=1)
    what, cure = parts[0], "".join(parts[1:])
    ticks = "``" if "`" in what else "`"
    told = f"{ticks}{what.rstrip('.')}{ticks}" + (f" - {_plain(cure)}" if cure else "")
    wrapped = textwrap.wrap(
        told, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapped)


def _plain(text: str) -> str:
    return re.sub(r"([<>*\[\]|])", r"\\\1", text)


if __name__ == "__main__":
    raise SystemExit(main())

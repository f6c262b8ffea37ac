"""How large the rooms of lotus and selection are: parameters, branches, lines, and circles of imports. Read from the files.

    python tools/house.py              the figures
    python tools/house.py --worst 20   and the 20 worst of each, by name

Parameters: all of a signature, ``self`` too, but for classes that stand in for timm's (``LIKE_TIMM``). Complexity: 1 for the
function, and 1 for each branch (if, elif, loop, except, case, conditional expression, assert), each ``and`` or ``or`` between two
values, and each ``for`` and ``if`` of a comprehension. Lines: from ``def`` to the last, without the docstring and decorators. What
a nested function holds counts for itself and for the function around it. A circle is a set of modules that all reach one another by
what they import, inside functions too and for types not; whoever imports a module is not counted as importing the package that it
lies in.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lotus", "selection")
PARAMETERS, COMPLEXITY, LINES = 8, 15, 50
"""More than this is told."""

LIKE_TIMM = (
    # They stand where timm's attention stood and take over its parts one by one; whoever knows timm's knows theirs.
    "lotus.vit.attention.SplitAttention.__init__",
    "lotus.vit.convolution.ConvAttention.__init__",
)
"""Whose parameters are not told: they are timm's."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = ast.If | ast.IfExp | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.match_case | ast.Assert


@dataclass(frozen=True)
class Room:
    """A function, and how large it is."""

    place: str
    parameters: int
    complexity: int
    lines: int


def parameters(function: Function) -> int:
    every = function.args
    named = len(every.posonlyargs) + len(every.args) + len(every.kwonlyargs)
    return named + (every.vararg is not None) + (every.kwarg is not None)


def complexity(function: Function) -> int:
    """McCabe's number, boolean operators and comprehensions included."""
    count = 1
    for node in ast.walk(function):
        match node:
            case ast.BoolOp():
                count += len(node.values) - 1
            case ast.comprehension():
                count += 1 + len(node.ifs)
            case _:
                count += isinstance(node, BRANCHES)
    return count


def lines(function: Function) -> int:
    first = function.body[0]
    told = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - told


def functions(module: str, tree: ast.AST) -> Iterator[Room]:
    """Every function of a module, methods and nested ones too."""
    for node in ast.iter_child_nodes(tree):
        inside = module
        if isinstance(node, Function | ast.ClassDef):
            inside = f"{module}.{node.name}"
        if isinstance(node, Function):
            yield Room(inside, 0 if inside in LIKE_TIMM else parameters(node), complexity(node), lines(node))
        yield from functions(inside, node)


def imports(tree: ast.AST, names: set[str]) -> set[str]:
    """Which of these modules a module imports, inside functions too; what only types need is left out."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            wholes = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(whole if whole in names else str(node.module) for whole in wholes)
        found |= imports(node, names)
    return found & names


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that all reach one another, the largest first."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in graph[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        reached[start] = seen
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted((sorted(circle) for circle in found if len(circle) > 1), key=len, reverse=True)


def table(rows: list[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"{left:<{width}}  {right}" for left, right in rows)


def worst(rooms: list[Room], what: str, count: int) -> str:
    ordered = sorted(rooms, key=lambda room: (-getattr(room, what), room.place))[:count]
    return f"\n{what}\n" + table([(f"  {getattr(room, what):>4}", room.place) for room in ordered])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The figures of the house.")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="also the N worst of each, by name")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    options = parser.parse_args(words)

    paths = {}
    for package in PACKAGES:
        for path in sorted((options.root / package).rglob("*.py")):
            name = ".".join(path.relative_to(options.root).with_suffix("").parts)
            paths[name.removesuffix(".__init__")] = path
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lengths = {name: len(text.splitlines()) for name, text in texts.items()}
    rooms = [room for name, tree in trees.items() for room in functions(name, tree)]
    # lotus/__init__.py hands out its names late, and so makes no circle.
    graph = {name: imports(tree, set(trees)) - {name, "lotus"} for name, tree in trees.items() if name != "lotus"}
    rings = circles(graph)

    def above(what: str, limit: int) -> str:
        sizes = [getattr(room, what) for room in rooms]
        return f"{sum(size > limit for size in sizes)}, the largest {max(sizes)}"

    print(
        table(
            [
                (f"functions with more than {PARAMETERS} parameters", above("parameters", PARAMETERS)),
                (f"functions of complexity above {COMPLEXITY}", above("complexity", COMPLEXITY)),
                (f"functions above {LINES} lines", above("lines", LINES)),
                ("longest module; median", f"{max(lengths.values())}; {statistics.median(lengths.values()):g}"),
                ("lines of " + " and ".join(PACKAGES), f"{sum(lengths.values()):,}"),
                ("circles, imports inside functions included", str(len(rings))),
            ]
        )
    )
    if options.worst:
        for what in ("parameters", "complexity", "lines"):
            print(worst(rooms, what, options.worst))
        longest = sorted(lengths, key=lambda name: -lengths[name])[: options.worst]
        print("\nmodules\n" + table([(f"  {lengths[name]:>4}", name) for name in longest]))
        for ring in rings:
            print("\ncircle\n  " + ", ".join(ring))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The house: who may stand on whom, and one door for each heavy package. Read from the files, not from a list of them."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Mapping, Set
from pathlib import Path

import pytest

from lotus import stage_names

ROOT = Path(__file__).resolve().parent.parent

# Top floor first. A module stands on the floor of the longest prefix that names it.
FLOORS = [
    {"tools", "lotus.__main__"},
    {"lotus.cli"},
    {"lotus.papers"},
    {"lotus.stages"},
    {"lotus.training"},
    {"lotus.export", "lotus.predict", "lotus.inspect"},
    {"lotus.card"},
    {
        "lotus.sparsity",
        "lotus.pruning",
        "lotus.report",
        "lotus.onnx_file",
        "lotus.ticket",
        "lotus.earlier",
    },
    {"lotus.vit", "lotus.data", "lotus.run"},
    {"lotus.way"},
    {"lotus.stage", "lotus.record"},
    {"lotus.config", "lotus.dask_map", "lotus.doctor", "lotus.files", "lotus.folder_lock", "lotus.watch"},
    {"lotus.yaml_safe", "lotus.shelves", "lotus.stage_names"},
    {"selection", "lotus.events"},
]
SHELF = "lotus.stages.shelf"  # imports the stages by their names
FACADE = "lotus"  # lotus/__init__.py hands out its names late and stands on no floor

DOORS = {
    "ffcv": {"lotus.data.ffcv"},
    "deepspeed": {"lotus.training.deepspeed_import"},
    "distributed": {"lotus.dask_map"},
    "rich": {"lotus.report.live", "lotus.report.terminal"},
    "timm": {"lotus.vit.model", "lotus.vit.zoo", "lotus.training.optim", "lotus.training.objective"},
    "torchvision": {"lotus.data.cifar"},
}


def modules() -> dict[str, Path]:
    found = {}
    for top in ("lotus", "selection", "tools"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


@functools.cache
def imports(name: str, *, at_import: bool = False) -> frozenset[str]:
    """Full names of what a module imports; ``at_import`` leaves out what it imports inside functions and for types."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are written in full"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(parsed(name))
    if name == SHELF:
        found.update(f"lotus.stages.{stage}" for stage in stage_names.STAGES)
    return frozenset(found)


def floor(name: str) -> int | None:
    best, level = "", None
    for number, rooms in enumerate(FLOORS):
        for room in rooms:
            if (name == room or name.startswith(room + ".")) and len(room) > len(best):
                best, level = room, number
    return level


def room(name: str) -> str:
    return max((r for rooms in FLOORS for r in rooms if name == r or name.startswith(r + ".")), key=len)


@pytest.mark.parametrize("name", [name for name in MODULES if name != FACADE])
def test_imports_go_downward(name: str) -> None:
    own = floor(name)
    assert own is not None, f"{name} stands on no floor: name its room in FLOORS"
    for other in imports(name):
        if other == FACADE or not other.startswith(("lotus", "selection", "tools")):
            continue
        there = floor(other)
        assert there is not None, f"{name} imports {other}, which stands on no floor"
        assert there > own or room(other) == room(name), f"{name} (floor {own}) imports {other} (floor {there})"


PAPERS = "lotus.papers"


def test_published_systems_are_plug_ins() -> None:
    """Nobody outside of their room imports it; its name stands in one place, where shelves are looked for."""
    for name, path in MODULES.items():
        if not name.startswith(PAPERS):
            assert not [other for other in imports(name) if other.startswith(PAPERS)], name
            assert PAPERS not in path.read_text(encoding="utf-8") or name == "lotus.shelves", name


def test_a_shelf_of_theirs_is_light() -> None:
    code = (
        "import sys\nfrom lotus import shelves\n"
        "print(*[shelf.__name__ for shelf in shelves.installed()])\n"
        "heavy = {'torch', 'timm', 'deepspeed', 'ffcv', 'sklearn', 'numba'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rooms = {name for name in MODULES if name.startswith(f"{PAPERS}.") and name.count(".") == 2}
    assert rooms <= set(done.stdout.split())


def check_no_circle(graph: Mapping[str, Set[str]]) -> None:
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name] - {name}:
                walk(other, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_no_circle() -> None:
    """What is imported inside functions and for types counts too: who needs the other first is a question at any time.

    The face hands out names of all floors, late, and is asked for its version alone.
    """
    rooms = set(MODULES) - {FACADE}
    check_no_circle({name: imports(name) & rooms for name in rooms})
    check_no_circle({name: imports(name, at_import=True) & set(MODULES) for name in MODULES})


def test_a_circle_is_found() -> None:
    check_no_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    with pytest.raises(AssertionError, match=r"a -> b -> a|b -> a -> b"):
        check_no_circle({"a": {"b"}, "b": {"a"}})


def test_what_another_module_uses_has_no_leading_underscore() -> None:
    for name in MODULES:
        modules = set()
        for node in ast.walk(parsed(name)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("lotus", "selection", "tools"):
                for alias in node.names:
                    assert not alias.name.startswith("_"), f"{name} imports {alias.name} of {node.module}"
                    if f"{node.module}.{alias.name}" in MODULES:
                        modules.add(alias.asname or alias.name)
        for node in ast.walk(parsed(name)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert not node.attr.startswith("_") or node.attr.startswith("__"), (
                    f"{name}: {node.value.id}.{node.attr}"
                )


TWICE = {
    "compare": {"lotus.cli.compare", "lotus.report.compare"},
    "config": {"lotus.cli.config", "lotus.config"},
    "export": {"lotus.cli.export", "lotus.export", "lotus.stages.export"},
    "inspect": {"lotus.cli.inspect", "lotus.inspect", "lotus.stages.inspect"},
    "predict": {"lotus.cli.predict", "lotus.predict"},
    "prune": {"lotus.cli.prune", "lotus.stages.prune"},
    "report": {"lotus.report", "lotus.stages.report"},
    "run": {"lotus.cli.run", "lotus.run"},
    "select": {"lotus.cli.select", "lotus.stages.select"},
    "ticket": {"lotus.cli.ticket", "lotus.ticket"},
}
"""One name, one thing: a verb of the command line, or a stage, may be called as what does its work."""


def test_one_name_one_thing() -> None:
    found: dict[str, set[str]] = {}
    for name in MODULES:
        if name.split(".")[0] != "tools":  # each of which is a verb
            found.setdefault(name.rpartition(".")[2], set()).add(name)
    assert {stem: names for stem, names in found.items() if len(names) > 1} == TWICE


@pytest.mark.parametrize("stem", TWICE)
def test_what_stands_twice_is_a_verb_or_a_stage(stem: str) -> None:
    rooms = {"lotus.cli": f'verb\\(\\s*"{stem}"', "lotus.stages": f'Stage\\(\\s*"{stem}"'}
    doors = {name for name in TWICE[stem] if name.rpartition(".")[0] in rooms}
    assert len(TWICE[stem] - doors) <= 1, "two that do work"
    for name in doors:
        assert re.search(rooms[name.rpartition(".")[0]], MODULES[name].read_text(encoding="utf-8")), name


HELPS = {"lotus.stages.proxy": "score", "lotus.stages.shrinking": "train", "lotus.stages.structured": "prune"}
"""Modules that do a part of one stage's work."""


def test_no_stage_is_known_by_name() -> None:
    """What is asked of a run's stages goes by what they say of themselves: one of a user's own is equal to ours everywhere. A
    stage's own file may name those that it reads."""
    from lotus.stages import STAGES

    asked = {"of", "record", "plan", "work", "settings", "made_from", "outputs", "after", "why"}
    stages = {stage.name for stage in STAGES}
    own = {f"lotus.stages.{name}" for name in stages} | set(HELPS)
    for name in MODULES.keys() - own:
        for node in ast.walk(parsed(name)) if not name.startswith(PAPERS) else ():
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in asked
                and node.args
            ):
                said, where = node.args[0], ast.unparse(node.func.value)
                assert not (isinstance(said, ast.Constant) and said.value in stages and where.endswith("run")), (
                    f"{name}: {ast.unparse(node)}"
                )


@pytest.mark.parametrize("package", DOORS)
def test_a_heavy_package_has_one_door(package: str) -> None:
    users = {name for name in MODULES if any(other.split(".")[0] == package for other in imports(name))}
    assert users <= DOORS[package], f"{package} is imported by {sorted(users - DOORS[package])}"
    assert users, f"nobody imports {package}: take its door off the list"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("selection")])
def test_selection_needs_neither_torch_nor_lotus(name: str) -> None:
    assert not {other for other in imports(name) if other.split(".")[0] in ("torch", "lotus", "timm", "rich")}


def test_help_and_selection_load_nothing_heavy() -> None:
    code = (
        "import sys, lotus, lotus.cli, selection.lottery, selection.scores, selection.pickers\n"
        "try: lotus.cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'deepspeed', 'ffcv', 'sklearn', 'numba', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_tool_hides_a_standard_module() -> None:
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert not tools & sys.stdlib_module_names


def test_nothing_loads_pickle() -> None:
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            assert "allow_pickle=True" not in line, name
            assert "torch.load(" not in line or "weights_only=True" in line, f"{name}: {line.strip()}"

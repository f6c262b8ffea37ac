"""The figures of tools/house.py, beside numbers counted by hand."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("figures_of_the_house", ROOT / "tools" / "house.py")
assert spec is not None
assert spec.loader is not None
house = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = house
spec.loader.exec_module(house)

SAMPLE = '''
class Box:
    @property
    def first(self, a, /, b, *rest, c=1, **more):
        """Two lines
        of words."""
        assert a or b
        for one in rest:
            if one and a and b:
                return [x for x in rest if x]
            elif b:
                pass
        def inner():
            return 1 if a else 2
        return inner
'''


def test_a_function_is_counted() -> None:
    first, inner = house.functions("sample", ast.parse(SAMPLE))
    # 1 + assert + or + for + if + and + and + comprehension and its if + elif + conditional expression of the one inside
    assert first == house.Room("sample.Box.first", parameters=6, complexity=11, lines=10)
    assert inner == house.Room("sample.Box.first.inner", parameters=0, complexity=2, lines=2)


def test_circles_are_sets_that_reach_one_another() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert house.circles(graph) == [["a", "b", "c"], ["d", "e"]]


def test_imports_for_types_are_none_and_those_inside_functions_are() -> None:
    text = "if TYPE_CHECKING:\n    import p.a\nfrom p import b\ndef f():\n    from p.c import name\n"
    assert house.imports(ast.parse(text), {"p", "p.a", "p.b", "p.c"}) == {"p.b", "p.c"}


def test_the_offenders_are_told_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in house.PACKAGES:
        (tmp_path / package).mkdir()
    (tmp_path / "selection" / "one.py").write_text(SAMPLE)
    (tmp_path / "lotus" / "two.py").write_text("from lotus import three\n")
    (tmp_path / "lotus" / "three.py").write_text("def f():\n    import lotus.two\n")
    assert house.main(["--root", str(tmp_path), "--worst", "1"]) == 0
    told = capsys.readouterr().out
    assert "selection.one.Box.first" in told
    assert "circle\n  lotus.three, lotus.two" in told
    assert "0, the largest 6" in told

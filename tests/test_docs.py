"""The pages of the project: what they link to is there, what they show runs, and a line can be read."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WIDTH = 110
CODE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]*)\)")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def prose(page: Path) -> str:
    """A page without its blocks of code; lines keep their numbers."""
    return CODE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What headings can be linked by, as GitHub makes it of them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        same = sum(name == words or re.fullmatch(re.escape(words) + r"-\d+", name) is not None for name in found)
        found.add(f"{words}-{same}" if same else words)
    return found


def breakable(line: str) -> bool:
    """Whether a line has a blank at which it can be broken: not inside of code or a link."""
    whole = re.sub(r"`[^`]*`|!?\[[^\]]*\]\([^)]*\)", lambda piece: piece[0].replace(" ", "_"), line)
    return " " in whole.strip().removeprefix("* ").removeprefix("- ")


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_lines_can_be_read(page: Path) -> None:
    """Tables aside; in blocks of code every line, since any can be broken."""
    lines = zip(page.read_text(encoding="utf-8").splitlines(), prose(page).splitlines(), strict=True)
    long = [
        f"line {number} has {len(line)}"
        for number, (line, text) in enumerate(lines, 1)
        if len(line) > WIDTH and (not text or (not line.startswith("|") and breakable(line)))
    ]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: there is no such file"
        assert there.is_relative_to(ROOT), f"{target}: lies outside"
        if anchor:
            assert anchor in anchors(there), f"{target}: there is no such heading"


def test_every_guide_has_a_place_among_the_pages() -> None:
    """`make docs` shows in its menu what stands in ``nav``; the rest is found by who knows that it is there."""
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].partition("\nplugins:")[0]
    assert [page.name for page in ROOT.glob("docs/*.md") if f" {page.name}\n" not in menu] == []


def test_a_searcher_finds_the_words_of_the_field() -> None:
    words = ("coreset", "data pruning", "structured pruning", "token pruning", "residual stream")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert [word for word in words if word not in readme] == []


# ------------------------------------------------------------------------- what CONTRIBUTING.md shows to those who add


def shelf(function: str) -> types.ModuleType:
    """The block of CONTRIBUTING.md that defines ``function``, as a user's own file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"def {function}(" in block]
    module = types.ModuleType("mine")
    exec(compile(block, "CONTRIBUTING.md", "exec"), vars(module))
    return module


def test_a_score_is_added() -> None:
    from selection import Signals, select

    loss = np.random.default_rng(0).random((1, 5, 100))
    signals = Signals({"labels": np.arange(100) % 4, "loss": loss}, fingerprint="f")
    drawn = select(signals, score="confidence", pick="top_k", keep=0.2, balance=False, shelves=[shelf("confidence")])
    surest = np.argsort(-np.exp(-loss[0, -3:].astype(np.float16).astype(float)).mean(axis=0))[:20]
    assert sorted(drawn.subset.rows) == sorted(surest)


def test_a_criterion_is_added() -> None:
    import timm
    import torch

    import lotus
    from lotus.vit import cost

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    batches = [(torch.randn(8, 3, 32, 32), torch.arange(8))]
    small = lotus.prune(model.eval(), batches, keep={"macs": 0.6}, criterion=shelf("outgoing").outgoing)
    assert 0.5 < cost.count(small).macs / cost.count(model).macs <= 0.6


def test_a_data_set_is_added() -> None:
    from lotus.config import Data
    from lotus.data.dataset import open_data

    train, val = open_data(Data(name="stripes", options={"images": 20}), [shelf("stripes")])
    assert (len(train), len(val)) == (16, 4)
    for source in (train, val):
        pixels = source.read(0)
        assert (pixels.dtype, pixels.shape) == (np.uint8, (16, 16, 3))
        across = pixels[..., 0].std(axis=source.labels[0])
        assert across.max() == 0, "a stripe that stands is the same in every row, one that lies in every column"


def test_a_guest_is_added() -> None:
    import torch

    from lotus.config import Method
    from lotus.training import named

    wanted = (Method.model_validate({"name": "capped", "most": 3}),)
    named.check(wanted, [shelf("capped")], place="train.guests")
    (guest,) = named.chosen(wanted, {}, [shelf("capped")], place="train.guests")
    assert guest.losses(torch.tensor([1.0, 9.0]), None).tolist() == [1, 3]  # type: ignore[arg-type]


def test_a_stage_is_added() -> None:
    from lotus.config import read
    from lotus.stages import run_of

    mine = shelf("thickness")
    mine.__file__ = None
    run = run_of(read(None, []), [mine])
    plan = run.plan()
    assert plan.index("finetune") < plan.index("thickness") < plan.index("report")
    found = {"thickness": {"each": 2.5}}
    assert run.stages["thickness"].tell(run, found).text == "2.5 parameters an image"  # type: ignore[union-attr]


def test_a_way_to_prune_is_added() -> None:
    import timm

    from lotus.config import read
    from lotus.stages import ways
    from lotus.stages.cut import Cut

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    settings = read(None, ["prune.method={name: narrowest, part: 0.25}"]).prune
    way, options = ways.chosen(settings, [shelf("narrowest")])
    making = way.make(types.SimpleNamespace(model=model.eval()), **options)
    try:
        next(making)
    except StopIteration as end:
        cut, told = end.value
    assert isinstance(cut, Cut)
    assert (told, cut.model.blocks[1].mlp.fc1.out_features) == ({}, 48)  # type: ignore[index, union-attr]
    assert cut.after["macs"] < cut.before["macs"]


# --------------------------------------------------------------------------------------------------- the reference


def described(function: ast.FunctionDef) -> Iterator[str]:
    """The parameters that the section ``Args:`` of a docstring tells of; "x, y: ..." tells of two."""
    text = ast.get_docstring(function) or ""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", text, re.MULTILINE)
    for line in section[1].splitlines() if section else []:
        entry = re.match(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*):(?: |$)", line)
        if entry:
            yield from (name.strip(" *") for name in entry[1].split(","))


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Each function of the packages, and its place."""
    for path in sorted([*ROOT.glob("lotus/**/*.py"), *ROOT.glob("selection/*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_docstrings_tell_of_parameters_that_there_are() -> None:
    strange = []
    for place, node in functions():
        every = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        strange += [f"{place}: {name}" for name in described(node) if name not in every]
    assert strange == []


def test_a_docstring_that_tells_of_parameters_tells_of_each() -> None:
    """Under ``Args:``, or in the sentences before: as ``code``, or with its shape, as in "labels (N,)"."""
    missing = []
    for place, node in functions():
        entries = set(described(node))
        if node.name.startswith("_") or not entries:
            continue
        text = ast.get_docstring(node) or ""
        told = entries | set(re.findall(r"\w+", " ".join(re.findall(r"``(.+?)``", text, re.DOTALL))))
        told |= set(re.findall(r"\b(\w+) \(", text))
        own = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        missing += [f"{place}: {name}" for name in own if name not in told | {"self", "cls"}]
    assert missing == []

"""inspect.html: one file that holds its pictures, loads nothing and runs nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lotus import files
from lotus.data.source import Source
from lotus.inspect.findings import Findings, Listed
from selection.shown import shown

PAGE, JSON, LIST = "inspect.html", "inspect.json", "delete.txt"
"""What is written."""
SHOWN = 60
"""Rows of each list that have their pictures on the page; the JSON has all."""

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:0 auto;padding:1rem;color:#202226;background:#fcfcfa}
h2{margin-top:2.2rem}.grid{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;max-width:216px}
figcaption{font-size:12px;color:#555;overflow-wrap:anywhere}img{width:104px;height:104px;object-fit:contain;background:#eee}
table{border-collapse:collapse}td,th{padding:2px 10px;text-align:left;overflow-wrap:anywhere}p{overflow-wrap:anywhere}
"""


def write(out: Path, found: Findings, listed: Listed, title: str) -> dict[str, Any]:
    """Write the page, the same as JSON, and the list of what may go.

    Args:
        out: the folder that they go to
        found: what was found
        listed: :meth:`Findings.listed`
        title: of the page

    Returns:
        What stands in the JSON.
    """
    odd = [name for name in listed.gone if "\n" in name]
    gone = [name for name in listed.gone if name not in odd]
    told = found.as_json() | {"delete": gone, "held_by_links": listed.held, "names_with_line_breaks": odd}
    files.write_json(out / JSON, told)
    files.write_bytes(out / LIST, "".join(f"{name}\n" for name in gone).encode("utf-8", "surrogateescape"))
    files.write_text(out / PAGE, render(found, title, len(gone), odd))
    return told


def render(found: Findings, title: str, listed: int, odd: Sequence[str] = ()) -> str:
    """The page's text; ``listed`` pictures stand on the list to delete, and ``odd`` ones, whose names have a line break, cannot."""
    parts = "".join(
        [
            *_parts(found, listed),
            *(f"<p>On no list, since its name has a line break: {_text(repr(name))}</p>" for name in odd),
        ]
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style><h1>{_text(title)}</h1>{parts}</html>\n"
    )


def _parts(found: Findings, listed: int) -> Iterator[str]:
    train, val, classes = found.train, found.val, found.train.classes
    yield f"<p>{len(train):,} images for training, {len(val):,} for validation; {listed:,} on the list to delete.</p>"
    yield _part("Leaks: in train and in val", len(found.leaks),
                (_figure([(train, a), (val, b)], f"{_name(train, a)} = {_name(val, b)}")
                 for a, b, _ in found.leaks[:SHOWN]))  # fmt: skip
    yield _part("The same picture again within train", len(found.pairs),
                (_figure([(train, a), (train, b)], f"{_name(train, a)} = {_name(train, b)}")
                 for a, b, _ in found.pairs[:SHOWN]))  # fmt: skip
    yield _part(f"Labels that are likely wrong, by {found.judged_by}", len(found.mislabeled),
                (_figure([(train, row)], f"{_name(train, row)}: {classes[train.labels[row]]}, rather {classes[to]}")
                 for row, to, _ in found.mislabeled[:SHOWN]))  # fmt: skip
    yield _part("Far from all others", len(found.outliers),
                (_figure([(train, row)], f"{_name(train, row)}: {classes[train.labels[row]]}")
                 for row, _ in found.outliers[:SHOWN]))  # fmt: skip
    told = found.as_json()
    yield _table("Damaged", ("image", "why"), [(one["image"], one["why"]) for one in told["damaged"]])
    yield _table("Passed over: no pictures by their ending", ("ending", "files"), list(found.endings.items()))
    rows = [(one["class"], one["train"], one["val"]) for one in told["classes"]]
    yield _table("Images of each class", ("class", "train", "val"), rows)


def _part(heading: str, count: int, figures: Iterable[str]) -> str:
    more = f" (the first {SHOWN})" if count > SHOWN else ""
    return f"<h2>{_text(heading)}</h2><p>{count:,}{more}</p><div class=grid>{''.join(figures)}</div>"


def _table(heading: str, head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    heads = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    return f"<h2>{_text(heading)}</h2><p>{len(rows):,}</p>" + (
        f"<table><tr>{heads}</tr>{cells}</table>" if rows else ""
    )


def _figure(images: list[tuple[Source, int]], caption: str) -> str:
    drawn = "".join(f'<img alt="" src="{_picture(source, row)}">' for source, row in images)
    return f"<figure>{drawn}<figcaption>{_text(caption)}</figcaption></figure>"


def _picture(source: Source, row: int) -> str:
    picture = Image.fromarray(np.asarray(source.read(row)))
    picture.thumbnail((208, 208))
    packed = io.BytesIO()
    picture.save(packed, "PNG" if max(picture.size) <= 64 else "JPEG")
    kind = "png" if max(picture.size) <= 64 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(packed.getvalue()).decode()}"


def _name(source: Source, row: int) -> str:
    return source.name(row).removeprefix(source.root).lstrip("/") if source.root else source.name(row)


def _text(value: object) -> str:
    return html.escape(shown(str(value)))

"""Names from anywhere in HTML and SVG."""

from __future__ import annotations

import html

from selection.shown import shown


def escape(text: object) -> str:
    """``text`` for a place between tags or quotes."""
    return html.escape(shown(text))


def plain(value: object) -> object:
    """What a template is about to write: texts without what acts on the page, all else as it is."""
    return shown(value, lines=True) if type(value) is str else value

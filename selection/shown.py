"""How a name or a message of anyone's is shown: as it is, but for what would act on the terminal or the page instead of being read."""

from __future__ import annotations

import unicodedata


def shown(text: object, *, lines: bool = False) -> str:
    r"""``text`` with what cannot be seen written out: ``\x1b`` for an escape, ``\u202e`` for a turn of the reading direction.

    Control characters could clear the screen, set its title or write over lines; format characters could hide or reorder
    what is read; halves of surrogate pairs, as file names have that are no UTF-8, cannot be written at all.

    Args:
        lines: line breaks and tabs stay, as in a message.
    """
    return "".join(sign if _seen(sign) or (lines and sign in "\n\t") else _written(sign) for sign in str(text))


def _seen(sign: str) -> bool:
    # A joiner between two letters belongs to the writing of some languages, and to pictures.
    return unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or sign in "\u200c\u200d\u00ad"


def _written(sign: str) -> str:
    number = ord(sign)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"

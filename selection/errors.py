"""The one exception for what the user can mend."""


class Refused(ValueError):
    """A request that cannot be carried out as it stands.

    The message names the thing, the place and the cure, and is shown to the user as it is (exit code 2).
    Anything else that escapes is a fault of ours (exit code 1).
    """


def reason(error: BaseException, most: int = 300) -> str:
    """Why something could not be done, on one line: in the error's own words. Which kind of error it is stands before them where
    they alone say little, as those of a KeyError, and where there are none.

    Args:
        error: that was raised
        most: characters of its words
    """
    words = " ".join(str(getattr(error, "strerror", None) or error).split())[:most]
    if words and isinstance(error, _SPOKEN):
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


_SPOKEN = (OSError, ValueError, RuntimeError, SyntaxError)
"""Errors whose words are a sentence: those of files and their parsers, ours among them."""


class Notice(UserWarning):
    """What the user should know and need not mend: one sentence, which the command line shows as it is."""

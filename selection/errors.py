"""The one exception for what the user can mend."""


class Refused(ValueError):
    """A request that cannot be carried out as it stands.

    The message names the thing, the place and the cure, and is shown to the user as it is (exit code 2).
    Anything else that escapes is a fault of ours (exit code 1).
    """


class Notice(UserWarning):
    """What the user should know and need not mend: one sentence, which the command line shows as it is."""

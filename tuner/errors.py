"""The exceptions whose message is all that the user needs to see."""


class UserError(ValueError):
    """A mistake of the user; the message says what came, what is allowed and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class StoppedError(Exception):
    """A run was asked to end before its last step, and has saved; the command line exits with code 75."""


class LostRankError(RuntimeError):
    """Ranks waited for one that did not come; the message names it, and the command line exits with code 3."""

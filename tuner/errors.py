"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake of the user; the message says what came, what is allowed and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """

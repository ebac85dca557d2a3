"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake in the input, told in one sentence: what is wrong, where, and what to do.

    The command line prints its message without a traceback and exits with code 1.
    """

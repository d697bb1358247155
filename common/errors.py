"""The exception for errors that the user can correct. The command line prints its message and exits with code 2."""


class TriModeError(Exception):
    """The message is one line: what is wrong, where (file, field, value), and the remedy."""

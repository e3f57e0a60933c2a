"""The exception that a command prints as one line, without a traceback."""


class InputError(ValueError):
    """A mistake in the user's input: a file, a config field, a label.

    The message is one line that names the file, field or label and says what to do.
    """


class DamagedCopy(InputError):
    """A copy that the program made is damaged: no photo of the user's is to blame, or to be left out."""

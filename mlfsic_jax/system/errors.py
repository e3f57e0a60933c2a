"""The one exception that a command turns into a single line instead of a traceback."""


class InputError(ValueError):
    """A mistake in what the user gave: a file, a config field, a label.

    The message is one clear line that names the thing and says what to do.
    """

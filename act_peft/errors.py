"""The one error family of the library.

Every error that the library raises on purpose is an `ActError` and at the same time the built-in exception that PEFT
and torch would raise in its place, so `except ValueError` around PEFT code keeps working. Messages read
`where: got, expected (what to do)`.
"""


class ActError(Exception):
    """Base class of all errors that act_peft raises on purpose."""


class ActValueError(ActError, ValueError):
    """A value, a file's content or a combination of settings that cannot be used."""


class ActTypeError(ActError, TypeError):
    """An object of a kind that the library does not support."""


class ActLoadError(ActValueError, RuntimeError):
    """Tensors of an adapter that do not fit the model; torch raises a RuntimeError for the same."""


class ActWarning(UserWarning):
    """Something the user should know about, although the work goes on."""

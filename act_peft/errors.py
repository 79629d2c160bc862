"""The one error family of the library.

Every error that the library raises on purpose is an `ActError`. It is also the built-in exception that PEFT and torch
raise in such a case, so `except ValueError` around PEFT code still works. The form of a message is
`where: got, expected (what to do)`. A message is one line of printable characters, whatever it quotes.
"""

from act_peft.plain import one_line


class ActError(Exception):
    """Base class of all errors that act_peft raises on purpose."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(one_line(each) if isinstance(each, str) else each for each in arguments))


class ActValueError(ActError, ValueError):
    """A value, a file's content or a combination of settings that cannot be used."""


class ActTypeError(ActError, TypeError):
    """An object of a type that the library does not support."""


class ActLoadError(ActValueError, RuntimeError):
    """Tensors of an adapter that do not fit the model; torch raises a RuntimeError in this case."""


class ActWarning(UserWarning):
    """A fact that the user should know; the work continues."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(one_line(each) if isinstance(each, str) else each for each in arguments))

"""Ability transfer between related models as an extension of PEFT (arXiv 2601.09398).

`import act_peft` registers the method with PEFT; see `ActConfig` and `localize` for where to start.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process was started as `act-peft` or as `python -m act_peft`.

    `sys.argv` begins with the path of the script, or with "-m" until the module runs, which `sys.orig_argv` names.
    In doubt the answer is no: the command is then only slower.
    """
    before = len(sys.orig_argv) - len(sys.argv)
    if before < 0 or not sys.argv:
        return False
    started = sys.orig_argv[before]
    if sys.argv[0] == "-m":
        return started in ("act_peft", "-mact_peft")
    return sys.argv[0] == started and os.path.splitext(os.path.basename(started))[0] == "act-peft"


if TYPE_CHECKING or not _is_command():
    from act_peft import analysis as analysis  # imports nothing yet
    from act_peft.library import *  # noqa: F403 (its `__all__` is the list of the public names)
    from act_peft.library import __all__ as __all__
else:  # torch, transformers and PEFT take seconds, which `--help` and a mistyped option should not
    from act_peft.interrupts import end_at_once_

    end_at_once_()

    def __getattr__(name: str) -> object:
        """A public name of the library, which the first use of one imports."""
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        library = import_module("act_peft.library")
        if name == "__all__" or name in library.__all__:
            return getattr(library, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

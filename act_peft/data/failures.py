"""What other libraries say of a model, a tokenizer or examples that they cannot read."""

from __future__ import annotations


def reason_of(error: BaseException) -> str:
    """What another library says of a failure, short, with the kind of error where that says more."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"

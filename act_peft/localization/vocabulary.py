"""Two models of one family with vocabularies of different size: the first tokens are common to both."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from act_peft.batches.forward import Batch
from act_peft.errors import ActValueError, ActWarning
from act_peft.localization.candidates import Candidates
from act_peft.peft_modules import plain_layer, without_wrapper

_TOKENS = ("input_ids", "decoder_input_ids")


class CommonVocabulary:
    """The tokens that both models know.

    Args:
        base: the base.
        donor: the donor.
    """

    def __init__(self, base: nn.Module, donor: nn.Module) -> None:
        self._sizes = (_num_tokens(base), _num_tokens(donor))

    @property
    def left_out(self) -> str | None:
        """Which tokens only one of the models knows, in words."""
        base, donor = self._sizes
        if base is None or donor is None or base == donor:
            return None
        return f"the base has {base} tokens, the donor {donor}: {abs(base - donor)} of them are left out"

    def check(self, batch: Batch) -> None:
        """Check that a batch holds only common tokens, if the models differ.

        Raises:
            ActValueError: a token that one of the models does not know.
        """
        base, donor = self._sizes
        if base is None or donor is None or base == donor:
            return
        for name in _TOKENS:
            tokens = batch.get(name)
            if isinstance(tokens, torch.Tensor) and tokens.numel() and int(tokens.max()) >= min(base, donor):
                raise ActValueError(
                    f"{name}: got token {int(tokens.max())}, expected tokens below {min(base, donor)}, which both "
                    f"models know (the base has {base} tokens, the donor {donor}; tokenise with the tokenizer and "
                    "chat template of the model with fewer)"
                )


def warn_left_out(candidates: Candidates, *, stacklevel: int) -> None:
    """Warn if only some rows of the output layer are compared.

    Args:
        candidates: the compared modules.
        stacklevel: as in `warnings.warn`, counted from the caller.

    Warns:
        ActWarning: if the models have different numbers of rows.
    """
    for name, count in candidates.num_channels.items():
        donor = candidates.donor_channels[name]
        if count != donor:
            warnings.warn(
                f"{name}: the base has {count} rows, the donor {donor}. Only the first {min(count, donor)}, the "
                f"common vocabulary, are compared; {abs(count - donor)} rows are left out and never selected",
                ActWarning,
                stacklevel=stacklevel + 1,
            )


def _num_tokens(model: nn.Module) -> int | None:
    getter = getattr(without_wrapper(model), "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    layer = plain_layer(found) if isinstance(found, nn.Module) else None
    return layer.num_embeddings if isinstance(layer, nn.Embedding) else None

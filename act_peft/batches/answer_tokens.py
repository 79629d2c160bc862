"""The answer tokens of a batch: the tokens that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from act_peft.errors import ActTypeError, ActValueError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class AnswerTokens:
    """The counted tokens of one batch of shape `[B, T]`.

    Attributes:
        batch_size: B.
        length: T.
        index: positions of the N counted tokens in the flattened batch, sorted int64 `[N]` on the CPU.
    """

    batch_size: int
    length: int
    index: torch.Tensor
    _on_device: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.index.numel()

    @property
    def samples(self) -> torch.Tensor:
        """The sample (row of the batch) of every counted token, int64 `[N]` on the CPU, ascending."""
        return self.index // self.length

    @property
    def per_sample(self) -> torch.Tensor:
        """The number of counted tokens of every sample, int64 `[B]` on the CPU."""
        return torch.bincount(self.samples, minlength=self.batch_size)

    def index_on(self, device: torch.device) -> torch.Tensor:
        """`index` on a device; it is copied there only once."""
        if device not in self._on_device:
            self._on_device[device] = self.index.to(device)
        return self._on_device[device]

    def at_most(self, count: int | None) -> AnswerTokens:
        """At most `count` tokens of every sample, evenly spread over its own; all of them if it is None."""
        if count is None:
            return self
        sample = self.index // self.length
        first = torch.searchsorted(sample, torch.arange(self.batch_size))  # of each sample, [B]
        sizes = torch.bincount(sample, minlength=self.batch_size)  # [B]
        number = torch.arange(len(self)) - first[sample]  # of each token in its sample, [N]
        size = sizes[sample]
        # Token n of N belongs to the part floor(n * count / N); the first token of a part stays.
        part = number * count // size
        before = (number - 1) * count // size
        return AnswerTokens(self.batch_size, self.length, self.index[(size <= count) | (part != before)])

    def parts(self, count: int) -> Iterator[AnswerTokens]:
        """The tokens in parts of at most `count`."""
        for index in self.index.split(count):
            yield AnswerTokens(self.batch_size, self.length, index)


def find_answer_tokens(batch: Mapping[str, Any]) -> AnswerTokens:
    """Find the tokens that the loss counts.

    With labels a token counts if its label is not -100; without labels, if `attention_mask` is 1; without both,
    always. Padding (`attention_mask == 0`) never counts, even with a label. In a batch with `decoder_input_ids` the
    tokens are those of the decoder.

    Args:
        batch: `input_ids` `[B, T]` or `inputs_embeds` `[B, T, C]`, and optionally `labels` `[B, T]` and
            `attention_mask` `[B, T]`; all other keys are ignored.

    Returns:
        The counted tokens, at least one.

    Raises:
        ActTypeError: the batch is no dict, or one of these entries is no tensor.
        ActValueError: no tokens in the batch, shapes that do not fit together, or no token that counts.
    """
    if not isinstance(batch, Mapping):
        raise ActTypeError(
            f"got {type(batch).__name__}, expected a dict of tensors (dataloader must be an iterable of such batches; "
            "put a single batch into a list)"
        )
    prefix = "decoder_" if _entry(batch, "decoder_input_ids") is not None else ""
    shape = _token_shape(batch, prefix)
    mask_name = prefix + "attention_mask"
    labels, mask = _entry(batch, "labels"), _entry(batch, mask_name)
    if mask is not None and mask.shape != shape:
        if labels is None:
            raise ActValueError(
                f"{mask_name}: got shape {list(mask.shape)}, expected {list(shape)} (add labels with {IGNORED_LABEL} "
                "at the tokens that do not count)"
            )
        mask = None  # one mask per query, for example: only the model needs it, the labels decide which tokens count
    if labels is not None and labels.shape != shape:
        raise ActValueError(
            f"labels: got shape {list(labels.shape)}, expected {list(shape)}, one label per token "
            "(for an encoder-decoder add decoder_input_ids to the batch)"
        )
    if labels is not None:
        counted = labels.cpu() != IGNORED_LABEL
        if mask is not None:
            counted &= mask.cpu() != 0
    elif mask is not None:
        counted = mask.cpu() == 1
    else:
        counted = torch.ones(shape, dtype=torch.bool, device="cpu")
    if not counted.any():
        reason = (
            f"all labels are {IGNORED_LABEL} or lie on padding" if labels is not None else f"{mask_name} is never 1"
        )
        raise ActValueError(
            f"got no answer token among {counted.numel()} tokens ({reason}), expected at least one (does the chat "
            "template mark the assistant's turns with generation markers? are answers cut off by a maximum length? "
            "drop samples without an answer)"
        )
    return AnswerTokens(shape[0], shape[1], counted.flatten().nonzero().flatten())


def _entry(batch: Mapping[str, Any], name: str) -> torch.Tensor | None:
    value = batch.get(name)
    if value is not None and not isinstance(value, torch.Tensor):
        raise ActTypeError(f"{name}: got {type(value).__name__}, expected a tensor (collate with return_tensors='pt')")
    return value


def _token_shape(batch: Mapping[str, Any], prefix: str) -> torch.Size:
    ids, embeddings = _entry(batch, prefix + "input_ids"), _entry(batch, prefix + "inputs_embeds")
    if ids is None and embeddings is None:
        raise ActValueError(f"got the keys {sorted(map(str, batch))}, expected input_ids or inputs_embeds among them")
    shape = ids.shape if ids is not None else embeddings.shape[:2]  # type: ignore[union-attr]
    if len(shape) != 2:
        raise ActValueError(f"{prefix}input_ids: got shape {list(shape)}, expected [B, T] (add a batch axis)")
    return shape

"""`FittedTransfer`: the fitted changes of a base's modules, and what can be made of them."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from act_peft.channels.scores import ChannelScores, ScoreKind
from act_peft.checks import member_of, whole_number
from act_peft.disk.checkpoint import Checkpoint
from act_peft.disk.parameters import Parameters
from act_peft.errors import ActTypeError, ActValueError, ActWarning
from act_peft.export.base import BaseFacts, facts_in_memory, facts_on_disk
from act_peft.export.targets import Target
from act_peft.fitting import storage
from act_peft.fitting.adapter_parts import absolute
from act_peft.fitting.adapters import write_act
from act_peft.fitting.application import add_changes_, fill_adapter
from act_peft.fitting.base_weights import Base, differing_modules, opened_base, refuse_donor
from act_peft.fitting.lora import FittedLora, write_lora
from act_peft.fitting.low_rank import cut
from act_peft.fitting.merging import merge_fitted
from act_peft.fitting.module import FitRecord, FittedModule
from act_peft.fitting.selection import MaskLike, TokensLike, selected_channels, selected_tokens
from act_peft.layers.lookup import base_model


@dataclass(frozen=True, eq=False, repr=False)
class FittedTransfer:
    """The changes that `fit` found: what to add to the base so that it answers as the donor does on the ability.

    It holds the change of every module itself, so adapters and checkpoints are made of it in any order, without the
    data and without the donor.

    Attributes:
        modules: module name -> its change, in the base's order; read-only. Tied embeddings are one entry.
        record: settings, counts of tokens, and where base and donors came from.

    Example:
        >>> fit(base, donor, batches, batches, max_rank=8).save("fitted.safetensors")
        >>> fitted = FittedTransfer.load("fitted.safetensors")
        >>> lost = fitted.to_lora(4, "ability-lora").error  # the share of the gain that rank 4 loses
        >>> fitted.merge(BASE, "merged")
    """

    modules: Mapping[str, FittedModule]
    record: FitRecord
    _live_base: weakref.ref[nn.Module] | None = field(default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))

    def __repr__(self) -> str:
        settings = self.record.settings
        return (
            f"FittedTransfer({len(self.modules)} modules, keep_weight {settings.keep_weight:g}, ridge "
            f"{settings.ridge:g}, prior_scale {settings.prior_scale:g}, tokens {list(self.record.num_tokens)})"
        )

    @property
    def gains(self) -> ChannelScores:
        """What every channel gains: how far the objective falls by its row of the change, 0 or greater.

            gain_i = f_i(0) - f_i(Δ_i) = Δ_i M Δ_iᵀ

        The rows of a module do not influence each other, so the k best rows by gain are the best k rows. Embeddings
        move by rows of tokens, not by channels, and are left out: see `token_gains`.

        Raises:
            ActValueError: only embeddings were fitted.
        """
        gains = {name: module.gains for name, module in self.modules.items() if not module.is_embedding}
        if not gains:
            raise ActValueError("gains: only embeddings were fitted, expected other modules too (see token_gains)")
        return ChannelScores(gains, 0, kind=ScoreKind.GAIN).with_origin(self.record.origin)

    @property
    def token_gains(self) -> Mapping[str, torch.Tensor]:
        """Name of an embedding -> what every token's row gains, float64 `[V]`; tied or not."""
        return {name: module.gains.clone() for name, module in self.modules.items() if module.is_embedding}

    def low_rank(self, rank: int, *, embedding_rank: int | None = None) -> FittedTransfer:
        """The same transfer with its changes cut to a rank, as `to_lora` cuts them.

            Δ -> U_r U_rᵀ Δ,     Δ L = U S Vᵀ,  L Lᵀ = M

        What a cut loses of the gain is what the data hardly ask for: it can spare some of what is kept.

        Args:
            rank: r, for all linear modules.
            embedding_rank: the same for embeddings, which stay as they are by default.

        Returns:
            A new transfer, with the gains of the cut changes. Norms stay as they are.

        Raises:
            ActTypeError, ActValueError: as `to_lora`.
        """
        rank, embedding_rank = whole_number(rank, "rank", least=1), _checked_rank(embedding_rank)
        modules = cut(self.modules, rank=rank, embedding_rank=embedding_rank)
        return FittedTransfer(modules, self.record, self._live_base)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all.

        Raises:
            ActValueError: `path` is a folder or lies in a folder that does not exist.
        """
        storage.write(path, self.modules, self.record)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FittedTransfer:
        """Read what `save` wrote.

        Raises:
            ActValueError: the file is missing, damaged, of another kind or of a newer version.
        """
        return cls(*storage.read(path))

    def to_adapter(
        self,
        mask: MaskLike,
        output_dir: str | os.PathLike[str],
        *,
        tokens: TokensLike = None,
        base: Base | None = None,
        include_bias: bool = True,
        overwrite: bool = False,
    ) -> None:
        """Write an ACT adapter whose deltas are the changes of some channels.

            delta[i, :] = Δ_i          for every selected channel i

        It is an adapter like any other: loaded with `PeftModel.from_pretrained`, trained, stacked, merged.

        Args:
            mask: the channels, for example `fitted.gains.top(0.2, scope="module")`; or the path of a saved mask; or
                names (or their ends) -> channels.
            output_dir: the folder to write. It appears whole or not at all.
            tokens: rows of the token embedding that move too, as PEFT's `trainable_token_indices`: a share (a float
                from 0 to 1: those with the greatest gains), or their numbers. In tied models both uses move.
            base: the base's model, or the folder or Hub id of its checkpoint, from which a fingerprint is recorded and
                tokens are made. By default the model of the fit while it is in memory, then where that was loaded
                from; where neither is there, no fingerprint is recorded.
            include_bias: whether the biases of the channels move too, as in `ActConfig`. The weights were fitted
                together with them.
            overwrite: whether an older adapter at `output_dir` is replaced.

        Raises:
            ActTypeError: arguments of other types.
            ActValueError: channels or tokens that were not fitted; nothing selected; a base with other weights; tokens
                without a base; an output that exists; no room on the disk. Nothing is written then.
        """
        channels = selected_channels(mask, self.modules, self.record)
        rows = selected_tokens(tokens, self.modules)
        used = {name: self.modules[name] for name in {**channels, **rows}}
        total = sum(len(module.delta) for module in self.modules.values() if not module.is_embedding)
        with self._opened(base, used) as parameters:
            write_act(
                absolute(output_dir),
                self.modules,
                self.record,
                channels=channels,
                tokens=rows,
                base=parameters,
                total=total,
                include_bias=include_bias,
                overwrite=overwrite,
            )

    def to_lora(
        self,
        rank: int,
        output_dir: str | os.PathLike[str],
        *,
        target: str | Target = Target.PEFT,
        embedding_rank: int | None = None,
        norms: bool = False,
        tokens: TokensLike = None,
        base: Base | None = None,
        overwrite: bool = False,
    ) -> FittedLora:
        """Write an ordinary LoRA adapter, which PEFT loads without act_peft.

            B A = U_r U_rᵀ Δ,     Δ L = U S Vᵀ,  L Lᵀ = M

        the best change of this rank by the fit's own objective: of the gain, the sum of the first r squares of S is
        kept. Norms have no factors. For an embedding, whose rows have a metric each, the factors are found in turns.

        Args:
            rank: r, for all linear modules; lower where a change has a lower one.
            output_dir: the folder to write. It appears whole or not at all.
            target: the program that is to load it, as in `export_lora`: `"peft"`, or an engine, whose adapters have
                one rank that it accepts, filled up with zeros, and neither biases (see `left_out`), norms nor tokens.
            embedding_rank: rank of the token embedding's factors; by default it does not move. Much of what a model
                lost can lie there. Where the output layer shares its weight, both get the same factors; PEFT loads
                such an adapter, but would add the change twice when it merges it: use it unmerged, or take `merge`.
            norms: whether norms are saved as whole modules (`modules_to_save`), with the base's weights in them.
            tokens: as in `to_adapter`, in place of `embedding_rank`: rows of tokens, exact, also when merged.
            base: as in `to_adapter`; needed for norms and tokens.
            overwrite: whether an older adapter at `output_dir` is replaced.

        Returns:
            Ranks, and which share of the gain is lost, by modules and in all.

        Raises:
            ActTypeError: arguments of other types.
            ActValueError: a rank that is greater than the fit's `max_rank`; modules that the target cannot load;
                otherwise as `to_adapter`.

        Warns:
            ActWarning: modules that the target loads only for some models.
        """
        chosen = member_of(Target, target, "target")
        rows = selected_tokens(tokens, self.modules)
        used = {n: m for n, m in self.modules.items() if n in rows or (norms and m.kind.is_norm)}
        with self._opened(base, used) as parameters:
            return write_lora(
                absolute(output_dir),
                self.modules,
                self.record,
                target=chosen,
                rank=whole_number(rank, "rank", least=1),
                embedding_rank=_checked_rank(embedding_rank),
                norms=norms,
                tokens=rows,
                base=parameters,
                facts=self._facts(base, with_skeleton=chosen is Target.PEFT),
                overwrite=overwrite,
            )

    def apply_to(self, model: nn.Module, *, adapter_name: str = "default") -> None:
        """Fill the adapter of an existing PEFT model with the changes; what it held before is replaced.

        Rows of ACT adapters get their changes, factors of LoRA adapters the best change of their rank, trained tokens
        and whole modules (`modules_to_save`) the base's weights plus the change. With learned scales the scales start
        at 1. So a short fine-tune can start where the fit ends.

        Args:
            model: a `PeftModel` on the base that was fitted.
            adapter_name: name of the adapter.

        Raises:
            ActValueError: no such adapter; one that changes a module that was not fitted, or another base; a rank
                greater than the fit's `max_rank`. Nothing is changed then.

        Warns:
            ActWarning: if the base has other weights than the one that was fitted.
        """
        refuse_donor(model, self.record)
        filled = fill_adapter(model, self.modules, adapter_name=adapter_name)
        self._warn_of_other_base(model, {n: m for n, m in self.modules.items() if not filled.isdisjoint(m.names)})

    def add_to_(self, model: nn.Module) -> None:
        """Add all changes to the weights of the base in memory.

        Args:
            model: the base, without adapters.

        Raises:
            ActValueError: adapters in it, or other modules than those that were fitted. Nothing is changed then.

        Warns:
            ActWarning: if it has other weights than the base that was fitted.
        """
        refuse_donor(model, self.record)
        self._warn_of_other_base(model, self.modules)
        add_changes_(model, self.modules)

    def merge(
        self, base: str | os.PathLike[str], output_dir: str | os.PathLike[str], *, overwrite: bool = False
    ) -> None:
        """Write the base's checkpoint with all changes added; plain transformers loads it.

        No model is built, and one tensor at a time is in memory. Tied weights stay tied. Configuration, tokenizer and
        the like are copied; not the README, which describes the base.

        Args:
            base: folder or Hub id of the base's checkpoint, in safetensors.
            output_dir: the folder to write. It appears whole or not at all.
            overwrite: whether an older checkpoint at `output_dir` is replaced.

        Raises:
            ActValueError: no or a damaged checkpoint, or of another model; quantized weights; an output that exists or
                lies inside the base; no room on the disk. Nothing is written then.
            ActTypeError: `base` is no path.

        Warns:
            ActWarning: if the checkpoint has other weights than the base that was fitted.
        """
        if not isinstance(base, (str, os.PathLike)):
            raise ActTypeError(
                f"base: got {type(base).__name__}, expected the folder or Hub id of a checkpoint (for a model in "
                "memory call add_to_, then save_pretrained)"
            )
        with Checkpoint.open(base) as checkpoint, opened_base(base, self.modules) as parameters:
            _warn_of(differing_modules(parameters, self.modules, self.record), os.fspath(base), stacklevel=3)
            merge_fitted(checkpoint, parameters, self.modules, absolute(output_dir), overwrite=overwrite)

    @contextmanager
    def _opened(self, base: Base | None, used: Mapping[str, FittedModule]) -> Iterator[Parameters | None]:
        """The weights of the base of some modules; None where the user named none and it cannot be reached."""
        if base is not None:
            with opened_base(base, used) as parameters:
                differing = differing_modules(parameters, used, self.record)
                if differing:
                    raise ActValueError(
                        f"{differing[0]}: the base has other weights than the one that was fitted, expected the same "
                        f"({len(differing)} of {len(used)} modules differ)"
                    )
                yield parameters
            return
        live = None if self._live_base is None else self._live_base()
        for candidate in (live, self.record.base or None):
            if candidate is None:
                continue
            try:
                with opened_base(candidate, used) as parameters:
                    same = not differing_modules(parameters, used, self.record)
            except (ActValueError, ActTypeError):
                continue
            if same:
                with opened_base(candidate, used) as parameters:
                    yield parameters
                return
        yield None

    def _facts(self, base: Base | None, *, with_skeleton: bool) -> BaseFacts | None:
        """What is known of the base's modules; None where it cannot be reached."""
        live = None if self._live_base is None else self._live_base()
        found = base if base is not None else live if live is not None else self.record.base
        if isinstance(found, nn.Module):
            return facts_in_memory(base_model(found), with_skeleton=with_skeleton)
        names = [name for module in self.modules.values() for name in module.names]
        return facts_on_disk(found, names, must_exist=False) if found else None

    def _warn_of_other_base(self, model: nn.Module, used: Mapping[str, FittedModule]) -> None:
        try:
            with opened_base(model, used) as parameters:
                differing = differing_modules(parameters, used, self.record)
        except ActValueError:  # what does not fit is said where it is used
            return
        _warn_of(differing, type(model).__name__, stacklevel=4)


def _checked_rank(embedding_rank: int | None) -> int | None:
    return None if embedding_rank is None else whole_number(embedding_rank, "embedding_rank", least=1)


def _warn_of(differing: list[str], where: str, *, stacklevel: int) -> None:
    if differing:
        warnings.warn(
            f"{where}: has other weights than the base that was fitted: {len(differing)} modules differ, the first is "
            f"{differing[0]}",
            ActWarning,
            stacklevel=stacklevel,
        )

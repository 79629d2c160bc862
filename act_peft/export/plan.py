"""What a LoRA adapter of an ACT adapter holds, decided before anything is written."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig

from act_peft.adapter.changes import AdapterChanges, ModuleChange, OtherTensor
from act_peft.channels.kinds import ChannelKind
from act_peft.doors import OUTER
from act_peft.errors import ActValueError
from act_peft.export.base import BaseFacts
from act_peft.export.config import bias_key, factor_keys, lora_config, module_of, whole_key
from act_peft.export.engines import check_for_engine, missing_siblings
from act_peft.export.factors import Losses, factor_rank, factors, lost_squares
from act_peft.export.folder import Part, infos_of
from act_peft.export.settings import Biases, ExportSettings
from act_peft.export.stock_peft import check_with_peft
from act_peft.export.targets import Target, listed


@dataclass
class Measured:
    """What the factors lose, known after they are made.

    Attributes:
        errors: module name -> relative error.
        squares: |delta - B A|² and |delta|² over all modules.
        losses: what every rank would lose; filled only where a greatest rank is given.
    """

    errors: dict[str, float] = field(default_factory=dict)
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    losses: Losses | None = None

    @property
    def error(self) -> float:
        """Relative error of all modules together."""
        lost, total = self.squares
        return (lost / total) ** 0.5 if total else 0.0

    def add_(self, name: str, rows: torch.Tensor, rank: int) -> None:
        """Add the factors of this rank of a module's rows `[K, I]`."""
        total = float(rows.double().square().sum())
        lost = 0.0
        if self.losses is not None:
            squares = lost_squares(rows)
            self.losses.add_(squares)
            lost = 0.0 if rank == len(squares) - 1 else float(squares[rank])
        self.errors[name] = (lost / total) ** 0.5 if total else 0.0
        self.squares = [self.squares[0] + lost, self.squares[1] + total]


@dataclass(frozen=True)
class Plan:
    """A LoRA adapter to be written.

    Attributes:
        config: its configuration.
        ranks: module name -> rank of its factors.
        whole: names of modules that are saved as a whole.
        parts: its tensors.
        measured: what its factors lose.
    """

    config: LoraConfig
    ranks: dict[str, int]
    whole: list[str]
    parts: list[Part]
    measured: Measured


def make_plan(source: AdapterChanges, base: BaseFacts | None, settings: ExportSettings) -> Plan:
    """Decide how each module is saved; only biases and norms are read.

    Raises:
        ActValueError: as `export_lora`.
    """
    factored, whole, lora_bias = _divided(source, settings)
    kinds = {m.name: m.kind for m in factored}
    engine = settings.target.engine
    own = {m.name: factor_rank(m.index.numel(), m.width, settings.max_rank) for m in factored}
    ranks, zeros = dict(own), {}
    if engine is not None:
        check_for_engine(engine, kinds, base, [m.name for m in whole] + [module_of(key) for key in source.extra])
        zeros = missing_siblings(engine, kinds, base)
        ranks = dict.fromkeys([*own, *zeros], engine.rank_for(max(own.values())))
    elif settings.uniform_rank:
        ranks = dict.fromkeys(own, max(own.values()))
    measured = Measured(losses=None if settings.max_rank is None else Losses())
    dtype = factored[0].dtype
    parts = [_factor_part(m, own[m.name], ranks[m.name], measured, lora_bias=lora_bias) for m in factored]
    parts += [_zero_part(name, shape, ranks[name], dtype, measured) for name, shape in zeros.items()]
    parts += [_whole_part(m, part, info) for m in whole for part, info in m.whole_infos().items()]
    parts += _other_parts(source, ranks, [m.name for m in whole])
    config = lora_config(
        ranks,
        known=source.known if base is None else base.known,
        whole=sorted(m.name for m in whole),
        modules_to_save=source.config.modules_to_save or [],
        task_type=source.config.task_type,
        base_model_name_or_path=source.config.base_model_name_or_path,
        revision=source.config.revision,
        auto_mapping=source.config.auto_mapping,
        lora_bias=lora_bias,
        fan_in_fan_out=ChannelKind.CONV1D in kinds.values(),
        trainable_token_indices=source.config.trainable_token_indices,
    )
    if settings.target is Target.PEFT and base is not None and base.skeleton is not None:
        check_with_peft(config, infos_of(parts), base.skeleton)
    return Plan(config, ranks, sorted(m.name for m in whole), parts, measured)


def _divided(source: AdapterChanges, settings: ExportSettings) -> tuple[list[ModuleChange], list[ModuleChange], bool]:
    """The modules with factors, those that are saved as a whole, and whether there are biases beside factors."""
    choice = settings.biases
    modules = sorted(source.modules, key=lambda m: m.name)
    norms = [m for m in modules if m.kind.is_norm and (m.bias is not None or bool(m.rows().any()))]
    biased = [m for m in modules if not m.kind.is_norm and m.bias is not None]
    if choice is Biases.ERROR and (norms or biased):
        wayout = (
            "or pass biases='modules_to_save' to save these modules as a whole, or, where they are linear layers, "
            "biases='lora_bias'"
            if settings.target is Target.PEFT
            else "or make it with ActConfig(include_bias=False) and without norms"
        )
        raise ActValueError(
            f"{_named([*biased, *norms])}: deltas of biases and norms have no LoRA form, expected weights only "
            f"(merge the adapter with merge_checkpoint or merge_and_unload; {wayout})"
        )
    whole = [*biased, *norms] if choice is Biases.MODULES_TO_SAVE else []
    names = {m.name for m in whole}
    factored = [m for m in modules if not m.kind.is_norm and m.name not in names]
    if not factored:
        raise ActValueError(
            f"{source.origin}: no module is left for LoRA, expected at least one linear layer or embedding (merge the "
            "adapter with merge_checkpoint or merge_and_unload)"
        )
    lora_bias = choice is Biases.LORA_BIAS and bool(biased)
    unfit = [*norms, *(m for m in factored if lora_bias and m.kind is ChannelKind.EMBEDDING)]
    if choice is Biases.LORA_BIAS and unfit:
        raise ActValueError(
            f"{_named(unfit)}: biases='lora_bias' is only for linear layers, in an adapter without embeddings "
            "(merge the adapter with merge_checkpoint, or pass biases='modules_to_save')"
        )
    return factored, whole, lora_bias


def _factor_part(module: ModuleChange, own: int, rank: int, measured: Measured, *, lora_bias: bool) -> Part:
    """The factors of a module, of rank `own`, and zeros up to `rank`."""
    a, b = factor_keys(module.name, is_embedding=module.kind is ChannelKind.EMBEDDING)
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    infos = {a: (module.dtype, (rank, module.width)), b: (module.dtype, (module.num_channels, rank))}
    if lora_bias:
        infos[bias_key(module.name)] = (module.dtype, (module.num_channels,))

    def make() -> list[torch.Tensor]:
        rows = _finite(module, module.rows())  # [K, I]
        left, right = factors(rows, own)
        measured.add_(module.name, rows, own)
        lora_a = rows.new_zeros(rank, module.width)
        lora_a[:own] = right
        lora_b = rows.new_zeros(module.num_channels, rank)
        lora_b[module.index, :own] = left
        made = [lora_a, lora_b]
        if lora_bias:
            bias = rows.new_zeros(module.num_channels)
            if module.bias is not None:
                bias[module.index] = _finite(module, module.bias).to(bias)
            made.append(bias)
        return made

    return Part(infos, make)


def _other_parts(source: AdapterChanges, ranks: Container[str], saved: Container[str]) -> Iterator[Part]:
    """What the adapter holds beside deltas, under the names that PEFT gives it beside factors."""
    tokens = set()
    for key, tensor in source.extra.items():
        tokens.add(key.removeprefix(OUTER).partition(".token_adapter.")[0])
        yield _other_part(key, tensor)
    for name, tensor in source.of_base.items():
        module, _, part = name.rpartition(".")
        if module not in saved:
            inside = ".token_adapter.base_layer" if module in tokens else ".base_layer" if module in ranks else ""
            yield _other_part(f"{OUTER}{module}{inside}.{part}", tensor)


def _other_part(key: str, tensor: OtherTensor) -> Part:
    return Part({key: (tensor.dtype, tensor.shape)}, lambda: [tensor.read()])


def _zero_part(name: str, shape: tuple[int, int], rank: int, dtype: torch.dtype, measured: Measured) -> Part:
    """Factors of a module that does not change."""
    measured.errors[name] = 0.0
    shapes = ((rank, shape[1]), (shape[0], rank))
    infos = {key: (dtype, one) for key, one in zip(factor_keys(name), shapes, strict=True)}
    return Part(infos, lambda: [torch.zeros(one, dtype=dtype) for one in shapes])


def _whole_part(module: ModuleChange, part: str, info: tuple[torch.dtype, tuple[int, ...]]) -> Part:
    return Part({whole_key(module.name, part): info}, lambda: [_finite(module, module.whole(part))])


def _finite(module: ModuleChange, tensor: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise ActValueError(
            f"{module.name}: the deltas hold NaN or infinity, expected finite numbers (the adapter is broken)"
        )
    return tensor


def _named(modules: Sequence[ModuleChange]) -> str:
    return listed([m.name for m in modules])

"""`ActConfig`: the configuration of an ACT adapter, and its record in a saved adapter's folder."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType

from act_peft.adapter.base_record import _check_record
from act_peft.adapter.card import write_model_card
from act_peft.adapter.settings import check_settings, checked_channels, checked_donor
from act_peft.adapter.stored import read_deltas
from act_peft.channels.masks import ChannelMask
from act_peft.checks import finite_number, member_of, yes_or_no
from act_peft.disk.atomic import write_file
from act_peft.disk.json_text import parse_json
from act_peft.disk.shard import Shard
from act_peft.doors import EMBEDDING_LAYER_NAMES
from act_peft.errors import ActError, ActLoadError, ActValueError, ActWarning
from act_peft.interrupts import scratch_folder
from act_peft.plain import one_line


class Trainable(Enum):
    """Which tensors of an adapter are trained; `ActConfig.trainable`.

    DELTAS: the rows of the selected channels. SCALES: one scale per channel on the donor's frozen difference. BOTH:
    one scale per channel, and the rows that it multiplies.
    """

    DELTAS = "deltas"
    SCALES = "scales"
    BOTH = "both"

    @property
    def has_scales(self) -> bool:
        """Whether an adapter has one scale per channel."""
        return self is not Trainable.DELTAS

    @property
    def trains_rows(self) -> bool:
        """Whether the rows are trained."""
        return self is not Trainable.SCALES


@dataclass
class ActConfig(PeftConfig):
    """Configuration of an ACT adapter: the selected channels, and the donor of their values.

    `ActConfig()` without channels is allowed; `get_peft_model` needs them.

    Args:
        channels: the selected channels: a `ChannelMask`, a dict `module name -> channels`, or the path of a saved
            mask. A name matches a module exactly or as a dotted suffix, as `target_modules` does (`"q_proj"` matches
            every `...q_proj`). Not written to `adapter_config.json`: the indices are saved with the tensors.
        donor: folder or Hub id of the donor. It is read once, when the adapter is created, and never when the adapter
            is loaded.
        donor_revision: revision of a donor on the Hub.
        transfer_scale: λ, the factor of the donor's difference. With 1 the selected rows are those of the donor.
        target_modules: use `channels` for these modules only; names or one regular expression, as in PEFT. By default
            every module that `channels` names. Other entries of `channels` are ignored.
        exclude_modules: modules that get no adapter, names or one regular expression.
        modules_to_save: more modules to train and save as a whole.
        trainable_token_indices: rows of the token embedding to train, as in PEFT.
        layers_to_transform: only modules in the layers of these numbers.
        layers_pattern: name of the list of layers for `layers_to_transform`.
        include_bias: whether the biases of selected channels move and train too. Serving engines load LoRA adapters
            without biases only: with False, `export_lora` has none to refuse.
        init_weights: True: the deltas start at zero (or at the donor's difference); False: random, for tests.
        trainable: the trained tensors. `"deltas"`: the selected rows. `"scales"`: one scale per channel, which starts
            at `transfer_scale`, on the donor's frozen difference. `"both"`: the scales and the rows that they
            multiply. See `ScaleSparsityCallback` and `prune_channels`.
        offload_deltas: with `trainable="scales"`: keep the frozen differences in CPU memory and copy them to the
            model's device layer by layer, in every forward and backward pass. Slower; for differences that do not fit
            into the device's memory. Ends with `prune_channels`.
        lora_twin: whether `save_pretrained`, trainers and `push_to_hub` also write the adapter as an ordinary LoRA
            adapter, in the folder `lora` inside, for programs that never import act_peft. Set by
            `save_pretrained(..., lora_twin=True)` too.
        density: selected channels / all channels of the mask; filled in by the library.
        adapted_modules: module name -> kind, number of channels, number of selected channels, fingerprint of their
            base rows; filled in by the library.

    Raises:
        ActValueError, ActTypeError: for values that fit no model. The fit to a model is checked when the adapter is
            created.

    Example:
        >>> config = ActConfig(channels=mask, donor=DONOR, transfer_scale=0.4, task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
        >>> model.save_pretrained("ability")
    """

    channels: Any = field(
        default=None,
        metadata={"help": "The selected channels: a ChannelMask, a dict of lists, or the path of a saved mask."},
    )
    donor: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the model whose channels move over."}
    )
    donor_revision: str | None = field(default=None, metadata={"help": "Revision of a donor on the Hub."})
    transfer_scale: float = field(
        default=0.4, metadata={"help": "Share of the donor's difference that is added to the selected channels."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt, names or a regular expression; default: all in `channels`."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave out, names or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save as a whole."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the token embedding to train as well, as in PEFT."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only modules in the layers of these numbers."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that `layers_to_transform` counts in."}
    )
    include_bias: bool = field(
        default=True, metadata={"help": "Whether the biases of the selected channels have deltas too."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Zero (or the donor's difference) if True, random otherwise (for tests)."}
    )
    trainable: str = field(default="deltas", metadata={"help": "'deltas' (the selected rows), 'scales' or 'both'."})
    offload_deltas: bool = field(
        default=False, metadata={"help": "Keep the frozen differences of trainable='scales' in CPU memory."}
    )
    lora_twin: bool = field(
        default=False, metadata={"help": "Also save an ordinary LoRA adapter, in the folder `lora` inside."}
    )
    density: float | None = field(
        default=None, metadata={"help": "Share of the channels that is selected; filled in by the library."}
    )
    adapted_modules: dict[str, dict[str, Any]] | None = field(
        default=None, metadata={"help": "Record of each adapted module; filled in by the library."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT passes `peft_type` as text when it builds a config from a file; users do not. The donor in a file is a
        # record and never opened.
        given = vars(self)["peft_type"]
        self._named_targets: set[str] | None = None
        as_text = isinstance(given, str) and not isinstance(given, PeftType)
        self._from_file = as_text and not isinstance(self.channels, ChannelMask)  # a file holds no mask
        if self._from_file and self.channels is not None:
            raise ActValueError(
                f"channels: got {str(self.channels)[:80]!r} in a configuration from a file, expected none (for a new "
                "adapter leave peft_type out: ActConfig(channels=..., donor=...))"
            )
        self.peft_type = PeftType("ACT")
        check_settings(self)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.channels is not None:
            self.channels = checked_channels(self.channels)
        if self.donor is not None:
            self.donor = checked_donor(self.donor)
        scale = finite_number(self.transfer_scale, "transfer_scale")
        if not isinstance(self.transfer_scale, (int, float)):  # a file holds plain numbers only
            self.transfer_scale = scale
        self.trainable = member_of(Trainable, self.trainable, "trainable").value
        if self.offload_deltas and self.trains.trains_rows:
            raise ActValueError(
                f"offload_deltas: got True with trainable={self.trainable!r}, expected 'scales' (trained rows must be "
                "on the model's device)"
            )
        yes_or_no(self.include_bias, "include_bias")
        yes_or_no(self.lora_twin, "lora_twin")
        _check_record(self.adapted_modules)
        if self._from_file:
            self._show_plainly()
            if self.adapted_modules is not None:
                self._forget_patterns()
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ActValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ActValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.donor_revision is not None and self.donor is None:
            raise ActValueError("donor_revision: given without a donor (name the donor, or leave the revision out)")

    def _forget_patterns(self) -> None:
        """Leave out regular expressions of a file: its modules are recorded, and an expression may take for ever."""
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, None)
        self.layers_to_transform = self.layers_pattern = None

    def _show_plainly(self) -> None:
        """Take what a file says about itself as one printable line: PEFT quotes it in warnings and in its card."""
        for name in ("base_model_name_or_path", "revision", "donor", "donor_revision"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, one_line(getattr(self, name)))

    @property
    def trains(self) -> Trainable:
        """What trains, as a member of the enum."""
        return Trainable(self.trainable)

    @property
    def from_file(self) -> bool:
        """Whether this config was read from an adapter's folder."""
        return self._from_file

    @property
    def chosen_targets(self) -> set[str] | str | None:
        """The user's `target_modules`; None if `name_targets` filled them in."""
        return None if self.target_modules == self._named_targets else cast(Any, self.target_modules)

    def name_targets(self, names: Iterable[str]) -> None:
        """Fill in `target_modules` if the user chose none, for tools that read them from the configuration.

        PEFT's `convert_to_lora` reads them. It would save a whole embedding that is named there, so modules with the
        usual names of embeddings (`lm_head`) are left out.

        Args:
            names: the modules that have an adapter.
        """
        if self.chosen_targets is None:
            self.target_modules = self._named_targets = set(names) - set(EMBEDDING_LAYER_NAMES)

    def forget_named_targets(self) -> None:
        """Undo `name_targets`: PEFT would shorten a long list of names, and it would look like the user's choice."""
        self.target_modules = self.chosen_targets
        self._named_targets = None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dict of plain values, without the channel indices."""
        names = [f.name for f in fields(self) if f.name not in ("channels", "target_modules")]
        plain = {name: copy.deepcopy(getattr(self, name)) for name in names}
        return {"channels": None, "target_modules": copy.copy(self.chosen_targets), **plain}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` and, if the folder holds an adapter's tensors, the model card.

        Args:
            save_directory: the adapter's folder.
            kwargs: as in PEFT.

        Raises:
            ActValueError: if `save_directory` is a file.
        """
        config = copy.copy(self)
        config.target_modules = _sorted_if_set(self.chosen_targets)
        config.exclude_modules = _sorted_if_set(self.exclude_modules)
        if os.path.isfile(save_directory):
            raise ActValueError(f"{save_directory}: got a file, expected a folder to save the adapter in")
        os.makedirs(save_directory, exist_ok=True)
        with scratch_folder() as scratch:
            super(ActConfig, config).save_pretrained(str(scratch), **kwargs)
            write_file(os.path.join(save_directory, CONFIG_NAME), (scratch / CONFIG_NAME).read_bytes())
        if os.path.isfile(os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)):
            write_model_card(save_directory, self.to_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Read the configuration of a saved adapter.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the adapter.
            subfolder: folder inside it.
            kwargs: as in PEFT.

        Raises:
            ActValueError: if the path is a file, or the configuration cannot be used.
            ActLoadError: if the folder's tensors cannot be read, or do not fit the configuration.

        Warns:
            ActWarning: if a local folder holds pickled tensors only.
        """
        folder = os.path.join(pretrained_model_name_or_path, *([subfolder] if subfolder else []))
        _check_pickled(folder)
        if os.path.isfile(pretrained_model_name_or_path):
            raise ActValueError(
                f"{pretrained_model_name_or_path}: got a file, expected the adapter's folder (with {CONFIG_NAME})"
            )
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except ActError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise ActValueError(
                f"{folder}: {CONFIG_NAME} cannot be used ({_reason(error)}), expected the configuration of an adapter"
            ) from error
        tensors = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if isinstance(config, ActConfig) and os.path.exists(tensors):  # those on the Hub are not here yet
            try:
                with Shard(tensors) as shard:
                    read_deltas(shard, folder, recorded=config.adapted_modules, has_scales=config.trains.has_scales)
            except ActValueError as error:
                raise ActLoadError(str(error)) from error
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> Any:
        """Read the content of an `adapter_config.json`, which PEFT makes a configuration of.

        Args:
            path_json_file: the file.
            kwargs: as in PEFT, without a meaning.

        Raises:
            ActValueError: it cannot be read, or is no JSON object.
        """
        try:
            content = Path(path_json_file).read_bytes()
        except OSError as error:
            raise ActValueError(f"{path_json_file}: cannot be read ({error.strerror}), expected a file") from error
        return parse_json(content, path_json_file)


def config_from(content: Mapping[str, Any], where: str) -> ActConfig:
    """The configuration that an `adapter_config.json` holds.

    Args:
        content: what was read.
        where: the file, for messages.

    Raises:
        ActValueError: it cannot be used.
    """
    try:
        return cast(ActConfig, ActConfig.from_peft_type(**content))
    except (ValueError, TypeError) as error:
        raise ActValueError(
            f"{where}: cannot be used ({_reason(error)}), expected the configuration of an ACT adapter"
        ) from error


def _reason(error: Exception) -> str:
    kind = f"{type(error).__name__}: " if isinstance(error, KeyError) else ""
    return f"{kind}{str(error)[:300]}"


def record_adapter(config: ActConfig, modules: Mapping[str, dict[str, Any]], *, kept: float | None = None) -> None:
    """Write into a configuration what its adapter holds: `adapted_modules`, `density`, and names of targets.

    Args:
        config: the adapter's configuration.
        modules: module name -> its `module_record`.
        kept: for an adapter that lost channels, the share of its channels that it still has.
    """
    config.adapted_modules = dict(modules)
    if kept is not None:
        config.density = None if config.density is None else config.density * kept
    elif isinstance(config.channels, ChannelMask):
        selected = sum(entry["selected"] for entry in modules.values())
        config.density = selected / sum(config.channels.num_channels.values())
    config.name_targets(modules)


def _check_pickled(folder: str) -> None:
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    safe, pickled = (os.path.isfile(os.path.join(folder, name)) for name in names)
    if pickled and not safe:
        warnings.warn(
            f"{folder}: the adapter is pickled ({WEIGHTS_NAME}), which PEFT reads with torch's restricted unpickler "
            "(save it with safe_serialization=True instead)",
            ActWarning,
            stacklevel=4,
        )


def _sorted_if_set(names: Any) -> Any:
    return sorted(names) if isinstance(names, set) else names

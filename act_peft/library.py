"""The public names of the library; importing them registers the method with PEFT.

`act_peft/__init__.py` hands these names on: at once in a script, at the first use in a command.
"""

from act_peft import __version__
from act_peft.adapter.config import ActConfig
from act_peft.channels.masks import ChannelMask
from act_peft.channels.scores import ChannelScores
from act_peft.combination.combine import combine, find_conflicts
from act_peft.errors import ActError, ActLoadError, ActTypeError, ActValueError, ActWarning
from act_peft.evaluation import Evaluation, evaluate
from act_peft.export import export_lora
from act_peft.fitting import FittedTransfer, fit
from act_peft.localization import localize
from act_peft.merge import merge_checkpoint
from act_peft.sweeps.sweep import sweep
from act_peft.training.donor import DonorCallback
from act_peft.training.keep import KeepCallback
from act_peft.training.prune import prune_channels
from act_peft.training.scales import ScaleSparsityCallback
from act_peft.transfer.in_model import initialize_from_donor
from act_peft.transfer.on_disk import create_adapter
from act_peft.tuner.model import ActModel
from act_peft.tuner.registration import register

__all__ = [
    "ActConfig",
    "ActError",
    "ActLoadError",
    "ActModel",
    "ActTypeError",
    "ActValueError",
    "ActWarning",
    "ChannelMask",
    "ChannelScores",
    "DonorCallback",
    "Evaluation",
    "FittedTransfer",
    "KeepCallback",
    "ScaleSparsityCallback",
    "__version__",
    "combine",
    "create_adapter",
    "evaluate",
    "export_lora",
    "find_conflicts",
    "fit",
    "initialize_from_donor",
    "localize",
    "merge_checkpoint",
    "prune_channels",
    "sweep",
]

register(ActConfig, ActModel)

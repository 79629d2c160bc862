"""Ability transfer between related models as an extension of PEFT (arXiv 2601.09398).

`import act_peft` registers the method with PEFT; see `ActConfig` and `localize` for where to start.
"""

from act_peft.combine import combine, find_conflicts
from act_peft.config import ActConfig
from act_peft.create import create_adapter
from act_peft.errors import ActError, ActLoadError, ActTypeError, ActValueError, ActWarning
from act_peft.export import export_lora
from act_peft.keeping import KeepCallback
from act_peft.localize import localize
from act_peft.masks import ChannelMask
from act_peft.merge import merge_checkpoint
from act_peft.model import ActModel
from act_peft.registration import register
from act_peft.scales import ScaleSparsityCallback, prune_channels
from act_peft.scores import ChannelScores
from act_peft.sweep import sweep
from act_peft.transfer import initialize_from_donor

__version__ = "0.1.0"

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
    "KeepCallback",
    "ScaleSparsityCallback",
    "__version__",
    "combine",
    "create_adapter",
    "export_lora",
    "find_conflicts",
    "initialize_from_donor",
    "localize",
    "merge_checkpoint",
    "prune_channels",
    "sweep",
]

register(ActConfig, ActModel)

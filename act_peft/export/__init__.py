"""LoRA adapters: an ACT adapter as one, and the writing of their folders."""

from act_peft.export.lora import Biases, LoraExport, check_lora, export_lora
from act_peft.export.targets import Target

__all__ = ["Biases", "LoraExport", "Target", "check_lora", "export_lora"]

"""Fitted transfer: which part of a donor's difference to take, in closed form."""

from act_peft.fitting.closed_form import CollectedInputs, fit
from act_peft.fitting.fitted import FittedTransfer
from act_peft.fitting.lora import FittedLora
from act_peft.fitting.module import FitRecord, FittedModule
from act_peft.fitting.settings import FitSettings

__all__ = ["CollectedInputs", "FitRecord", "FitSettings", "FittedLora", "FittedModule", "FittedTransfer", "fit"]

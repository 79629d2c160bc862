"""Step 1 of the method: find the channels in which two related models differ. Works on any two modules."""

from act_peft.localization.scoring import localize

__all__ = ["localize"]

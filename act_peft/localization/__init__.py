"""Step 1 of the method: in which channels two related models differ. Works on any two modules."""

from act_peft.localization.scoring import localize

__all__ = ["localize"]

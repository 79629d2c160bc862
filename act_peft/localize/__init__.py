"""Step 1 of the method: in which channels two related models answer differently. Works on any two modules."""

from act_peft.localize.loop import localize

__all__ = ["localize"]

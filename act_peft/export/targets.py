"""What the programs that load LoRA adapters take: ranks, scales, modules.

PEFT: a rank and an alpha for each module (`rank_pattern`, `alpha_pattern`), biases, whole modules.
vLLM: `lora_alpha / r` for all modules (only its newest versions read patterns); ranks up to `--max-lora-rank`, which
    is one of a list; neither biases nor whole modules; embeddings and output layers only of models that declare them.
SGLang: `lora_alpha / r` for all modules; refuses patterns; loads q, k and v of a layer together, and gate and up.
llama.cpp: `lora_alpha` / columns of B, so one alpha for all modules; pairs of factors and nothing else; one tensor for
    an embedding and an output layer that share their weight.

One rank for all modules, with alpha = rank and without patterns, is right in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from act_peft.errors import ActValueError

_NAMED = 8  # modules that a message lists by name


class Target(Enum):
    """The program that is to load a LoRA adapter. Ollama loads what llama.cpp does."""

    PEFT = "peft"
    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama.cpp"

    @property
    def engine(self) -> Engine | None:
        """What it takes; None for PEFT, which takes everything."""
        return _ENGINES.get(self)


@dataclass(frozen=True)
class Engine:
    """What a serving engine takes.

    Attributes:
        name: as its users write it.
        ranks: the ranks that it accepts, ascending; empty for any.
        fused: names of modules that it runs as one, and so loads only together.
        has_own_heads: whether a tied output layer and its embedding can have a change each.
        reads_conv1d: whether it loads factors of the transposed layers of GPT-2.
    """

    name: str
    ranks: Sequence[int] = ()
    fused: Sequence[Sequence[str]] = ()
    has_own_heads: bool = True
    reads_conv1d: bool = True

    def rank_for(self, needed: int) -> int:
        """The lowest accepted rank that is not below `needed`.

        Raises:
            ActValueError: there is none.
        """
        if not self.ranks:
            return needed
        if needed > self.ranks[-1]:
            raise ActValueError(
                f"{self.name}: the factors have rank {needed}, expected at most {self.ranks[-1]} (pass "
                f"max_rank={self.ranks[-1]} for the best factors of this rank, or merge the adapter)"
            )
        return next(rank for rank in self.ranks if rank >= needed)

    def siblings(self, name: str) -> list[str]:
        """The modules that this one is loaded together with, itself included; none if it is loaded alone."""
        parent, dot, last = name.rpartition(".")
        return [f"{parent}{dot}{other}" for group in self.fused if last in group for other in group]


_ENGINES = {
    Target.VLLM: Engine("vLLM", ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512)),
    Target.SGLANG: Engine("SGLang", fused=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))),
    Target.LLAMA_CPP: Engine("llama.cpp", has_own_heads=False, reads_conv1d=False),
}


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first few of many."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")

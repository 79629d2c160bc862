"""Results that print as tables, and go to pandas where it is installed."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from act_peft.errors import ActError
from act_peft.tables import aligned

if TYPE_CHECKING:
    from pandas import DataFrame


class Table(ABC):
    """A result with one row for each thing that was measured."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What was found, in one line."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know besides, one sentence each."""
        return ()

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """The rows as plain values, the same keys in each."""

    def to_pandas(self) -> DataFrame:
        """The rows as a DataFrame.

        Raises:
            ActError: pandas is not installed.
        """
        if importlib.util.find_spec("pandas") is None:
            raise ActError("to_pandas: pandas is not installed, expected it (pip install pandas, or use records())")
        from pandas import DataFrame

        return DataFrame.from_records(self.records())

    def texts(self) -> list[list[str]]:
        """The head and the rows as text."""
        records = self.records()
        return [list(records[0]), *([_text(value) for value in record.values()] for record in records)]

    def __str__(self) -> str:
        return "\n".join([self.title, *self.notes, "", *aligned(self.texts())])


def percent(share: float) -> str:
    """A share in words: 0.0312 is 3.1%."""
    value = 100 * share
    return f"{value:.0f}%" if value >= 9.95 or value == 0 else f"{value:.2g}%"


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

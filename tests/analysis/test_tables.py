from __future__ import annotations

import importlib.util

import pytest

from act_peft import analysis
from act_peft.analysis.tables import Table, percent
from act_peft.errors import ActError


class Two(Table):
    title = "two rows"

    def records(self):
        return [{"name": "a", "share": 0.25, "number": 12345}, {"name": "b", "share": None, "number": 1234.5}]


def test_prints():
    assert str(Two()).splitlines() == [
        "two rows",
        "",
        "name  share  number",
        "a     0.250  12,345",
        "b             1,234",
    ]


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = Two().to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["number"].tolist() == [12345, 1234.5]


def test_without_pandas(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ActError, match=r"to_pandas: pandas is not installed, expected it \(pip install pandas"):
        Two().to_pandas()


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0%"), (0.0312, "3.1%"), (0.0996, "10%"), (1, "100%"), (0.00012, "0.012%")]
)
def test_percent(share, text):
    assert percent(share) == text


def test_names_are_imported_when_they_are_used():
    for name in analysis.__all__:
        assert getattr(analysis, name).__name__ == name
    with pytest.raises(AttributeError, match=r"module 'act_peft.analysis' has no attribute 'nothing'"):
        _ = analysis.nothing

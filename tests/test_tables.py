from __future__ import annotations

from act_peft.tables import aligned


def test_columns_are_aligned_and_lines_end_without_spaces():
    rows = [["module", "shared", ""], ["q", "1", "best"], ["lm_head", "100", ""]]
    assert aligned(rows, left=(0, 2)) == ["module   shared", "q             1  best", "lm_head     100"]


def test_a_table_without_lines_is_empty():
    assert aligned([]) == []

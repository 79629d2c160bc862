"""One HTML page about files of scores, masks, adapters, sweeps and patching."""

from act_peft.report.page import write_report

__all__ = ["write_report"]

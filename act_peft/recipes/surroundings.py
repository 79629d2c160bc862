"""Settings of the process that a long run changes for a while: threads, network, messages of other libraries."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch
from transformers.utils import logging as transformers_logging

from act_peft.doors import hub_constants


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: models this small are quicker, and the results do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def offline() -> Iterator[None]:
    """Use no network: TRL does not report its use, and a request to the Hub fails."""
    offline = hub_constants.HF_HUB_OFFLINE
    hub_constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub_constants.HF_HUB_OFFLINE = offline


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and warnings of the libraries below."""
    verbosity = transformers_logging.get_verbosity()
    weights_bar = transformers_logging.is_progress_bar_enabled()
    map_bar = datasets.are_progress_bars_disabled()
    trl_logger = logging.getLogger("trl")
    trl_level = trl_logger.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    trl_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):  # they concern calls between these libraries
                warnings.simplefilter("ignore", category)
            yield
    finally:
        trl_logger.setLevel(trl_level)
        transformers_logging.set_verbosity(verbosity)
        if weights_bar:
            transformers_logging.enable_progress_bar()
        if not map_bar:
            datasets.enable_progress_bars()

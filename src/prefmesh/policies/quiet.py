"""Silence where a library would draw progress of its own, or warn of what does not concern a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# PEFT imports bitsandbytes where it is installed, which then warns of a missing product for inference that nobody here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars that transformers draws while it reads or writes weights."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()

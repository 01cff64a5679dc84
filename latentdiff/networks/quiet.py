"""The libraries' own progress bars and warnings, switched off while they load and save networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def quietly() -> Iterator[None]:
    """A block without the libraries' progress bars and warnings.

    diffusers warns about settings that it does not read, even one that it writes itself for a tiny VAE. We check
    weights ourselves.
    """
    bars, level = diffusers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    hook = transformers_logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **{**options, "disable": True}))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(hook)
        diffusers_logging.set_verbosity(level)
        if bars:
            diffusers_logging.enable_progress_bar()

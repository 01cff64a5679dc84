"""Weights of 8 or 4 bits in OpenVINO's graphs, by NNCF: the graph widens them when it computes.

int8    a scale and a zero for each output
int4    groups of 64 weights with a scale each; the first and last layers int8

Convolutions keep 16 bits: on a CPU the library widens those of fewer bits to 32 when it compiles (OpenVINO 2026.4), so
that Stable Diffusion 1.5's graphs would take a third more memory instead of less.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from typing import Any

from latentdiff.core.errors import ConfigError

GROUP = 64


def compressed(graph: Any, kind: str) -> Any:
    """A graph with compressed weights; the graph may be changed in place. Raises ConfigError without NNCF."""
    nncf = _library()
    modes, whole = nncf.CompressWeightsMode, nncf.IgnoredScope(types=["Convolution"], validate=False)
    if kind == "int8":
        return nncf.compress_weights(graph, mode=modes.INT8_ASYM, ignored_scope=whole)
    smaller = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    return nncf.compress_weights(
        graph, mode=modes.INT4_SYM, group_size=GROUP, advanced_parameters=smaller, ignored_scope=whole
    )


@cache
def _library() -> Any:
    """NNCF without its reports to Intel, its notes and its progress bar, which goes to standard output."""
    silenced, known = "NNCF_DEV", os.environ.get("NNCF_DEV")
    os.environ[silenced] = "1"  # read once, at import: then nothing is reported
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nncf
            import rich
    except ImportError:
        raise ConfigError("int8 and int4 in OpenVINO require NNCF: pip install 'latentdiff[quantize]'") from None
    finally:
        if known is None:
            del os.environ[silenced]
        else:
            os.environ[silenced] = known
    nncf.set_log_level(logging.ERROR)
    rich.get_console().quiet = True
    return nncf

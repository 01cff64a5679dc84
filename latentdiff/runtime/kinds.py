"""The kinds of quantized weights, by runtime; see quantized.py and compressed.py."""

from __future__ import annotations

from latentdiff.core.errors import ConfigError

TORCH = ("int8", "fp8", "q8_0", "q4_0")
OPENVINO = ("int8", "int4")
OPENVINO_ONLY = {*OPENVINO} - {*TORCH}  # kinds that torch does not have
_ALL = tuple(dict.fromkeys((*TORCH, *OPENVINO)))


def check_kind(kind: str | None, runtime: str) -> None:
    """Raises ConfigError for weights of a kind that the runtime does not have; auto has all."""
    known = {"torch": TORCH, "openvino": OPENVINO}.get(runtime, _ALL)
    if kind is not None and kind not in known:
        where = "" if runtime == "auto" else f" in {runtime}"
        raise ConfigError(f"unknown kind of weights{where} {str(kind)[:40]!r}; one of {', '.join(known)}")

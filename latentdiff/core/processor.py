"""What this machine's processor can do, by torch. runtime/compiling.py asks OpenVINO, without importing torch."""

from __future__ import annotations

import torch


def multiplies_bfloat16() -> bool:
    """Whether the processor has arithmetic for bfloat16. Without it, bfloat16 is three times slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(kind, False) for kind in ("amx_bf16", "avx512_bf16", "bf16"))

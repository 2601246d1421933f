# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""bfloat16 where the device computes with it. A processor without it has to convert every number, and is slower by far."""

import torch


def find_device() -> str:
    """`"cuda"` if there is such a GPU, else `"cpu"`. On other accelerators bfloat16 was never tried."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def computes_bfloat16(device_type: str) -> bool:
    """Whether a device of this type, such as `"cpu"`, has instructions for bfloat16."""
    if device_type != "cpu":
        return True
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch does not say
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def autocast(device_type: str) -> torch.autocast:
    """Computes in bfloat16 where that is fast, and else in float32."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=computes_bfloat16(device_type))

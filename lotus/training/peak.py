"""What GPUs can compute at most, for the fraction of it that a training reaches (MFU)."""

from __future__ import annotations

import torch

PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}
"""Operations a second of dense bf16 with accumulation in fp32 (V100: fp16), by the makers' data sheets; by a part of the name."""


def peak(device: torch.device) -> float:
    """Of ``device``; 0 where nobody knows, as of a CPU."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAK.items() if part in name), 0.0)

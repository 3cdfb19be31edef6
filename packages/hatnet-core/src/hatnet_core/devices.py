"""Pick a device by name."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """Return the device of a name such as ``cpu`` or ``cuda:1``; ``auto`` is a GPU if there is one.

    Raises:
        ValueError: if torch does not know the name, or cannot compute on the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a name can be valid without such a device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        known = "" if reason.startswith("Expected one of") else f": {reason}"  # a list of every backend of torch
        expected = "auto, cpu, or an available GPU such as cuda:0"
        raise ValueError(f"device must be {expected}, got {name!r}{known}") from error
    return device

"""Errors between processes."""

from __future__ import annotations

LOST_CONTACT = (
    r"Connection (closed by peer|reset)|Connection refused|NCCL|ProcessGroup|Timed out waiting|gloo|Broken pipe"
)
"""Matches errors of torch's communication."""


class AgreedError(ValueError):
    """Error that all ranks raise together: none waits for another, so that all can leave in order."""

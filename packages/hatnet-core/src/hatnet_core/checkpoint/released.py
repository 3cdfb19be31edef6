"""Translate the parameter names of the released files to those of :class:`hatnet_core.HATNet`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

RELEASED_NAMES: list[tuple[str, str]] = [
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.1\.", "stem.norm."),
    (r"^patch_embed\.3\.", "stem.conv2."),
    (r"^ds2\.", "stages.1.downsample."),
    (r"^ds3\.", "stages.2.downsample."),
    (r"^ds4\.", "stages.3.downsample."),
    (r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.ds_norm\.", ".attn.pool_norm."),
    (r"\.conv\.conv1\.0\.", ".mlp.norm."),
    (r"\.conv\.conv1\.1\.", ".mlp.expand."),
    (r"\.conv\.conv2\.0\.", ".mlp.dwconv."),
    (r"\.conv\.conv3\.0\.", ".mlp.project."),
    (r"\.conv\.conv3\.1\.", ".mlp.out_norm."),
    (r"^classifier\.1\.", "head."),
]
"""Regular expressions that turn a released parameter name into ours, applied in order."""

RELEASED_UNUSED = re.compile(r"\.attn\.proj_norm\.(weight|bias)$")
"""Matches released parameters that the computation does not use; loading drops them."""


def rename_released(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename a state dict of the released files, and list the dropped names; return any other unchanged."""
    if "patch_embed.0.weight" not in state:
        return dict(state), []
    dropped = [name for name in state if RELEASED_UNUSED.search(name)]
    renamed = {}
    for name, tensor in state.items():
        if name in dropped:
            continue
        ours = name
        for pattern, replacement in RELEASED_NAMES:
            ours = re.sub(pattern, replacement, ours)
        renamed[ours] = tensor
    return renamed, dropped

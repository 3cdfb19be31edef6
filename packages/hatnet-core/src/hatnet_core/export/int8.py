"""Quantise an ONNX graph to int8 with ranges measured on images: for ONNX Runtime, and for OpenVINO by NNCF."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH = 8
"""Images that calibration computes at a time."""

QUANTISED = ["Conv", "Gemm"]
"""Operators of the weights. The attention stays in fp32: 8 bits cannot represent the masks of its softmax."""


KEPT = ["MatMul", "Softmax", "AvgPool"]
"""Operators of OpenVINO that stay in fp32: the attention, and its pooling, which the runtime refuses in int8."""


def quantise_onnx(graph: Path, path: Path, images: Tensor) -> None:
    """Write an ONNX graph with int8 convolutions and classifier.

    Args:
        graph: the graph in fp32.
        path: the file to write.
        images: [N, in_chans, H, W], whose activations give the ranges.
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not annotated
        def __init__(self) -> None:
            self.batches = _batches(graph, images)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    before = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises a step that fails for dynamic sizes
    try:
        quantize_static(graph, path, Images(), op_types_to_quantize=QUANTISED, per_channel=True)
    finally:
        logging.root.setLevel(before)


def quantise_openvino(graph: Path, images: Tensor) -> Any:
    """Return an ``openvino.Model`` in int8; arguments as for :func:`quantise_onnx`."""
    import nncf
    import openvino

    model = openvino.Core().read_model(str(graph))
    batches = list(_batches(graph, images))
    scope = nncf.IgnoredScope(types=KEPT)
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # its progress bar
        return nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), ignored_scope=scope)


def _batches(graph: Path, images: Tensor) -> Iterator[dict[str, Any]]:
    import onnx

    fixed = onnx.load(graph, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[0].dim_value
    return ({"image": batch.numpy()} for batch in torch.split(images, fixed or BATCH))

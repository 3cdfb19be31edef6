"""Export a model as one ``torch.export`` program or ONNX graph for every batch size, height and width.

ONNX needs the extra ``hatnet-core[onnx]``. TorchScript is not supported: torch deprecates it in favour of
``torch.export``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hatnet_core.model import HATNet, unwrap
from hatnet_core.variants import MIN_SIZE

TOLERANCE = 1e-4
"""Largest accepted difference of the outputs, relative to the largest output."""


def export_program(model: nn.Module, size: tuple[int, int] = (224, 224), static: bool = False) -> ExportedProgram:
    """Trace ``model`` in evaluation mode, with ``torch.export``.

    The same as ``torch.export.export`` (not strict, its default) with named dynamic dimensions. A dynamic program
    takes every size from 32 pixels up, whatever size it was traced with.

    Args:
        model: the model, or one wrapped as :func:`hatnet_core.model.unwrap` undoes; its training mode is left as it
            was.
        size: height and width of the image to trace with, in pixels.
        static: restrict the program to this size and one image at a time.

    Returns:
        The program, with one input ``x`` [batch, in_chans, height, width]; ``torch.export.save`` writes it.

    Raises:
        TypeError: if ``model`` is not a :class:`HATNet`.
        ValueError: if ``size`` is below 32 pixels.
    """
    model = unwrap(model)
    image = _image(model, 1 if static else 2, *size)
    with _evaluation(model), torch.no_grad():
        return torch.export.export(model, (image,), dynamic_shapes=None if static else (_dynamic_dims(),))


def export_onnx(
    model: nn.Module,
    path: str | Path,
    size: tuple[int, int] = (224, 224),
    static: bool = False,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``model`` in evaluation mode as an ONNX graph with input ``image`` and output ``logits``.

    Args:
        model: the model, or one wrapped as :func:`hatnet_core.model.unwrap` undoes; its training mode is left as it
            was.
        path: the file to write.
        size: height and width of the image to trace with, in pixels.
        static: restrict the graph to this size and one image at a time.
        opset: version of ONNX's operators; by default the one that torch recommends.
        metadata: written as the graph's ``metadata_props``.

    Raises:
        ImportError: if onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it, after minutes of work
    except ImportError as error:
        raise ImportError("ONNX export needs onnxscript: pip install 'hatnet-core[onnx]'") from error
    model = unwrap(model)
    image = _image(model, 1 if static else 2, *size)
    with _evaluation(model), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch.onnx about torch itself
        program = torch.onnx.export(
            model,
            (image,),
            dynamo=True,
            dynamic_shapes=None if static else (_dynamic_dims(),),
            input_names=["image"],
            output_names=["logits"],
            opset_version=opset,
            verbose=False,
        )
    program = cast(torch.onnx.ONNXProgram, program)
    for name, constant in list(program.model.graph.initializers.items()):
        # onnxruntime's quantiser copies a constant under the next number, which may be the name of a result
        if name.startswith("val_"):
            constant.name = name.replace("val_", "constant_")
    program.model.metadata_props.update(metadata or {})
    program.save(str(path))


def largest_difference(
    model: nn.Module,
    path: str | Path,
    shapes: Sequence[tuple[int, int, int]],
    run: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Compare the outputs of an exported file with those of ``model`` on random images.

    Args:
        model: the model that was exported; run in evaluation mode.
        path: the file, ``.pt2`` or ``.onnx``.
        shapes: batch size, height and width of each input.
        run: the opened file, for other formats; by default it is opened here.

    Returns:
        The largest absolute difference, divided by the largest absolute output of the model if that is not 0; NaN if
        an output is NaN.

    Raises:
        ImportError: if the file is ONNX and onnxruntime is not installed.
    """
    from hatnet_core.export.formats import open_export

    run, model = run or open_export(path), unwrap(model)
    differences, outputs = [], []
    with _evaluation(model), torch.no_grad():
        for batch, height, width in shapes:
            image = _image(model, batch, height, width)
            outputs.append(model(image).abs().max())
            differences.append((run(image) - model(image)).abs().max())
    difference, scale = torch.stack(differences).max(), torch.stack(outputs).max()  # unlike max(), both keep NaN
    return (difference / scale if scale else difference).item()


def check_shapes(size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Batch size, height and width of the inputs that a dynamic export is checked with.

    These are the traced size, a larger one of whole grids, one larger by odd numbers, and the smallest.

    Args:
        size: height and width that it was traced with.
    """
    height, width = size
    return [(1, height, width), (2, height + 32, width + 96), (3, height + 45, width + 107), (1, MIN_SIZE, MIN_SIZE)]


def _dynamic_dims() -> dict[int, Dim]:
    return {0: Dim("batch", min=1), 2: Dim("height", min=MIN_SIZE), 3: Dim("width", min=MIN_SIZE)}


def _image(model: HATNet, batch: int, height: int, width: int) -> Tensor:
    weight = model.stem.conv1.weight
    return torch.randn(batch, model.in_chans, height, width, device=weight.device, dtype=weight.dtype)


@contextlib.contextmanager
def _evaluation(model: HATNet) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""Formats of ``hatnet-export``: how each is written, opened by its runtime, and described inside the file.

Every file contains the same description under the name ``hatnet``, a JSON object: the metadata of the checkpoint,
class names and preprocessing. To add a format, write a subclass of :class:`Format` and list it in :data:`FORMATS`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hatnet_core.checkpoint.loading import load_model
from hatnet_core.checkpoint.reading import read_metadata
from hatnet_core.checkpoint.saving import save_checkpoint
from hatnet_core.export import int8
from hatnet_core.export.graphs import TOLERANCE, export_onnx, export_program
from hatnet_core.io import json_object
from hatnet_core.model import HATNet

KEY = "hatnet"
"""Name of the description inside a file."""

Runner = Callable[[Tensor], Tensor]
"""An opened file: images [B, in_chans, H, W] → logits [B, num_classes]."""


@dataclass(frozen=True)
class Job:
    """A model to write, and how."""

    model: HATNet

    size: tuple[int, int]
    """Height and width to trace with, in pixels."""

    static: bool
    """Take one image of ``size`` instead of any number of any size."""

    metadata: dict[str, Any]
    """Metadata of the checkpoint; that of the model itself is not among them."""

    description: dict[str, Any]
    """Content of ``hatnet`` in the file."""

    folder: Path
    """Place for intermediate files."""

    opset: int | None

    images: Callable[[], Tensor]
    """Returns images [N, in_chans, H, W] to calibrate int8 with."""

    @functools.cached_property
    def text(self) -> str:
        """The description as JSON."""
        return json.dumps(self.description)

    @functools.cached_property
    def graph(self) -> Path:
        """ONNX graph in fp32, from which other formats are made; traced once."""
        path = self.folder / "graph.onnx"
        export_onnx(self.model, path, self.size, self.static, self.opset, {KEY: self.text})
        return path


class Format:
    """A file format at one precision."""

    suffix: ClassVar[str]

    packages: ClassVar[tuple[str, ...]] = ()
    """Modules that writing and opening import."""

    extra: ClassVar[str] = ""
    """Extra of hatnet-core that installs them."""

    tolerance: ClassVar[float | None] = TOLERANCE
    """Largest accepted difference of the outputs, relative to the largest; None if only accuracy tells."""

    traced: ClassVar[bool] = True

    def missing(self) -> str | None:
        """Return what to install if a package is missing."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(absent)}: pip install 'hatnet-core[{self.extra}]'" if absent else None

    def write(self, job: Job, path: Path) -> None:
        """Write the file."""
        raise NotImplementedError

    def open(self, path: Path) -> Runner:
        """Load the file with its runtime, on the CPU."""
        raise NotImplementedError

    def described(self, path: Path) -> str | None:
        """Read the description in the file."""
        raise NotImplementedError


class Safetensors(Format):
    """Weights with their configuration; the runtime is PyTorch with hatnet-core."""

    suffix = ".safetensors"
    packages = ("safetensors",)
    extra = "safetensors"
    traced = False

    def write(self, job: Job, path: Path) -> None:
        """Write the file, with the metadata of the checkpoint."""
        save_checkpoint(job.model, path, job.metadata)

    def open(self, path: Path) -> Runner:
        """Load the model."""
        return load_model(path).eval()

    def described(self, path: Path) -> str | None:
        """Read the metadata."""
        return json.dumps(read_metadata(path))


class Program(Format):
    """A program of ``torch.export``; the runtime is PyTorch alone."""

    suffix = ".pt2"

    def write(self, job: Job, path: Path) -> None:
        """Write the file, with the description as an extra file."""
        program = export_program(job.model, job.size, job.static)
        torch.export.save(program, path, extra_files={KEY: job.text})

    def open(self, path: Path) -> Runner:
        """Load the program."""
        return torch.export.load(path).module()

    def described(self, path: Path) -> str | None:
        """Read the extra file."""
        files = {KEY: ""}
        torch.export.load(path, extra_files=files)
        return files[KEY] or None


class Compiled(Format):
    """A package compiled ahead of time by AOTInductor; the runtime is PyTorch, also from C++ without Python."""

    suffix = ".pt2"

    def write(self, job: Job, path: Path) -> None:
        """Compile for minutes, with the compiler of this machine for this processor."""
        program = export_program(job.model, job.size, job.static)
        # torch documents both functions of AOTInductor, though they are in a private module
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {KEY: job.text}}
        )

    def open(self, path: Path) -> Runner:
        """Load the package."""
        package: Runner = torch._inductor.aoti_load_package(str(path))
        return package

    def described(self, path: Path) -> str | None:
        """Read the metadata of the package."""
        return torch._inductor.aoti_load_package(str(path)).get_metadata().get(KEY)


class Onnx(Format):
    """An ONNX graph; the runtime is ONNX Runtime."""

    suffix = ".onnx"
    packages = ("onnx", "onnxruntime", "onnxscript")
    extra = "onnx"

    def write(self, job: Job, path: Path) -> None:
        """Write the graph."""
        path.write_bytes(job.graph.read_bytes())

    def open(self, path: Path) -> Runner:
        """Start a session."""
        session = _session(path)
        return lambda image: torch.from_numpy(session.run(None, {"image": image.cpu().numpy()})[0]).to(image.device)

    def described(self, path: Path) -> str | None:
        """Read the metadata of the graph."""
        properties: dict[str, str] = _session(path).get_modelmeta().custom_metadata_map
        return properties.get(KEY)


class OnnxHalf(Onnx):
    """An ONNX graph that computes in fp16, with input and output in fp32."""

    tolerance = 0.02

    def write(self, job: Job, path: Path) -> None:
        """Convert the fp32 graph."""
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(job.graph), keep_io_types=True), path)


class OnnxInt8(Onnx):
    """An ONNX graph whose convolutions and classifier are quantised to int8."""

    tolerance = None

    def write(self, job: Job, path: Path) -> None:
        """Quantise the fp32 graph."""
        int8.quantise_onnx(job.graph, path, job.images())


class OpenVino(Format):
    """OpenVINO's IR: a graph in .xml with its weights in .bin."""

    suffix = ".xml"
    packages: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript")
    extra = "openvino"
    half: ClassVar[bool] = False

    def write(self, job: Job, path: Path) -> None:
        """Convert the fp32 graph of ONNX."""
        import openvino

        self.save(openvino.Core().read_model(str(job.graph)), job, path)

    def save(self, graph: Any, job: Job, path: Path) -> None:
        """Write both files."""
        import openvino

        graph.set_rt_info(job.text, [KEY])
        openvino.save_model(graph, str(path), compress_to_fp16=self.half)

    def open(self, path: Path) -> Runner:
        """Compile the graph for this processor."""
        import openvino

        # otherwise it may compute in bf16, where the processor can
        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda image: torch.from_numpy(compiled({"image": image.cpu().numpy()})[0]).to(image.device)

    def described(self, path: Path) -> str | None:
        """Read the runtime information of the graph."""
        import openvino

        graph = openvino.Core().read_model(str(path))
        return str(graph.get_rt_info([KEY]).astype(str)) if graph.has_rt_info([KEY]) else None


class OpenVinoHalf(OpenVino):
    """OpenVINO's IR with weights in fp16; half the size, computed in fp32."""

    tolerance = 0.02
    half = True


class OpenVinoInt8(OpenVino):
    """OpenVINO's IR quantised to int8 by NNCF."""

    packages = (*OpenVino.packages, "nncf")
    tolerance = None

    def write(self, job: Job, path: Path) -> None:
        """Quantise the fp32 graph."""
        self.save(int8.quantise_openvino(job.graph, job.images()), job, path)


FORMATS: dict[str, dict[str, Format]] = {
    "safetensors": {"fp32": Safetensors()},
    "program": {"fp32": Program()},
    "onnx": {"fp32": Onnx(), "fp16": OnnxHalf(), "int8": OnnxInt8()},
    "openvino": {"fp32": OpenVino(), "fp16": OpenVinoHalf(), "int8": OpenVinoInt8()},
    "aotinductor": {"fp32": Compiled()},
}
"""Formats of files by the name that ``--to`` takes, then by ``--precision``."""

DESCRIPTION = ".json"
"""Suffix, appended to the file's name, of the description next to it."""


def open_export(path: str | Path, name: str | None = None) -> Runner:
    """Open an exported file with its runtime, on the CPU.

    Args:
        path: the file.
        name: its format in :data:`FORMATS`; by default the first one with its suffix.

    Raises:
        ImportError: if the runtime is not installed.
        ValueError: if no format has the suffix.
    """
    return _format(Path(path), name).open(Path(path))


def read_description(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """Read class names, preprocessing and metadata out of an exported file.

    Args:
        path: as for :func:`open_export`.
        name: as for :func:`open_export`.

    Raises:
        ImportError: if the runtime is not installed.
        ValueError: if the file has no description.
    """
    text = _format(Path(path), name).described(Path(path))
    if text is None:
        raise ValueError(f"{path}: contains no description of hatnet-export")
    return json_object(text, path)


def _format(path: Path, name: str | None) -> Format:
    found = next(
        (f["fp32"] for key, f in FORMATS.items() if name in (key, None) and f["fp32"].suffix == path.suffix), None
    )
    if found is None:
        known = ", ".join(sorted({formats["fp32"].suffix for formats in FORMATS.values()}))
        raise ValueError(f"{path}: name must end in one of {known}")
    if problem := found.missing():
        raise ImportError(f"{path.suffix} {problem}")
    return found


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

import math

import pytest
import torch
from torch.export import Dim

from conftest import SMALL
from hatnet_core import HATNet
from hatnet_core.export import check_shapes, export_onnx, export_program, largest_difference

pytestmark = pytest.mark.long

UNSEEN = [(1, 224, 224), (2, 256, 320), (3, 197, 331), (1, 33, 61), (5, 100, 47), (1, 32, 33)]
"""Sizes that no export below is traced with; 197×331, 33×61 and 100×47 are multiples of nothing in the model."""


def relative_differences(run, model, shapes):
    with torch.no_grad():
        images = [torch.randn(batch, model.in_chans, height, width) for batch, height, width in shapes]
        return [((run(x) - model(x)).abs().max() / model(x).abs().max()).item() for x in images]


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 5},
        {"num_classes": 5, "attention": ("window", "hierarchical", "window")},
        {"num_classes": 0, "global_pool": ""},
    ],
)
def test_one_exported_program_agrees_with_the_model_at_sizes_it_did_not_see(arguments):
    model = HATNet(**SMALL, **arguments).eval()
    program = export_program(model, (96, 128)).module()
    assert max(relative_differences(program, model, UNSEEN)) < 1e-5


@pytest.mark.parametrize("dims", [(Dim("b"), Dim("h", min=32), Dim("w", min=32)), (Dim.DYNAMIC,) * 3, (Dim.AUTO,) * 3])
def test_torch_export_itself_takes_the_model_with_dynamic_sizes(dims, small_model):
    shapes = {"x": dict(zip((0, 2, 3), dims, strict=True))}
    program = torch.export.export(small_model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes).module()
    assert max(relative_differences(program, small_model, UNSEEN)) < 1e-5


@pytest.mark.parametrize("traced", [(96, 128), (32, 32)])
@pytest.mark.parametrize("pool_sizes", [(8, 4, 2), (16, 8, 4), (12, 6, 3)])
def test_a_program_takes_sizes_where_a_stage_attends_to_one_position(pool_sizes, traced, small_model):
    small_model.set_grid(pool_sizes=pool_sizes)
    program = export_program(small_model, traced).module()
    taken = [(1, side, side) for side in (32, 33, 48, 64)] + [(2, 65, 32), (1, 32, 100)]
    assert max(relative_differences(program, small_model, taken)) < 1e-5


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch.export.load of torch 2.10
def test_a_program_reads_back_from_its_file_and_keeps_gradients(small_model, tmp_path):
    torch.export.save(export_program(small_model, (96, 128)), tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert max(relative_differences(program, small_model, UNSEEN)) < 1e-5
    image = torch.randn(1, 3, 50, 70)
    program(image).sum().backward()
    small_model(image).sum().backward()
    for name, p in small_model.named_parameters():
        torch.testing.assert_close(program.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-5)


def test_a_static_program_takes_its_one_size(small_model):
    program = export_program(small_model, (64, 96), static=True).module()
    assert relative_differences(program, small_model, [(1, 64, 96)])[0] < 1e-5
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.randn(1, 3, 64, 64))


def test_exporting_leaves_the_training_mode_as_it_was(small_model):
    export_program(small_model.train(), (64, 64), static=True)
    assert small_model.training


def test_one_onnx_graph_agrees_with_the_model_at_sizes_it_did_not_see(small_model, tmp_path):
    import onnxruntime

    path = tmp_path / "m.onnx"
    export_onnx(small_model, path, (96, 128))
    session = onnxruntime.InferenceSession(path)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("image", ["batch", 3, "height", "width"])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 5])]

    def run(image):
        return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

    assert max(relative_differences(run, small_model, [*UNSEEN, (1, 32, 32)])) < 1e-4
    assert largest_difference(small_model, path, UNSEEN) < 1e-4


class Images:
    """One batch, in the form in which onnxruntime's quantisation takes it."""

    def __init__(self):
        self.images = iter([{"image": torch.randn(4, 3, 64, 96).numpy()}])

    def get_next(self):
        return next(self.images, None)


def test_the_dynamic_onnx_graph_is_quantised_by_onnxruntime_and_runs(small_model, tmp_path):
    import onnx
    import onnxruntime
    from onnxruntime.quantization import quantize_static

    export_onnx(small_model, tmp_path / "m.onnx", (96, 128))
    image = torch.randn(2, 3, 75, 97)
    for kinds in (None, ["Conv", "Gemm"]):  # all that it can, and what the weights are in
        quantize_static(tmp_path / "m.onnx", tmp_path / "q.onnx", Images(), op_types_to_quantize=kinds)
        assert any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "q.onnx").graph.node)
        session = onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
        assert logits.shape == (2, 5)
        assert logits.isfinite().all()
    with torch.no_grad():
        expected = small_model(image)
    assert (logits - expected).norm() < 0.1 * expected.norm()


def test_the_largest_difference_sees_other_weights(small_model, tmp_path):
    torch.export.save(export_program(small_model, (64, 64), static=True), tmp_path / "m.pt2")
    assert largest_difference(small_model, tmp_path / "m.pt2", [(1, 64, 64)]) < 1e-5
    with torch.no_grad():
        small_model.head.weight *= 2
    assert largest_difference(small_model, tmp_path / "m.pt2", [(1, 64, 64)]) > 0.1
    torch.nn.init.constant_(small_model.head.weight, float("nan"))
    assert math.isnan(largest_difference(small_model, tmp_path / "m.pt2", [(1, 64, 64), (1, 64, 64)]))
    for p in small_model.head.parameters():
        torch.nn.init.zeros_(p)
    assert largest_difference(small_model, tmp_path / "m.pt2", [(1, 64, 64)]) > 0.1  # of a model that gives zeros


def test_checks_are_at_sizes_other_than_the_traced_one():
    traced, larger, odd, smallest = check_shapes((224, 224))
    assert traced == (1, 224, 224)
    assert larger == (2, 256, 320)
    assert smallest == (1, 32, 32)
    assert all(size % 7 and size % 8 for size in odd[1:])


@pytest.mark.parametrize("attention", ["hierarchical", "window"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_makes_one_graph_without_breaks(dynamic, attention):
    torch.compiler.reset()
    model = HATNet(**SMALL, attention=(attention,) * 3, num_classes=5).eval()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    shapes = [(2, 224, 256), (3, 256, 320), (4, 197, 331)] if dynamic else [(2, 224, 256), (1, 75, 50)]
    assert max(relative_differences(compiled, model, shapes)) < 1e-5
    assert len(graphs) == (1 if dynamic else len(shapes))


@pytest.mark.parametrize("attention", ["hierarchical", "window"])
def test_a_compiled_training_step_gives_the_gradients_of_the_eager_one(attention):
    torch.compiler.reset()
    model = HATNet(**SMALL, attention=(attention,) * 3, num_classes=5, drop_rate=0.0).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = torch.randn(2, 3, 75, 48, dtype=torch.float64)
    eager = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    gradients = torch.autograd.grad(compiled(image).square().sum(), list(model.parameters()))
    for (name, _), p, q in zip(model.named_parameters(), gradients, eager, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow  # inductor compiles for minutes
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch about torch itself
def test_inductor_agrees_with_eager_at_dynamic_sizes(small_model):
    torch.compiler.reset()
    compiled = torch.compile(small_model, fullgraph=True, dynamic=True)
    assert max(relative_differences(compiled, small_model, [(2, 160, 192), (3, 197, 331)])) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_a_training_step_compiled_by_inductor_gives_the_gradients_of_the_eager_one(small_model):
    torch.compiler.reset()
    image = torch.randn(2, 3, 96, 128)
    parameters = list(small_model.parameters())
    eager = torch.autograd.grad(small_model(image).square().sum(), parameters)
    compiled = torch.compile(small_model, fullgraph=True)
    gradients = torch.autograd.grad(compiled(image).square().sum(), parameters)
    for (name, _), p, q in zip(small_model.named_parameters(), gradients, eager, strict=True):
        assert (p - q).norm() <= 1e-3 * q.norm(), name

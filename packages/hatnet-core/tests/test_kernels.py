"""The fast paths: the same numbers as the plain reference, whatever is asked of a model, and nothing wide kept."""

import collections
import copy
import pickle
import warnings
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from conftest import SMALL
from hatnet_core import HATNet, create_model, kernels, list_models, set_kernels, stock
from hatnet_core.kernels import mlp
from hatnet_core.kernels.mlp import inverted_residual
from hatnet_core.layers import Mlp
from hatnet_testing import raises, warns


@pytest.fixture(autouse=True)
def automatic():
    """Leave the switch as it was found."""
    yield
    set_kernels("auto")


@pytest.fixture
def narrow(monkeypatch):
    """Slices so small that several of images and of channels are needed."""
    monkeypatch.setattr(mlp, "SLICE_VALUES", 600)
    monkeypatch.setattr(mlp, "MIN_CHANNELS", 32)


def plain(x, expand, depthwise, project, activation):
    act = getattr(F, activation)
    mixed = F.conv2d(act(F.conv2d(x, expand)), depthwise, padding=depthwise.shape[-1] // 2, groups=len(depthwise))
    return F.conv2d(act(mixed), project)


def arguments(batch, dim, ratio, kernel_size, height, width, dtype=torch.float64):
    wide = ratio * dim
    shapes = (batch, dim, height, width), (wide, dim, 1, 1), (wide, 1, kernel_size, kernel_size), (dim, wide, 1, 1)
    return [torch.randn(shape, dtype=torch.float64).div(max(1, shape[1]) ** 0.5).to(dtype) for shape in shapes]


def values_and_gradients(function, tensors, *others):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors, *others)
    weighting = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weighting).sum(), tensors)]


def assert_close(actual, expected, tolerance):
    """Within ``tolerance`` of the largest expected value, each tensor."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.to(theirs.dtype) - theirs).abs().max() <= tolerance * theirs.abs().max()


def run(kind, model, x):
    """Logits, gradient of the image and of every parameter, with one choice of kernels."""
    set_kernels(kind)
    x = x.clone().requires_grad_()
    logits = model(x)
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum()
    return [logits.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    dim=st.integers(1, 9),
    ratio=st.integers(1, 8),
    kernel_size=st.sampled_from([1, 3, 5]),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    activation=st.sampled_from(["silu", "gelu"]),
)
def test_the_mlp_in_slices_is_the_mlp_forward_and_gradient(batch, dim, ratio, kernel_size, height, width, activation):
    tensors = arguments(batch, dim, ratio, kernel_size, height, width)
    expected = values_and_gradients(plain, tensors, activation)
    assert_close(values_and_gradients(inverted_residual, tensors, activation), expected, 1e-12)
    with torch.no_grad():
        assert_close([inverted_residual(*tensors, activation)], expected[:1], 1e-12)
    operator = torch.ops.hatnet.inverted_residual
    assert_close(values_and_gradients(operator, tensors, activation), expected, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_many_slices_of_images_and_channels_add_up_to_the_mlp(dtype, tolerance, activation, narrow):
    tensors = arguments(5, 16, 8, 3, 6, 9, dtype)
    assert len(list(mlp.image_slices(tensors[0], 128))) == 5
    assert len(list(mlp.channel_slices(tensors[0], 128))) == (4 if dtype == torch.float32 else 1)
    expected = values_and_gradients(plain, [t.double() for t in tensors], activation)
    assert_close(values_and_gradients(inverted_residual, tensors, activation), expected, tolerance)


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(1, 9),
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    wide=st.integers(1, 4096),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_slices_cover_every_image_and_channel_once_in_order(batch, height, width, wide, dtype):
    x = torch.empty(batch, 3, height, width, dtype=dtype, device="meta")
    for slices, count in ((mlp.image_slices(x, wide), batch), (mlp.channel_slices(x, wide), wide)):
        assert [i for part in slices for i in range(*part.indices(count))] == list(range(count))


def test_the_operators_keep_what_they_promise_to_pytorch():
    tensors = [t.requires_grad_() for t in arguments(2, 4, 2, 3, 5, 6)]
    torch.library.opcheck(torch.ops.hatnet.inverted_residual.default, (*tensors, "silu"))


@pytest.mark.parametrize("name", list_models())
def test_every_variant_computes_as_the_reference_forward_and_gradient(name):
    model = create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, 64, 96)
    assert_close(run("auto", model, x), run("reference", model, x), 1e-4)


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (33, 95), (130, 47)])
@pytest.mark.parametrize("changes", [{}, {"activation": "gelu"}, {"depthwise": False}, {"attention": ("window",) * 3}])
def test_every_size_and_kind_of_model_computes_as_the_reference(size, changes, narrow):
    model = HATNet(**SMALL, num_classes=5, **changes).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 3, *size)
    set_kernels("reference")
    expected = model.double()(x.double())
    model.float()
    actual, plainly = [run(kind, model, x)[0].double() for kind in ("auto", "reference")]
    # both are off by rounding, which deep random weights enlarge
    error = (plainly - expected).abs().max().item()
    assert (actual - expected).abs().max().item() <= max(3 * error, 1e-5 * expected.abs().max().item())


def test_under_autocast_the_fast_paths_are_as_near_to_float32_as_the_plain_ones():
    model = create_model("hatnet_tiny", num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    exact = run("reference", model, x)
    errors = {}
    for kind in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            rounded = run(kind, model, x)
        assert all(gradient.dtype == torch.float32 for gradient in rounded[1:])
        errors[kind] = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(rounded, exact, strict=True)]
    assert errors["auto"][0] < 0.05
    assert torch.tensor(errors["auto"]).mean() < 1.5 * torch.tensor(errors["reference"]).mean()


def test_nothing_of_the_width_of_the_mlp_is_kept_for_the_backward_pass():
    layer, kept = Mlp(16, 8), []
    x = torch.randn(2, 16, 10, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x).sum().backward()
    assert max(kept) == x.numel()


def listens(layer, called):
    layer.dwconv.register_forward_hook(lambda *_: called.append(1))


def listens_before(layer, called):
    layer.expand.register_forward_pre_hook(lambda *_: called.append(1))


def is_patched(layer, called):
    original = layer.project.forward
    layer.project.forward = lambda x: called.append(1) or original(x)


def is_replaced(layer, called):
    class Adapter(nn.Conv2d):
        def forward(self, x):
            called.append(1)
            return super().forward(x)

    adapter = Adapter(*layer.expand.weight.shape[1::-1], 1, bias=False)
    adapter.load_state_dict(layer.expand.state_dict())
    layer.expand = adapter


def is_parametrized(layer, called):
    class Same(nn.Module):
        def forward(self, x):
            called.append(1)
            return x

    parametrize.register_parametrization(layer.dwconv, "weight", Same())


def is_pruned(layer, called):
    prune.identity(layer.project, "weight")
    prune.identity(layer.dwconv, "weight")
    layer.dwconv.register_forward_hook(lambda *_: called.append(1))


def listens_to_an_activation(layer, called):
    layer.act2.register_forward_hook(lambda *_: called.append(1))


@pytest.mark.parametrize(
    "change",
    [listens, listens_before, listens_to_an_activation, is_patched, is_replaced, is_parametrized, is_pruned],
)
def test_whoever_listens_to_or_changes_a_layer_of_the_mlp_is_called(change):
    layer, called = Mlp(8, 4), []
    x = torch.randn(1, 8, 6, 6)
    expected = layer(x)
    change(layer, called)
    torch.testing.assert_close(layer(x), expected)
    assert called


@pytest.fixture
def sliced(monkeypatch):
    """Count the calls of the MLP in slices."""
    calls, inner = [], mlp.inverted_residual
    monkeypatch.setattr(mlp, "inverted_residual", lambda *args: calls.append(1) or inner(*args))
    return calls


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_backward_hook",
    ],
)
@pytest.mark.parametrize("name", ["expand", "act1", "dwconv", "act2", "drop1", "project"])
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_slices_run_until_a_hook_is_registered_and_again_after_it_is_removed(register, name, sliced):
    layer, x = Mlp(8, 4), torch.randn(1, 8, 6, 6)
    handle = getattr(getattr(layer, name), register)(lambda *_: None)
    copied = copy.deepcopy(layer)
    layer(x), copied(x)
    assert not sliced
    handle.remove()
    layer(x)
    assert len(sliced) == 1
    copied(x)  # its hook is its own
    assert len(sliced) == 1


def test_pruned_weights_are_those_that_compute(sliced):
    layer, x = Mlp(8, 4), torch.randn(1, 8, 6, 6)
    prune.random_unstructured(layer.expand, "weight", 0.5)
    out = layer(x)
    assert not sliced
    prune.remove(layer.expand, "weight")  # leaves a plain weight
    torch.testing.assert_close(layer(x), out)
    assert sliced


def test_a_layer_that_is_dilated_or_padded_around_the_edge_after_it_was_built_computes_so(sliced):
    layer, x = Mlp(8, 4).eval(), torch.randn(1, 8, 9, 9)
    layer.dwconv.dilation, layer.dwconv.padding = (2, 2), (2, 2)
    hidden = layer.act1(layer.expand(layer.norm(x)))
    hidden = layer.act2(F.conv2d(hidden, layer.dwconv.weight, padding=2, dilation=2, groups=32))
    torch.testing.assert_close(layer(x), layer.out_norm(layer.project(hidden)))
    assert not sliced


def test_weights_of_another_class_are_left_to_pytorchs_layers(sliced):
    class Marked(torch.Tensor):
        pass

    layer, x = Mlp(8, 4), torch.randn(1, 8, 6, 6)
    expected = layer(x)
    weights = {"dwconv.weight": layer.dwconv.weight.detach().as_subclass(Marked)}
    out = torch.func.functional_call(layer, weights, (x,))
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected)
    assert len(sliced) == 1


def test_lora_on_every_layer_of_the_mlp_trains_and_merges():
    peft = pytest.importorskip("peft")
    model = HATNet(**SMALL, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    names = ["expand", "project", "qkv", "q", "kv", "proj"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=2, init_lora_weights=False))
    before = tuned(x)
    before.square().sum().backward()
    adapters = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert sum("expand" in name for name in adapters) == 2 * sum(SMALL["depths"])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())
    torch.testing.assert_close(tuned.merge_and_unload()(x), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_sharded_by_fsdp_computes_the_same(whole, tmp_path, sliced):
    from torch.distributed.fsdp import fully_shard

    layer, x = Mlp(8, 4), torch.randn(2, 8, 6, 6)
    expected = layer(x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in [layer] if whole else [layer.expand, layer.dwconv, layer]:
            fully_shard(module, mesh=mesh)
        out = layer(x)
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
    finally:
        torch.distributed.destroy_process_group()
    assert len(sliced) == (2 if whole else 1)  # inside, weights are whole; a layer sharded alone has to be called


REPLACEMENTS = {
    "expand with a bias": ("expand", lambda: nn.Conv2d(8, 32, 1)),
    "expand of 3×3": ("expand", lambda: nn.Conv2d(8, 32, 3, padding=1, bias=False)),
    "expand by groups": ("expand", lambda: nn.Conv2d(8, 32, 1, groups=2, bias=False)),
    "depthwise with a bias": ("dwconv", lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32)),
    "depthwise, dilated": ("dwconv", lambda: nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32, bias=False)),
    "depthwise, around the edge": (
        "dwconv",
        lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False, padding_mode="circular"),
    ),
    "depthwise of stride 2": ("dwconv", lambda: nn.Conv2d(32, 32, 3, 2, padding=1, groups=32, bias=False)),
    "depthwise of 3×5": ("dwconv", lambda: nn.Conv2d(32, 32, (3, 5), padding=(1, 2), groups=32, bias=False)),
    "not depthwise": ("dwconv", lambda: nn.Conv2d(32, 32, 3, padding=1, bias=False)),
    "project with a bias": ("project", lambda: nn.Conv2d(32, 8, 1)),
    "GELU by tanh": ("act1", lambda: nn.GELU("tanh")),
    "another activation": ("act1", nn.ReLU),
    "another second activation": ("act2", nn.GELU),
    "no dropout": ("drop1", nn.Identity),
    "another dropout": ("drop1", lambda: nn.Dropout(0.0)),
    "a layer in place of the dropout": ("drop1", lambda: nn.Hardtanh(-0.1, 0.1)),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_a_layer_of_the_mlp_that_was_replaced_does_what_it_is(name, training, ours, monkeypatch):
    if ours:
        for kind in ("Conv2d", "GELU"):
            monkeypatch.setattr(nn, kind, getattr(stock, kind))
    layer, (attribute, build) = Mlp(8, 4).train(training), REPLACEMENTS[name]
    setattr(layer, attribute, build())
    x = torch.randn(2, 8, 6, 7)
    out = layer.project(layer.drop1(layer.act2(layer.dwconv(layer.act1(layer.expand(layer.norm(x)))))))
    torch.testing.assert_close(layer(x), layer.drop2(layer.out_norm(out)))


def test_dropout_that_alone_is_in_training_drops():
    layer = Mlp(8, 4, proj_drop_rate=0.5).eval()
    layer.drop1.train()
    layer.out_norm = nn.Identity()
    x = torch.randn(2, 8, 6, 6)
    outputs = []
    for kind in ("auto", "reference"):
        set_kernels(kind)
        torch.manual_seed(3)
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs)
    assert (outputs[0] - layer(x)).abs().max() > 0.01


def test_weights_of_another_dtype_than_the_images_are_refused_as_by_pytorch():
    layer = Mlp(8, 4)
    layer.expand.double()
    with pytest.raises(RuntimeError, match=r"expected scalar type|should be the same"):
        layer(torch.randn(1, 8, 6, 6))


def test_weights_that_are_mapped_over_are_those_of_each_layer():
    mlps = [Mlp(8, 4).eval() for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(mlps)
    x = torch.randn(2, 8, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about speed
        out = torch.func.vmap(lambda weights: torch.func.functional_call(mlps[0], weights, (x,)))(stacked)
    torch.testing.assert_close(out, torch.stack([layer(x) for layer in mlps]), rtol=1e-4, atol=1e-5)


def test_a_traced_graph_follows_the_switch_the_dtype_and_the_hooks(small_model):
    traced = torch.fx.symbolic_trace(small_model)
    x = torch.randn(2, 3, 64, 64)
    expected = small_model(x)
    set_kernels("reference")
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    set_kernels("auto")
    torch.testing.assert_close(traced.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    traced.float()
    called = []
    traced.get_submodule("stages.0.blocks.0.mlp.dwconv").register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    assert called


def test_a_removed_hook_leaves_nothing_behind():
    layer = Mlp(8, 2).dwconv
    for _ in range(100):
        layer.register_forward_hook(lambda *_: None).remove()
    assert len(pickle.dumps(layer)) < len(pickle.dumps(Mlp(8, 2).dwconv)) + 1000


def test_a_hook_on_all_modules_sees_the_layers_of_the_mlp_in_the_plain_mode():
    seen = []
    set_kernels("plain")
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    layer = Mlp(8, 4)
    try:
        layer(torch.randn(1, 8, 6, 6))
    finally:
        handle.remove()
    assert layer.expand in seen


def test_dropout_of_hidden_channels_in_training_is_that_of_the_layers():
    layer = Mlp(8, 4, proj_drop_rate=0.5).train()
    x = torch.randn(3, 8, 6, 6)
    outputs = []
    for kind in ("auto", "reference"):
        set_kernels(kind)
        torch.manual_seed(1)
        outputs.append(layer(x))
    torch.testing.assert_close(*outputs)


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:.torch.jit.script. is deprecated"
)  # of PyTorch
def test_functional_transforms_see_through_the_model(small_model):
    x = torch.randn(3, 2, 3, 32, 32)
    torch.testing.assert_close(torch.func.vmap(small_model)(x), torch.stack([small_model(part) for part in x]))
    tangent = torch.randn_like(x[0])
    set_kernels("reference")  # PyTorch's fused attention has no forward-mode derivative
    _, slope = torch.func.jvp(small_model, (x[0],), (tangent,))
    step = 1e-3
    difference = (small_model(x[0] + step * tangent) - small_model(x[0] - step * tangent)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("gradients", [False, True])
def test_pytorchs_flop_counter_counts_the_slices_as_the_layers(gradients, narrow, small_model):
    counts = []
    for kind in ("auto", "plain"):
        set_kernels(kind)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
            small_model(torch.randn(2, 3, 64, 64))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_compiled_model_runs_the_mlp_in_slices_as_one_graph(small_model):
    torch.compiler.reset()
    operators = []

    def backend(graph, _):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(small_model, backend=backend, fullgraph=True)
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(compiled(x), small_model(x), rtol=1e-4, atol=1e-5)
    assert sum("inverted_residual" in name for name in operators) == sum(SMALL["depths"])


def test_double_precision_and_what_is_traced_take_the_plain_layers(small_model, monkeypatch):
    monkeypatch.setattr(mlp, "inverted_residual", None)
    small_model.double()(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    small_model.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and what fvcore does
        torch.jit.trace(small_model, torch.randn(1, 3, 32, 32), check_trace=False)
    torch.export.export(small_model, (torch.randn(1, 3, 32, 32),))


def test_another_name_than_those_of_the_kernels_is_refused():
    with raises(ValueError, "kernels", "reference", "fast"):
        set_kernels("fast")


def test_gpus_before_ampere_run_without_the_triton_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "_gpus", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not kernels.runs_triton(torch.device("cuda", 0))


@pytest.mark.parametrize("wrap", [nn.Identity, nn.Sequential])
def test_kernels_are_tried_on_the_device_that_a_model_is_built_on_or_moved_to(wrap, small_model, monkeypatch):
    tried = []
    monkeypatch.setattr(kernels, "runs_triton", tried.append)
    with torch.device("meta"):
        HATNet(**SMALL)
    assert tried == [torch.device("meta")]
    (small_model if wrap is nn.Identity else wrap(small_model)).to(torch.device("meta"))
    assert tried == [torch.device("meta")] * 2


@pytest.mark.skipif(torch.cuda.is_available() or find_spec("triton") is None, reason="needs Triton without a GPU")
def test_a_driver_that_fails_is_reported_once(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(kernels, "_gpus", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with warns(UserWarning, "cuda:0"):
        assert not kernels.runs_triton(device)
    assert not kernels.runs_triton(device)


@pytest.mark.parametrize("gradients", [False, True])
def test_an_ensemble_of_models_runs_under_vmap_over_their_parameters(gradients):
    models = [HATNet(**SMALL, num_classes=5).eval().requires_grad_(gradients) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 96, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about speed
        out = torch.func.vmap(lambda weights: torch.func.functional_call(models[0], weights, (x,)))(parameters)
    torch.testing.assert_close(out, torch.stack([model(x) for model in models]), rtol=1e-4, atol=1e-5)


def test_a_flop_counter_sees_the_convolutions_of_the_mlp(small_model):
    mlp, x = small_model.stages[0].blocks[0].mlp, torch.randn(1, 8, 16, 16)
    hidden = mlp.expand.out_channels
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            mlp(x)
        assert counter.get_total_flops() == 2 * 16 * 16 * hidden * (8 + 9 + 8)


def test_a_function_mode_sees_the_slices_and_a_default_device_keeps_them(small_model):
    seen = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    mlp, x = small_model.stages[0].blocks[0].mlp, torch.randn(1, 8, 16, 16)
    with torch.no_grad(), Recorder():
        mlp(x)
    assert seen.count(F.conv2d) == 1  # what runs: slices of the depthwise convolution, and matrix products
    assert torch.Tensor.matmul in seen
    with torch.device("cpu"):
        assert kernels.path(x) == "slices"


def test_no_module_is_called_twice_in_a_forward(small_model):
    calls = collections.Counter()
    for name, module in small_model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        small_model(torch.randn(1, 3, 64, 64))
    assert set(calls.values()) == {1}
    called = {name for name, module in small_model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert calls.keys() == called

"""The kernels in Triton against plain PyTorch in float64: in Triton's interpreter, on a GPU where there is one.

The interpreter has to be chosen before Triton is imported, which other libraries do as well. So without a GPU the
tests below run in a process of their own, which the first test starts; there it is the first that is skipped.
"""

import functools
import os
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

triton = pytest.importorskip("triton", reason="Triton is not made for this platform")
from hatnet_core import HATNet, HierarchicalAttention, set_kernels  # noqa: E402
from hatnet_core.kernels import triton_attention, triton_depthwise, triton_group_norm, triton_pool  # noqa: E402
from hatnet_core.layers import Mlp  # noqa: E402
from hatnet_testing import raises  # noqa: E402

pytestmark = pytest.mark.long


def release(package):
    return tuple(int(part) for part in version(package).split(".")[:2])


elsewhere = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="runs in the process that the first test starts"
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
few = settings(
    max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def convolutions_in_float32():
    """Without TensorFloat-32, which cuDNN uses by default."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
@pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 4),
    reason="this interpreter refuses NumPy's 1-element arrays",
)
def test_in_the_interpreter_all_other_tests_pass():
    command = [sys.executable, "-m", "pytest", __file__, "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-k", "not in_the_interpreter and not compile_for_ampere and not refused_where"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = result.stdout.splitlines()[-1]
    assert " passed" in summary
    assert "skipped" not in summary


NORM = {"block_p": 64, "block_c": 64}
ATTENTION = [("bf16", 4, 64, 64), ("fp16", 8, 128, 32), ("fp32", 8, 64, 64)]
POOLED = {"head_dim": 64, "block_m": 64, "block_n": 64, "block_d": 64}
STRIPS = {"block_c": 256}
KERNELS = [
    (triton_group_norm, "_statistics", "bf16", 8, NORM),
    (triton_group_norm, "_normalise", "bf16", 8, NORM | {"block_s": 16}),
    (triton_group_norm, "_gradient_sums", "bf16", 8, NORM),
    (triton_group_norm, "_gradient", "bf16", 8, NORM | {"block_s": 16}),
    (triton_group_norm, "_sum_splits", "fp32", 4, {"block_c": 16}),
    *(
        (triton_depthwise, "_strips", dtype, 1, STRIPS | {"step": step, "k": k, "cols": cols, "approximate": fast})
        for step, k, cols in [
            *(("forward", 3, 4), ("forward", 3, 2), ("forward", 5, 2)),
            *((step, k, 2) for step in ("gradient of mixed", "gradient of h") for k in (3, 5)),
        ]
        for dtype, fast in (("bf16", True), ("fp32", False))
    ),
    *(
        (triton_depthwise, "_weight_gradient", dtype, 1, tile | {"cols": 2, "block_c": 128, "approximate": fast})
        for tile in ({"k": 3, "tap_rows": 3}, {"k": 5, "tap_rows": 1})
        for dtype, fast in (("bf16", True), ("fp32", False))
    ),
    (triton_depthwise, "_sum_partials", "fp32", 4, {"taps": 9, "block_c": 64}),
    *(
        (triton_attention, "_attend", dtype, warps, POOLED | {"block_n": n, "block_m": m, "add": add})
        for dtype, warps, n, m in ATTENTION
        for add in (False, True)
    ),
    *(
        (triton_attention, "_attend_backward", dtype, warps, POOLED | {"block_n": n, "block_m": m})
        for dtype, warps, n, m in ATTENTION
    ),
    (triton_attention, "_attend_pooled", "bf16", 4, POOLED | {"add": True}),
    (triton_attention, "_attend_pooled_backward", "bf16", 4, POOLED),
    (triton_pool, "_pool", "bf16", 1, {"block_n": 8, "block_c": 64}),
    (triton_pool, "_spread", "bf16", 1, {"block_n": 8, "block_c": 64}),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings NVIDIA's assembler for Linux")
@pytest.mark.parametrize(
    ("module", "name", "dtype", "warps", "blocks"), KERNELS, ids=[k[1] + "-" + k[2] for k in KERNELS]
)
def test_the_kernels_compile_for_ampere_hopper_and_blackwell_within_their_shared_memory(
    monkeypatch, tmp_path, module, name, dtype, warps, blocks
):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(module, name)
    kinds = {"tl.tensor": f"*{dtype}", "int": "i32", "float": "fp32", "tl.constexpr": "constexpr"}
    signature = {argument: kinds[kernel.fn.__annotations__[argument]] for argument in kernel.arg_names}
    source = ASTSource(kernel, signature, blocks)
    for capability in (80, 90, 100) if dtype == "bf16" else (90,):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 99 * 1024


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """Triton 3.7's interpreter multiplies the bit patterns of bfloat16; here the numbers, exact in float32."""
    if not INTERPRETED:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(handle.data.astype("int32")) << 16
        return interpreter.TensorHandle(bits.view(torch.float32).numpy(), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def agree(fast, plain, tensors, dtype, roundings=1.0):
    """Result and all gradients of ``fast`` equal those of ``plain`` in float64, relative to the largest value.

    Within 1e-5 in float32, twice the spacing at the largest value in half precision, times ``roundings``.
    """
    tensors = [t.detach().to(DEVICE).requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    result, expected = fast(*tensors), plain(*exact)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(expected).to(dtype)
    got = [result, *torch.autograd.grad(result, tensors, gradient)]
    wanted = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    tolerance = (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps) * roundings
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3)


def check_op(op, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def normalised(x, weight, bias):
    return F.group_norm(x, 1, weight, bias, 1e-6)


def check_group_norm(shape, dtype, mean=0.0, layout=torch.channels_last):
    x = (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=layout)
    fast = functools.partial(triton_group_norm.group_norm, eps=1e-6)
    roundings = 1 + mean / 25  # the mean is rounded, too
    agree(fast, normalised, [x, torch.randn(shape[1]), torch.randn(shape[1])], dtype, roundings)


@elsewhere
def test_the_whole_model_computes_as_the_reference_forward_and_gradient():
    model = HATNet((16, 16, 32, 32), (1, 1, 1, 1), 16, (3, 3, 5, 3), (2, 2, 2, 2), num_classes=3).eval().to(DEVICE)
    x = torch.randn(1, 3, 64, 40, device=DEVICE)
    found = {}
    for kind in ("triton", "reference"):
        set_kernels(kind)
        logits = model(x)
        found[kind] = [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]
    set_kernels("auto")
    for fast, plain in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


@elsewhere
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch
def test_functional_transforms_and_pytorchs_flop_counter_see_through_the_kernels():
    x = torch.randn(2, 16, 7, 6, device=DEVICE)
    mlp, attention = Mlp(16, 2).to(DEVICE).half(), HierarchicalAttention(16, 8, 4, 2).to(DEVICE).half()
    counts = []
    for kind in ("triton", "reference"):
        set_kernels(kind)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            attention(x.half()), mlp(x.half())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    set_kernels("triton")
    for layer in (mlp.float(), attention.float()):
        expected = torch.stack([layer(x), layer(-x)])
        torch.testing.assert_close(torch.func.vmap(layer)(torch.stack([x, -x])), expected, rtol=1e-3, atol=1e-4)
        slope = torch.func.grad(lambda x, layer=layer: layer(x).square().sum())(x)
        tracked = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(layer(tracked).square().sum(), tracked)
        torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3)
    set_kernels("auto")


@elsewhere
@pytest.mark.parametrize("frozen", [False, True])
def test_the_whole_model_under_autocast_computes_as_the_reference_forward_and_gradient(frozen):
    arguments = {"grid_sizes": (5, 3, 2), "pool_sizes": (3, 2, 2), "num_classes": 3}
    model = HATNet((16, 16, 32, 32), (1, 1, 1, 1), 16, (3, 3, 5, 3), (2, 2, 2, 2), **arguments).eval().to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and any(layer in name for layer in ("qkv", "dwconv", "norm."))))
    model.set_grad_checkpointing(frozen)
    x, found = torch.randn(1, 3, 39, 33, device=DEVICE), {}
    for kind in ("triton", "reference"):
        set_kernels(kind)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=kind == "triton"):
            logits = model(x)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(logits.float().square().sum(), trained)
        found[kind] = [logits.float().flatten(), torch.cat([g.flatten() for g in gradients])]
    set_kernels("auto")
    for fast, plain in zip(found["triton"], found["reference"], strict=True):
        assert (fast - plain).norm() <= 4e-2 * plain.norm()


@elsewhere
def test_a_compiled_model_keeps_the_kernels_whole_in_one_graph():
    torch.compiler.reset()
    operators = set()

    def backend(graph, _):
        operators.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = HATNet((16, 16, 32, 32), (1, 1, 1, 1), 16, (3, 3, 5, 3), (2, 2, 2, 2), num_classes=3).eval().to(DEVICE)
    model, x = model.half(), torch.randn(1, 3, 64, 64, device=DEVICE, dtype=torch.float16)
    set_kernels("triton")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    set_kernels("auto")
    names = ("group_norm", "activated_depthwise", "grid_attention", "pooled_attention", "average_pool")
    assert {f"hatnet.{name}.default" for name in names} <= operators


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there is something to run on")
def test_the_triton_kernels_are_refused_where_nothing_runs_them():
    with raises(RuntimeError, "triton", "CUDA", "TRITON_INTERPRET=1"):
        set_kernels("triton")


@elsewhere
@dtypes
@pytest.mark.parametrize("shape", [(1, 64, 8, 8), (2, 48, 7, 5), (1, 192, 3, 4)])
def test_group_norm(shape, dtype):
    check_group_norm(shape, dtype)


@elsewhere
@dtypes
def test_group_norm_of_a_mean_far_above_the_deviation(dtype):
    check_group_norm((2, 40, 6, 7), dtype, mean=100.0)


@elsewhere
@pytest.mark.parametrize("first", [3000.0, 0.0])
def test_group_norm_of_a_sample_whose_first_value_is_an_outlier(first):
    x = torch.randn(1, 16, 9, 9) if first else torch.full((1, 16, 9, 9), 777.7)
    x[0, 0, 0, 0] = first
    weight, bias = torch.ones(16), torch.zeros(16)
    fast = triton_group_norm.group_norm(*(t.to(DEVICE) for t in (x, weight, bias)), 1e-6)
    expected = normalised(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(fast.cpu().double(), expected, rtol=1e-3, atol=1e-4)


@elsewhere
def test_every_operator_takes_an_empty_batch():
    x, qkv = (torch.randn(0, c, 6, 5, device=DEVICE, requires_grad=True) for c in (8, 24))
    weight, kernel = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((8,), (8, 1, 3, 3)))
    half = [t.detach().half().requires_grad_() for t in (x, qkv[:, :16])]
    results = [
        triton_group_norm.group_norm(x, weight, weight, 1e-6),
        triton_depthwise.activated_depthwise(x, kernel),
        triton_attention.grid_attention(qkv, 1, 4, x),
        triton_attention.pooled_attention(*half, 1),
        triton_pool.average_pool(x, 2),
    ]
    assert [len(result) for result in results] == [0] * 5
    sum(result.float().sum() for result in results).backward()
    assert kernel.grad.abs().sum() == weight.grad.abs().sum() == 0


@elsewhere
def test_group_norm_of_a_map_in_nchw():
    check_group_norm((2, 24, 5, 6), torch.float32, layout=torch.contiguous_format)


@elsewhere
@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_group_norm_of_samples_in_one_split_and_in_several(monkeypatch, programs):
    monkeypatch.setattr(triton_group_norm, "PROGRAMS", programs)
    monkeypatch.setattr(triton_group_norm, "TILE", 256)
    check_group_norm((1, 20, 7, 9), torch.float32, mean=100.0)


@elsewhere
def test_group_norm_of_weights_that_are_not_contiguous():
    x, weights = torch.randn(2, 8, 3, 5, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    weight, bias = weights[0, ::2], weights[1, :1].expand(8)
    torch.testing.assert_close(
        triton_group_norm.group_norm(x, weight, bias, 1e-6), F.group_norm(x, 1, weight.clone(), bias.clone(), 1e-6)
    )


@elsewhere
def test_group_norm_of_another_number_of_weights_is_refused():
    x, weight = torch.randn(2, 8, 3, 5, device=DEVICE), torch.ones(4, device=DEVICE)
    with raises(ValueError, "weight", 8, (4,)):
        triton_group_norm.group_norm(x, weight, weight, 1e-6)


@elsewhere
def test_group_norm_of_a_bfloat16_map_in_float32_rounds_nothing_as_under_autocast():
    x = torch.randn(2, 8, 3, 5, device=DEVICE).bfloat16().requires_grad_()
    weight, bias = torch.randn(2, 8, device=DEVICE).unbind()
    out = triton_group_norm.group_norm(x, weight, bias, 1e-6, torch.float32)
    expected = F.group_norm(x.float(), 1, weight, bias, 1e-6)
    torch.testing.assert_close(out, expected)
    given = torch.randn_like(out)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(o, x, given) for o in (out, expected))
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected_gradient, rtol=2**-7, atol=2**-7)


@elsewhere
@few
@given(st.tuples(st.integers(1, 3), st.integers(8, 40), st.integers(1, 9), st.integers(1, 9)))
def test_group_norm_of_any_shape(shape):
    check_group_norm(shape, torch.float32)


def mixed(h, weight):
    return F.silu(F.conv2d(F.silu(h), weight, padding=weight.shape[-1] // 2, groups=h.shape[1]))


def check_depthwise(shape, kernel, dtype, layout=torch.channels_last):
    h = (2 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout)
    weight = (torch.randn(shape[1], 1, kernel, kernel) / kernel).to(dtype)
    agree(triton_depthwise.activated_depthwise, mixed, [h, weight], dtype, roundings=1.5)  # a gradient between is too


@elsewhere
@dtypes
@pytest.mark.parametrize("kernel", [3, 5])
def test_activated_depthwise(kernel, dtype):
    check_depthwise((1, 16, 5, 8), kernel, dtype)


@elsewhere
@pytest.mark.parametrize("shape", [(2, 20, 4, 9), (1, 70, 3, 17), (1, 3, 1, 1)])
def test_activated_depthwise_of_sizes_that_no_block_divides(shape):
    check_depthwise(shape, 3, torch.float32)


@elsewhere
@pytest.mark.parametrize("shape", [(8, 1, 4, 4), (8, 1, 3, 5), (4, 1, 3, 3), (8, 8, 3, 3)])
def test_a_weight_that_is_not_a_kernel_for_each_channel_is_refused(shape):
    with raises(ValueError, "weight", list(shape)):
        triton_depthwise.activated_depthwise(torch.randn(1, 8, 5, 5, device=DEVICE), torch.randn(shape, device=DEVICE))


@elsewhere
def test_activated_depthwise_of_a_map_in_nchw():
    check_depthwise((2, 16, 4, 5), 3, torch.float32, layout=torch.contiguous_format)


@elsewhere
@pytest.mark.parametrize(("programs", "min_rows"), [(1, 8), (1000, 1), (8, 2)])
def test_activated_depthwise_in_one_strip_and_in_several(monkeypatch, programs, min_rows):
    monkeypatch.setattr(triton_depthwise, "PROGRAMS", programs)
    monkeypatch.setattr(triton_depthwise, "MIN_ROWS", min_rows)
    check_depthwise((2, 4, 5, 3), 3, torch.float32)


@elsewhere
@few
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 5), st.integers(1, 10)), st.sampled_from([1, 3])
)
def test_activated_depthwise_of_any_shape(shape, kernel):
    check_depthwise(shape, kernel, torch.float32)


def attended(qkv, num_heads, grid_size):
    """Eq. 6-8 grid by grid, as they read."""
    _, channels, height, width = qkv.shape
    out = torch.zeros_like(qkv[:, : channels // 3])
    for y in range(0, height, grid_size):
        for x in range(0, width, grid_size):
            grid = qkv[:, :, y : y + grid_size, x : x + grid_size]
            q, k, v = grid.flatten(2).unflatten(1, (3, num_heads, -1)).unbind(1)  # [B, heads, d, N]
            weights = (q.transpose(-2, -1) @ k / q.shape[2] ** 0.5).softmax(-1)
            result = (weights @ v.transpose(-2, -1)).transpose(-2, -1).flatten(1, 2)
            out[:, :, y : y + grid_size, x : x + grid_size] = result.unflatten(2, grid.shape[2:])
    return out


def check_grid_attention(batch, heads, head_dim, size, grid_size, dtype, layout=torch.channels_last):
    qkv = (1.5 * torch.randn(batch, 3 * heads * head_dim, *size)).to(dtype).contiguous(memory_format=layout)
    arguments = {"num_heads": heads, "grid_size": grid_size}
    assert triton_attention.supports(qkv, **arguments)
    fast = functools.partial(triton_attention.grid_attention, **arguments)
    # the weights and their gradient are rounded too, before they enter products
    agree(fast, functools.partial(attended, **arguments), [qkv], dtype, roundings=2.0)


@elsewhere
@dtypes
@pytest.mark.parametrize("head_dim", [48, 64])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)], ids=["whole grids", "grids over the edge"])
def test_grid_attention(size, head_dim, dtype):
    check_grid_attention(2, 2, head_dim, size, 4, dtype)


@elsewhere
@dtypes
def test_grid_attention_in_grids_of_the_paper(dtype):
    check_grid_attention(1, 1, 64, (8, 9), 8, dtype)
    check_grid_attention(1, 1, 48, (7, 8), 7, dtype)


@elsewhere
@pytest.mark.parametrize("size", [(3, 5), (2, 9), (1, 1)])
def test_grid_attention_of_maps_smaller_than_a_grid(size):
    check_grid_attention(1, 2, 8, size, 8, torch.float32)


@elsewhere
@pytest.mark.parametrize(("size", "grid_size", "head_dim"), [((11, 12), 11, 20), ((16, 17), 16, 32)])
def test_grid_attention_takes_the_queries_of_large_grids_in_parts(size, grid_size, head_dim):
    check_grid_attention(1, 1, head_dim, size, grid_size, torch.float16)


@elsewhere
def test_grid_attention_of_a_map_in_nchw():
    check_grid_attention(2, 1, 16, (5, 4), 4, torch.float32, layout=torch.contiguous_format)


@elsewhere
@few
@given(st.integers(1, 3), st.integers(1, 40), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 8))
def test_grid_attention_of_any_shape(heads, head_dim, size, grid_size):
    check_grid_attention(1, heads, head_dim, size, max(grid_size, 3), torch.float32)


@elsewhere
@pytest.mark.parametrize(
    ("grid_size", "head_dim", "dtype"),
    [(17, 16, torch.float16), (16, 64, torch.float16), (9, 16, torch.float32), (4, 16, torch.float64)],
)
def test_grid_attention_refuses_what_it_has_no_room_for(grid_size, head_dim, dtype):
    qkv = torch.zeros(1, 3 * head_dim, 20, 20, dtype=dtype, device=DEVICE)
    assert not triton_attention.supports(qkv, 1, grid_size)
    with raises(ValueError, "grids", grid_size, head_dim, dtype):
        triton_attention.grid_attention(qkv, 1, grid_size)


@elsewhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_grid_attention_adds_a_residual_of_another_dtype(dtype):
    qkv, residual = torch.randn(1, 48, 5, 7).to(dtype), torch.randn(1, 16, 5, 7)

    def fast(qkv, residual):
        return triton_attention.grid_attention(qkv, 1, 4, residual)

    agree(fast, lambda qkv, residual: attended(qkv, 1, 4) + residual, [qkv, residual], dtype, roundings=2.0)


def attended_to_pooled(q, kv, num_heads):
    """Eq. 11-13 as they read."""
    k, v = kv.flatten(2).unflatten(1, (2, num_heads, -1)).unbind(1)  # [B, heads, d, M]
    queries = q.flatten(2).unflatten(1, (num_heads, -1))
    weights = (queries.transpose(-2, -1) @ k / k.shape[2] ** 0.5).softmax(-1)
    return (weights @ v.transpose(-2, -1)).transpose(-2, -1).flatten(1, 2).unflatten(2, q.shape[2:])


def check_pooled_attention(batch, heads, head_dim, size, pooled, dtype, residual=False):
    channels = heads * head_dim
    tensors = [1.5 * torch.randn(batch, channels, *size), 1.5 * torch.randn(batch, 2 * channels, *pooled)]
    tensors = [t.to(dtype) for t in tensors] + [torch.randn(batch, channels, *size)] * residual
    assert triton_attention.supports_pooled(*tensors[:2], heads)

    def fast(q, kv, *added):
        return triton_attention.pooled_attention(q, kv, heads, *added)

    agree(fast, lambda q, kv, *added: sum(added, attended_to_pooled(q, kv, heads)), tensors, dtype, roundings=2.0)


@elsewhere
@half
@pytest.mark.parametrize("head_dim", [48, 64])
def test_pooled_attention(head_dim, dtype):
    check_pooled_attention(2, 2, head_dim, (9, 8), (2, 3), dtype)


@elsewhere
@half
def test_pooled_attention_adds_a_residual_of_another_dtype(dtype):
    check_pooled_attention(1, 1, 16, (5, 4), (7, 7), dtype, residual=True)


@elsewhere
def test_pooled_attention_refuses_more_pooled_positions_than_it_has_room_for():
    q, kv = (torch.zeros(1, c, 5, 13, device=DEVICE, dtype=torch.float16) for c in (16, 32))
    assert not triton_attention.supports_pooled(q, kv, 1)
    with raises(ValueError, "kv", [1, 32, 5, 13]):
        triton_attention.pooled_attention(q, kv, 1)


@elsewhere
@dtypes
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)], ids=["whole pools", "pools over the edge", "one position"])
def test_average_pool(size, dtype):
    x = torch.randn(2, 20, *size).to(dtype)
    fast, plain = (functools.partial(f, **o) for f, o in [(triton_pool.average_pool, {"size": 2}), (pooled, {})])
    agree(fast, plain, [x], dtype)


def pooled(x):
    return F.avg_pool2d(x, 2, ceil_mode=True)


@elsewhere
def test_every_operator_is_well_formed():
    x, weight, bias = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((2, 8, 3, 5), 8, 8))
    qkv, q, kv = (torch.randn(1, c, 3, 5, device=DEVICE, requires_grad=True) for c in (24, 8, 16))
    kernel = torch.randn(8, 1, 3, 3, device=DEVICE, requires_grad=True)
    operators = torch.ops.hatnet
    check_op(operators.group_norm.default, x, weight, bias, 1e-6, torch.float32)
    check_op(operators.activated_depthwise.default, x, kernel)
    check_op(operators.grid_attention.default, qkv, 2, 3, None)
    check_op(operators.pooled_attention.default, q.detach().half().requires_grad_(), kv.detach().half(), 2, q)
    check_op(operators.average_pool.default, x, 2)


@elsewhere
def test_second_derivatives_are_refused_rather_than_wrong():
    x = torch.randn(1, 8, 4, 4, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(triton_pool.average_pool(x, 2).square().sum(), x, create_graph=True)
    with raises(RuntimeError, "once", "reference"):
        gradient.sum().backward()


@elsewhere
def test_other_dtypes_and_even_kernels_are_refused():
    x = torch.zeros(1, 4, 2, 2, device=DEVICE)
    with raises(ValueError, "x", torch.float64):
        triton_group_norm.group_norm(x.double(), x[0, :, 0, 0], x[0, :, 0, 0], 1e-6)
    with raises(ValueError, "h", torch.float64):
        triton_depthwise.activated_depthwise(x.double(), torch.zeros(4, 1, 3, 3, device=DEVICE))
    with raises(ValueError, "weight", [4, 1, 4, 4]):
        triton_depthwise.activated_depthwise(x, torch.zeros(4, 1, 4, 4, device=DEVICE))

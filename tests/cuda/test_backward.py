"""The CUDA backward kernels against FP64, each by its name, on fresh inputs, with gradients poisoned beforehand."""

from __future__ import annotations

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from binding import AdaAttnError, Backward, Forward

import reference

# Said once, of the thread in which torch differentiates the reference.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
NAMES = os.environ.get("ADAATTN_TEST_BACKWARD_KERNEL")
KERNELS = NAMES.split(",") if NAMES else ["sm90_backward", "sm80_backward"]
BF16, FP16 = torch.bfloat16, torch.float16

# Relative Frobenius errors in units u of the dtype's unit roundoff (2^-8, 2^-11). One rounding to nearest is wrong by
# at most u, spread evenly over a binade: u / sqrt(3) = 0.58 u rms in the worst place of it. dv: P and dv are rounded,
# sqrt(2) 0.58 = 0.82 u. dq and dk: dS and the gradient are rounded, and dS itself inherits the rounding of the given
# out through delta = rowsum(dout out): each row's dS is off by P times that, relative to it no more than out's 0.58 u,
# so sqrt(3) 0.58 = 1 u. Heads of few elements average nothing: there each rounding may be off by a whole u.
UNIT = {BF16: 2**-8, FP16: 2**-11}
MANY, FEW = 1.0, 3.1


class Chosen:
    """The kernel of the test that runs."""

    name = KERNELS[0]


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request):
    Chosen.name = request.param
    params = request.node.callspec.params
    if request.param == "sm90_backward" and max(params.get("dims", (params.get("dim", 0),))) > 128:
        pytest.skip("takes D and Dv to 128")


def tensor(*shape: int, dtype: torch.dtype, layout: str = "bhsd") -> torch.Tensor:
    b, h, n, d = shape
    if layout == "bshd":
        return torch.randn(b, n, h, d, device="cuda", dtype=dtype).transpose(1, 2)
    if layout == "packed":  # one of three side by side, as a fused projection leaves it
        return torch.randn(b, n, 3, h, d, device="cuda", dtype=dtype)[:, :, 1].transpose(1, 2)
    return torch.randn(b, h, n, d, device="cuda", dtype=dtype)


def run(q, k, v, dout, *, seen=None, gradients=None, deterministic=0, **options):
    """Our gradients, from FP64's out and lse rounded as a forward pass would, or from our own forward pass."""
    if seen is None:
        out = torch.empty(*q.shape[:3], v.shape[-1], device="cuda", dtype=q.dtype)
        lse = torch.empty(q.shape[:3], device="cuda")
        Forward(q, k, v, out, lse, **options)()
    else:
        out, lse = reference.attention(q, k, v, seen, options.get("scale"))
        out, lse = out.to(q.dtype), lse.float()
    if gradients is None:
        gradients = tuple(torch.empty(t.shape, device="cuda", dtype=t.dtype) for t in (q, k, v))
    for gradient in gradients:
        gradient.fill_(math.nan)
    Backward(q, k, v, out, lse, dout, gradients, kernel=Chosen.name.encode(), deterministic=deterministic, **options)()
    torch.cuda.synchronize()
    return gradients


def assert_right(got, want, dtype, slack=1.0):
    for name, ours, truth in zip(("dq", "dk", "dv"), got, want, strict=True):
        assert not ours.isnan().any(), f"{name}: unwritten or NaN"
        norm = truth.norm(dim=(-2, -1))
        # One key means dS = 0 exactly, and rounding noise instead of it: judged by what it is the difference of.
        floor = 1e-3 * truth.shape[-2] ** 0.5
        error = (ours.double() - truth).norm(dim=(-2, -1)) / norm.clamp(min=floor)
        limit = slack * UNIT[dtype] * (MANY if truth.shape[-2] * truth.shape[-1] >= 4096 else FEW)
        if (norm < floor).any():
            limit = max(limit, UNIT[dtype] * 64 / 1e-3)  # of rows of norm sqrt(D Dv) at most
        assert error.max() <= limit, f"{name}: relative error {error.max():.2e} > {limit:.2e}"


SHAPES = [  # b, hq, hk, nq, nk
    (1, 1, 1, 1, 1),
    (2, 3, 3, 64, 64),
    (1, 2, 2, 128, 128),
    (2, 4, 2, 200, 333),
    (1, 6, 2, 513, 129),
    (3, 2, 1, 77, 1000),
    (1, 2, 2, 1024, 1024),
    (2, 60, 60, 257, 300),  # more blocks than multiprocessors
    (1, 8, 1, 1, 4097),
    (1, 1, 1, 300, 1),
]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mode", ["full", "causal", "bottom_right"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("deterministic", [0, 1])
def test_shapes(dtype, dim, mode, shape, deterministic):
    b, hq, hk, nq, nk = shape
    q, dout = (tensor(b, hq, nq, dim, dtype=dtype) for _ in range(2))
    k, v = (tensor(b, hk, nk, dim, dtype=dtype) for _ in range(2))
    bottom = mode == "bottom_right"
    seen = reference.visible(nq, nk, causal=mode != "full", bottom_right=bottom)
    options = {"causal": int(mode != "full"), "alignment": int(bottom), "deterministic": deterministic}
    got = run(q, k, v, dout, seen=seen, **options)
    # Of few queries under a mask, many see a key or two: as in test_scales, though by less.
    few = mode != "full" and nq <= 64
    assert_right(got, reference.gradients(q, k, v, dout, seen), dtype, slack=1.4 if few else 1.0)


@pytest.mark.parametrize(
    "dims",
    [(d, d) for d in (8, 32, 40, 72, 80, 96, 136, 160, 192, 256)] + [(128, 64), (48, 120), (192, 128), (64, 248)],
)
@pytest.mark.parametrize("causal", [0, 1])
def test_head_sizes(dims, causal):
    q, k, v, dout = (tensor(2, 3, 190, d, dtype=BF16) for d in (dims[0], dims[0], dims[1], dims[1]))
    seen = reference.visible(190, 190, causal=bool(causal))
    assert_right(run(q, k, v, dout, causal=causal), reference.gradients(q, k, v, dout, seen), BF16)


@pytest.mark.parametrize("layout", ["bshd", "packed"])
def test_strides(layout):
    q, k, v, dout = (tensor(2, 4, 300, 64, dtype=BF16, layout=layout) for _ in range(4))
    gradients = tuple(tensor(2, 4, 300, 64, dtype=BF16, layout=layout) for _ in range(3))
    seen = reference.visible(300, 300, causal=True)
    got = run(q, k, v, dout, gradients=gradients, causal=1)
    assert_right(got, reference.gradients(q, k, v, dout, seen), BF16)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("left", "right", "sinks"), [(0, 0, 0), (100, 0, 0), (64, 37, 0), (300, -1, 4), (130, 0, 140), (-1, 5, 0)]
)
@pytest.mark.parametrize("bottom_right", [0, 1])
@pytest.mark.parametrize("deterministic", [0, 1])
def test_windows(dim, left, right, sinks, bottom_right, deterministic):
    nq, nk = 700, 900
    q, dout = (tensor(1, 2, nq, dim, dtype=BF16) for _ in range(2))
    k, v = (tensor(1, 2, nk, dim, dtype=BF16) for _ in range(2))
    seen = reference.visible(nq, nk, bottom_right=bool(bottom_right), left=left, right=right, sinks=sinks)
    options = {"window_left": left, "window_right": right, "sinks": sinks, "alignment": bottom_right}
    got = run(q, k, v, dout, seen=seen, deterministic=deterministic, **options)
    assert_right(got, reference.gradients(q, k, v, dout, seen), BF16)


# 2,048 queries or more on a key head: sm_90a has a kernel of its own for D to 64 and makes dQ a step late for D to 128,
# under a mask in turns. Among them blocks of keys with one step and with none, and more blocks than multiprocessors.
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2, 2, 2048, 700), {}),
        ((1, 2, 2, 2048, 2048), {"causal": 1}),
        ((1, 2, 2, 2049, 2049), {"causal": 1}),
        ((1, 2, 1, 1025, 1500), {"causal": 1}),
        ((1, 70, 70, 2050, 260), {}),
        ((1, 8, 2, 600, 1000), {"causal": 1, "alignment": 1}),
        ((1, 8, 2, 1000, 600), {"causal": 1, "alignment": 1}),
        ((1, 70, 70, 2050, 260), {"causal": 1}),
        ((2, 1, 1, 2100, 129), {}),
        ((1, 2, 1, 1500, 1700), {"window_left": 300, "window_right": 64}),
        ((1, 2, 1, 1500, 1700), {"causal": 1, "window_left": 130, "sinks": 140}),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [40, 64, 72, 128])
def test_many_queries(shape, options, dtype, dim):
    b, hq, hk, nq, nk = shape
    q, dout = (tensor(b, hq, nq, dim, dtype=dtype) for _ in range(2))
    k, v = (tensor(b, hk, nk, dim, dtype=dtype) for _ in range(2))
    names = {"causal": "causal", "alignment": "bottom_right", "window_left": "left", "window_right": "right"}
    words = {names.get(name, name): value for name, value in options.items()}
    seen = reference.visible(nq, nk, **words)
    assert_right(run(q, k, v, dout, seen=seen, **options), reference.gradients(q, k, v, dout, seen), dtype)


@pytest.mark.parametrize("dim", [64, 128])
def test_many_queries_key_lengths_hide_even_nan(dim):
    lengths, nq, nk = [0, 1, 63, 200, 330], 2048, 330
    q, dout = (tensor(len(lengths), 2, nq, dim, dtype=BF16) for _ in range(2))
    k, v = (tensor(len(lengths), 2, nk, dim, dtype=BF16) for _ in range(2))
    seen = torch.zeros(len(lengths), 1, nq, nk, dtype=torch.bool, device="cuda")
    for i, n in enumerate(lengths):
        seen[i, 0, :, :n] = True
    truth = reference.gradients(q, k, v, dout, seen)
    out, lse = reference.attention(q, k, v, seen)
    for i, n in enumerate(lengths):
        k[i, :, n:] = math.nan
        v[i, :, n:] = math.nan
    gradients = tuple(torch.full_like(t, math.nan) for t in (q, k, v))
    options = {"kernel": Chosen.name.encode(), "key_lengths": torch.tensor(lengths, device="cuda")}
    Backward(q, k, v, out.to(BF16), lse.float(), dout, gradients, **options)()
    assert_right(gradients, truth, BF16)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("nq", "nk"), [(700, 100), (700, 300), (2100, 300)])
def test_twice_in_one_workspace(dim, nq, nk):
    """What a call leaves behind in its workspace does not matter to the next."""
    q, dout = (tensor(2, 2, nq, dim, dtype=BF16) for _ in range(2))
    k, v = (tensor(2, 2, nk, dim, dtype=BF16) for _ in range(2))
    seen = reference.visible(nq, nk, causal=True)
    out, lse = reference.attention(q, k, v, seen)
    gradients = tuple(torch.empty_like(t) for t in (q, k, v))
    call = Backward(q, k, v, out.to(BF16), lse.float(), dout, gradients, kernel=Chosen.name.encode(), causal=1)
    truth = reference.gradients(q, k, v, dout, seen)
    for _ in range(3):
        for gradient in gradients:
            gradient.fill_(math.nan)
        call()
        assert_right(gradients, truth, BF16)


# Tiles that see sinks but no window, or fewer sinks than there are: whoever counts them wrong waits forever.
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("nq", "nk", "left", "sinks"), [(313, 180, 69, 91), (1197, 335, 251, 9), (341, 943, 78, 429), (356, 1182, 31, 313)]
)
def test_deterministic_windows_with_sinks(dim, nq, nk, left, sinks):
    q, dout = (tensor(1, 2, nq, dim, dtype=BF16) for _ in range(2))
    k, v = (tensor(1, 2, nk, dim, dtype=BF16) for _ in range(2))
    seen = reference.visible(nq, nk, causal=True, left=left, sinks=sinks)
    got = run(q, k, v, dout, seen=seen, deterministic=1, causal=1, window_left=left, sinks=sinks)
    assert_right(got, reference.gradients(q, k, v, dout, seen), BF16)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mode", ["full", "causal", "bottom_right"])
@pytest.mark.parametrize("deterministic", [0, 1])
def test_key_lengths_hide_even_nan(dim, mode, deterministic):
    lengths = [0, 1, 63, 128, 500, 600]
    nq, nk = 250, 600
    q, dout = (tensor(len(lengths), 2, nq, dim, dtype=BF16) for _ in range(2))
    k, v = (tensor(len(lengths), 1, nk, dim, dtype=BF16) for _ in range(2))
    bottom = mode == "bottom_right"
    seen = torch.zeros(len(lengths), 1, nq, nk, dtype=torch.bool, device="cuda")
    for i, n in enumerate(lengths):
        seen[i, 0, :, :n] = reference.visible(nq, n, causal=mode != "full", bottom_right=bottom)
    truth = reference.gradients(q, k, v, dout, seen)
    out, lse = reference.attention(q, k, v, seen)
    for i, n in enumerate(lengths):
        k[i, :, n:] = math.nan
        v[i, :, n:] = math.nan
    gradients = tuple(torch.full_like(t, math.nan) for t in (q, k, v))
    Backward(
        q,
        k,
        v,
        out.to(BF16),
        lse.float(),
        dout,
        gradients,
        kernel=Chosen.name.encode(),
        causal=int(mode != "full"),
        alignment=int(bottom),
        deterministic=deterministic,
        key_lengths=torch.tensor(lengths, device="cuda"),
    )()
    assert_right(gradients, truth, BF16)
    for i, n in enumerate(lengths):
        assert not gradients[1][i, :, n:].any()
        assert not gradients[2][i, :, n:].any()


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-3, -0.2])
def test_scales(scale):
    q, k, v, dout = (tensor(1, 2, 400, 64, dtype=BF16) for _ in range(4))
    seen = reference.visible(400, 400)
    got = run(q, k, v, dout, seen=seen, scale=scale)
    # With scores of standard deviation 8 most of a row's mass is on one key, where dP - delta is a small difference;
    # out's rounding, which delta inherits, weighs more. FP64 arithmetic on a rounded out is off by 1.07 u alone (0.08 u
    # one standard deviation over 200 heads, 1.4 u the worst of them); with the roundings of dS and of the gradient
    # sqrt(1.4^2 + 2 * 0.58^2) u = 1.6 u.
    assert_right(got, reference.gradients(q, k, v, dout, seen, scale), BF16, slack=1.7 if scale == 1 else 1.0)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("tokens", [300, 2048])
def test_nan_propagates(dim, where, tokens):
    tensors = {name: tensor(1, 1, tokens, dim, dtype=BF16) for name in ("q", "k", "v", "dout")}
    tensors[where][0, 0, 123, 7] = math.nan
    got = run(*tensors.values())
    inputs = [t.double().requires_grad_() for t in list(tensors.values())[:3]]
    out = torch.nn.functional.scaled_dot_product_attention(*inputs)
    want = torch.autograd.grad(out, inputs, tensors["dout"].double())
    for ours, truth in zip(got, want, strict=True):
        assert torch.equal(ours.isnan(), truth.isnan())


@pytest.mark.parametrize("deterministic", [0, 1])
def test_no_keys_and_no_queries(deterministic):
    q, dout = (tensor(2, 2, 50, 64, dtype=BF16) for _ in range(2))
    none = torch.empty(2, 2, 0, 64, device="cuda", dtype=BF16)
    assert (run(q, none, none, dout, deterministic=deterministic)[0] == 0).all()
    gradients = run(none, q, q, none, deterministic=deterministic)
    assert (gradients[1] == 0).all()
    assert (gradients[2] == 0).all()


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [0, 1])
def test_deterministic_gives_the_same_bits(dim, causal):
    q, k, v, dout = (tensor(2, 20, 1500, dim, dtype=BF16) for _ in range(4))
    first = [g.clone() for g in run(q, k, v, dout, causal=causal, deterministic=1)]
    for _ in range(10):
        again = run(q, k, v, dout, causal=causal, deterministic=1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["bool", "float32", "own"])
@pytest.mark.parametrize("size", ["full", "keys", "query"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [0, 1])
def test_masks(kind, size, dtype, dim, deterministic):
    if Chosen.name == "sm90_backward":
        pytest.skip("takes no masks")
    b, hq, hk, nq, nk = 2, 4, 2, 200, 333
    q, dout = (tensor(b, hq, nq, dim, dtype=dtype) for _ in range(2))
    k, v = (tensor(b, hk, nk, dim, dtype=dtype) for _ in range(2))
    shape = {"full": (b, hq, nq, nk), "keys": (b, 1, 1, nk), "query": (1, hq, nq, 1)}[size]
    shown = torch.rand(shape, device="cuda") < 0.7
    shown[..., 0, :] = False  # a row, or all, that sees nothing
    mask = shown
    bias = None
    if kind != "bool":
        bias = torch.randn(shape, device="cuda").to(torch.float32 if kind == "float32" else dtype)
        mask = bias.masked_fill(~shown, -math.inf)
    seen = reference.visible(nq, nk, causal=True) & shown
    out, lse = reference.attention(q, k, v, seen, bias=bias)
    gradients = tuple(torch.full_like(t, math.nan) for t in (q, k, v))
    options = {"kernel": Chosen.name.encode(), "causal": 1, "deterministic": deterministic}
    Backward(q, k, v, out.to(dtype), lse.float(), dout, gradients, mask=mask, **options)()
    # Rows with few keys left have most of their mass on one, as with a scale of 1 in test_scales.
    assert_right(gradients, reference.gradients(q, k, v, dout, seen, bias=bias), dtype, slack=1.4)


def test_graph_capture():
    q, k, v, dout = (tensor(2, 8, 700, 128, dtype=BF16) for _ in range(4))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
    Forward(q, k, v, out, lse, causal=1)()
    gradients = tuple(torch.empty_like(t) for t in (q, k, v))
    call = Backward(q, k, v, out, lse, dout, gradients, kernel=Chosen.name.encode(), causal=1, deterministic=1)
    call()
    want = [g.clone() for g in gradients]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        for gradient in gradients:
            gradient.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(g, w) for g, w in zip(gradients, want, strict=True))


@pytest.mark.parametrize("dim", [64, 256])
def test_torch_operator_uses_it(dim):
    import adaattn

    q, k, v, dout = (tensor(2, 4, 333, dim, dtype=BF16) for _ in range(4))
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out = adaattn.attention(*inputs, is_causal=True)
    got = torch.autograd.grad(out, inputs, dout)
    want = reference.gradients(q, k, v, dout, reference.visible(333, 333, causal=True))
    assert_right(got, want, BF16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q: tuple(q.float() for _ in range(4)), "float16 and bfloat16"),
        (lambda q: tuple(q[..., :60] for _ in range(4)), "multiples of 8"),
        (lambda q: tuple(torch.cat([q, q, q, q, q], -1) for _ in range(4)), "at most (128|256)"),
    ],
)
def test_declines_with_a_reason(change, reason):
    q, k, v, dout = change(tensor(1, 1, 64, 64, dtype=BF16))
    with pytest.raises(AdaAttnError, match=reason):
        run(q, k, v, dout, seen=reference.visible(64, 64))

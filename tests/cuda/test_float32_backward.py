"""The float32 backward kernel on CUDA against FP64, on fresh inputs, with gradients and workspace poisoned before."""

from __future__ import annotations

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from binding import AdaAttnError, Backward, Forward

import reference

# Said once, of the thread in which torch differentiates the reference.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
SIMT = b"simt_float32"

# Errors relative to what a gradient would be if all terms of its sums, and of dP and delta, had random signs: one key
# means dS = 0 exactly, and rounding noise instead of it. A unit is 2^-24.
# Scores and dP are sums of D products: off by sqrt(D) / 2 = 8 units at D = 256; a given lse of 8 to 16 is rounded by up
# to 8, which multiplies a row's probabilities; expf is off by 2. Gradients are sums of up to 4,097 terms, off by
# sqrt(N) / 2 = 32. Together, of changing sign, 35 units; the limit is 64. A wrong or missing term is off by 2^24 / N.
LIMIT = 2**-18


def tensor(*shape: int, layout: str = "bhsd") -> torch.Tensor:
    b, h, n, d = shape
    if layout == "bshd":
        return torch.randn(b, n, h, d, device="cuda").transpose(1, 2)
    if layout == "packed":  # one of three side by side, as a fused projection leaves it
        return torch.randn(b, n, 3, h, d, device="cuda")[:, :, 1].transpose(1, 2)
    if layout == "bhds":  # columns, not rows, side by side
        return torch.randn(b, h, d, n, device="cuda").transpose(2, 3)
    return torch.randn(b, h, n, d, device="cuda")


def sizes(q, k, v, dout, seen, scale=None, bias=None):
    """Norms [B, H] of dq, dk and dv if the terms of their sums had random signs."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    p, _ = reference.softmax(q, k, seen, scale, bias)
    keys, values = (t.double().repeat_interleave(group, 1) for t in (k, v))
    dp = dout.double() ** 2 @ values.transpose(-1, -2) ** 2  # the square of its size, as what follows
    delta = (dout.double() * (p @ values)).square().sum(-1, keepdim=True)
    terms = p**2 * (dp + delta) * scale**2
    squares = (
        terms @ keys**2,
        (terms.transpose(-1, -2) @ q.double() ** 2).unflatten(1, (-1, group)).sum(2),
        (p.transpose(-1, -2) ** 2 @ dout.double() ** 2).unflatten(1, (-1, group)).sum(2),
    )
    return [s.sum((-2, -1)).sqrt() for s in squares]


def run(q, k, v, dout, seen, *, gradients=None, bias=None, **options):
    """Our gradients from FP64's out and lse, rounded."""
    out, lse = reference.attention(q, k, v, seen, options.get("scale"), bias)
    if gradients is None:
        gradients = tuple(torch.empty(t.shape, device="cuda") for t in (q, k, v))
    for gradient in gradients:
        gradient.fill_(math.nan)
    call = Backward(q, k, v, out.float(), lse.float(), dout, gradients, kernel=SIMT, **options)
    call.workspace.fill_(255)  # what is there before must not matter: these bytes are NaN
    call()
    torch.cuda.synchronize()
    return gradients


def assert_right(got, q, k, v, dout, seen, *, scale=None, bias=None, slack=1.0):
    truth = reference.gradients(q, k, v, dout, seen, scale, bias)
    norms = sizes(q, k, v, dout, seen, scale, bias)
    for name, ours, want, norm in zip(("dq", "dk", "dv"), got, truth, norms, strict=True):
        assert not ours.isnan().any(), f"{name}: unwritten or NaN"
        size = torch.maximum(norm, want.norm(dim=(-2, -1)))
        error = (ours.double() - want).norm(dim=(-2, -1))
        worst = (error / torch.where(size == 0, 1.0, size)).max().item()
        assert worst <= slack * LIMIT, f"{name}: relative error {worst:.2e} > {slack * LIMIT:.2e}"


SHAPES = [  # b, hq, hk, nq, nk
    (1, 1, 1, 1, 1),
    (2, 3, 3, 64, 64),
    (2, 4, 2, 200, 333),
    (1, 6, 2, 513, 129),
    (3, 2, 1, 77, 1000),
    (2, 60, 60, 257, 300),  # more blocks than multiprocessors
    (1, 8, 1, 1, 4097),
    (1, 1, 1, 300, 1),
]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mode", ["full", "causal", "bottom_right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(dim, mode, shape):
    b, hq, hk, nq, nk = shape
    q, dout = (tensor(b, hq, nq, dim) for _ in range(2))
    k, v = (tensor(b, hk, nk, dim) for _ in range(2))
    bottom = mode == "bottom_right"
    seen = reference.visible(nq, nk, causal=mode != "full", bottom_right=bottom)
    got = run(q, k, v, dout, seen, causal=int(mode != "full"), alignment=int(bottom))
    assert_right(got, q, k, v, dout, seen)


@pytest.mark.parametrize("dims", [(1, 1), (8, 8), (63, 63), (72, 72), (64, 128), (130, 7), (250, 250)])
@pytest.mark.parametrize("causal", [0, 1])
def test_head_sizes(dims, causal):
    q, k, v, dout = (tensor(2, 3, 190, d) for d in (dims[0], dims[0], dims[1], dims[1]))
    seen = reference.visible(190, 190, causal=bool(causal))
    assert_right(run(q, k, v, dout, seen, causal=causal), q, k, v, dout, seen)


@pytest.mark.parametrize("layout", ["bshd", "packed", "bhds"])
def test_strides(layout):
    q, k, v, dout = (tensor(2, 4, 300, 61, layout=layout) for _ in range(4))
    gradients = tuple(tensor(2, 4, 300, 61, layout=layout) for _ in range(3))
    seen = reference.visible(300, 300, causal=True)
    assert_right(run(q, k, v, dout, seen, gradients=gradients, causal=1), q, k, v, dout, seen)


@pytest.mark.parametrize(
    ("left", "right", "sinks"), [(0, 0, 0), (100, 0, 0), (64, 37, 0), (300, -1, 4), (130, 0, 140), (-1, 5, 0)]
)
@pytest.mark.parametrize("bottom_right", [0, 1])
def test_windows(left, right, sinks, bottom_right):
    nq, nk = 700, 900
    q, dout = (tensor(1, 2, nq, 64) for _ in range(2))
    k, v = (tensor(1, 2, nk, 64) for _ in range(2))
    seen = reference.visible(nq, nk, bottom_right=bool(bottom_right), left=left, right=right, sinks=sinks)
    options = {"window_left": left, "window_right": right, "sinks": sinks, "alignment": bottom_right}
    assert_right(run(q, k, v, dout, seen, **options), q, k, v, dout, seen)


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("mode", ["full", "causal", "bottom_right"])
def test_key_lengths_hide_even_nan(dim, mode):
    lengths, nq, nk = [0, 1, 63, 128, 500, 600], 250, 600
    q, dout = (tensor(len(lengths), 2, nq, dim) for _ in range(2))
    k, v = (tensor(len(lengths), 1, nk, dim) for _ in range(2))
    bottom = mode == "bottom_right"
    seen = torch.zeros(len(lengths), 1, nq, nk, dtype=torch.bool, device="cuda")
    for i, n in enumerate(lengths):
        seen[i, 0, :, :n] = reference.visible(nq, n, causal=mode != "full", bottom_right=bottom)
    out, lse = reference.attention(q, k, v, seen)
    hidden = [t.clone() for t in (k, v)]
    for i, n in enumerate(lengths):
        for t in hidden:
            t[i, :, n:] = math.nan
    gradients = tuple(torch.full_like(t, math.nan) for t in (q, k, v))
    options = {"causal": int(mode != "full"), "alignment": int(bottom), "kernel": SIMT}
    options["key_lengths"] = torch.tensor(lengths, device="cuda")
    Backward(q, *hidden, out.float(), lse.float(), dout, gradients, **options)()
    assert_right(gradients, q, k, v, dout, seen)
    for i, n in enumerate(lengths):
        assert not gradients[1][i, :, n:].any()
        assert not gradients[2][i, :, n:].any()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, -0.2])
def test_scales(scale):
    # Scores, and with them the errors of probabilities, are sqrt(D) times scale as large as usual.
    q, k, v, dout = (tensor(1, 2, 400, 64) for _ in range(4))
    seen = reference.visible(400, 400)
    got = run(q, k, v, dout, seen, scale=scale)
    assert_right(got, q, k, v, dout, seen, scale=scale, slack=1 + 8 * abs(scale))


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("size", [(2, 4, 200, 333), (2, 1, 1, 333), (1, 4, 200, 1)])
def test_masks(kind, size):
    q, dout = (tensor(2, 4, 200, 64) for _ in range(2))
    k, v = (tensor(2, 2, 333, 64) for _ in range(2))
    shown = torch.rand(size, device="cuda") < 0.7
    shown[..., 0, :] = False  # a row, or all, that sees nothing
    bias = None if kind == "bool" else torch.randn(size, device="cuda")
    mask = shown if bias is None else bias.masked_fill(~shown, -math.inf)
    seen = reference.visible(200, 333, causal=True) & shown
    got = run(q, k, v, dout, seen, bias=bias, mask=mask, causal=1)
    assert_right(got, q, k, v, dout, seen, bias=bias)


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_propagates(dim, where):
    tensors = {name: tensor(1, 1, 300, dim) for name in ("q", "k", "v", "dout")}
    tensors[where][0, 0, 123, 7] = math.nan
    got = run(*tensors.values(), reference.visible(300, 300))
    inputs = [t.double().requires_grad_() for t in list(tensors.values())[:3]]
    out = torch.nn.functional.scaled_dot_product_attention(*inputs)
    want = torch.autograd.grad(out, inputs, tensors["dout"].double())
    for ours, truth in zip(got, want, strict=True):
        assert torch.equal(ours.isnan(), truth.isnan())


def test_no_keys_and_no_queries():
    some, none = tensor(2, 2, 50, 64), torch.empty(2, 2, 0, 64, device="cuda")
    assert (run(some, none, none, some, reference.visible(50, 0))[0] == 0).all()
    gradients = run(none, some, some, none, reference.visible(0, 50))
    assert (gradients[1] == 0).all()
    assert (gradients[2] == 0).all()


def test_same_bits_every_time_and_graph_capture():
    q, k, v, dout = (tensor(2, 20, 700, 128) for _ in range(4))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
    Forward(q, k, v, out, lse, causal=1)()
    gradients = tuple(torch.empty_like(t) for t in (q, k, v))
    call = Backward(q, k, v, out, lse, dout, gradients, kernel=SIMT, causal=1, deterministic=1)
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


@pytest.mark.parametrize("kernel", [None, "simt_float32"])
def test_torch_operator_uses_it(kernel):
    import adaattn

    q, k, v, dout = (tensor(2, 4, 333, 64) for _ in range(4))
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    out = adaattn.attention(*inputs, is_causal=True, kernel=kernel)
    got = torch.autograd.grad(out, inputs, dout)
    seen = reference.visible(333, 333, causal=True)
    # The forward pass on tensor cores leaves 3 * 2^-18 in scores and 6 * 2^-18 in out (test_float32.py), which P and
    # delta take over.
    assert_right(got, q, k, v, dout, seen, slack=1.0 if kernel else 10.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q: q.half(), "float32 only"),
        (lambda q: torch.cat([q] * 5, -1), "at most 256"),
    ],
)
def test_declines_with_a_reason(change, reason):
    q = change(tensor(1, 1, 64, 64))
    gradients = tuple(torch.empty_like(q) for _ in range(3))
    with pytest.raises(AdaAttnError, match=reason):
        Backward(q, q, q, q, torch.zeros(1, 1, 64, device="cuda"), q, gradients, kernel=SIMT)

"""The float32 forward kernels on CUDA, each by its name, against FP64, with outputs poisoned beforehand."""

from __future__ import annotations

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from binding import AdaAttnError, Forward

import reference

SIMT = "simt_float32"
SPLIT = ("sm90_float32",)
NAMES = os.environ.get("ADAATTN_TEST_KERNEL")
KERNELS = NAMES.split(",") if NAMES else [*SPLIT, SIMT]

# Relative errors of a head's output. Split kernels: an element is two bfloat16 terms plus at most u = 2^-18 of it, and
# the product of two second terms, another u at most, is left out: 3 u of each product of q and k and of p and v, of
# changing sign. A score of N(0, 1) inputs, the scaled sum of D such products of rms 1, is thus off by 3 u at most in
# the mean, its probability by as much relative to it, and the output by 6 u. A missing second term would be 2^-9.
# Ordinary cores: sums of D products and of N values round at each step, by 2^-24 of what is there, off by sqrt(D) / 2
# and sqrt(N) / 2 units of it: for D = 256 and N = 4,097 by 40 units, below 2^-18.
LIMITS = dict.fromkeys(SPLIT, 6 * 2**-18) | {SIMT: 2**-18}


class Chosen:
    """The kernel of the test that runs."""

    name = KERNELS[0]


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request):
    if request.param in SPLIT and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("made for Hopper")
    Chosen.name = request.param


def tensor(*shape: int, layout: str = "bhsd") -> torch.Tensor:
    b, h, n, d = shape
    if layout == "bshd":
        return torch.randn(b, n, h, d, device="cuda").transpose(1, 2)
    if layout == "packed":  # one of three side by side, as a fused projection leaves it
        return torch.randn(b, n, 3, h, d, device="cuda")[:, :, 1].transpose(1, 2)
    return torch.randn(b, h, n, d, device="cuda")


def run(q, k, v, *, out=None, **options):
    if Chosen.name in SPLIT and max(q.shape[-1], v.shape[-1]) > 128:
        pytest.skip("made for D of at most 128")
    out = torch.empty(*q.shape[:3], v.shape[-1], device="cuda") if out is None else out
    out.fill_(math.nan)
    lse = torch.full(q.shape[:3], math.nan, device="cuda")
    call = Forward(q, k, v, out, lse, kernel=Chosen.name.encode(), **options)
    call.workspace.fill_(255)  # what is there before must not matter: these bytes are NaN
    call()
    torch.cuda.synchronize()
    return out, lse


def assert_right(got, truth, factor=1.0):
    out, lse = got
    want, want_lse = truth
    assert not out.isnan().any(), "unwritten or NaN"
    assert not lse.isnan().any(), "unwritten or NaN"
    norm = want.norm(dim=(-2, -1))
    error = (out.double() - want).norm(dim=(-2, -1)) / torch.where(norm == 0, 1.0, norm)
    limit = LIMITS[Chosen.name] * factor
    assert error.max() <= limit, f"relative error {error.max():.2e} > {limit:.2e}"
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    seen = want_lse != -math.inf
    assert (lse.double() - want_lse)[seen].abs().max().item() < 1e-4 * factor if seen.any() else True
    assert (out[~seen] == 0).all()


SHAPES = [  # b, hq, hk, nq, nk
    (1, 1, 1, 1, 1),
    (2, 3, 3, 64, 64),
    (1, 2, 2, 128, 128),
    (2, 4, 2, 200, 333),
    (1, 6, 2, 513, 129),
    (3, 2, 1, 77, 1000),
    (1, 2, 2, 1024, 1024),
    (2, 160, 160, 257, 300),  # more tiles than multiprocessors
    (1, 8, 1, 1, 4097),
    (1, 1, 1, 300, 1),
]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mode", ["full", "causal", "bottom_right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(dim, mode, shape):
    b, hq, hk, nq, nk = shape
    q, k, v = tensor(b, hq, nq, dim), tensor(b, hk, nk, dim), tensor(b, hk, nk, dim)
    bottom = mode == "bottom_right"
    seen = reference.visible(nq, nk, causal=mode != "full", bottom_right=bottom)
    got = run(q, k, v, causal=int(mode != "full"), alignment=int(bottom))
    assert_right(got, reference.attention(q, k, v, seen))


@pytest.mark.parametrize("dims", [(8, 8), (32, 32), (40, 40), (72, 72), (64, 128), (96, 96), (120, 40), (200, 248)])
@pytest.mark.parametrize("causal", [0, 1])
def test_head_sizes(dims, causal):
    q, k, v = (tensor(2, 3, 190, d) for d in (dims[0], dims[0], dims[1]))
    seen = reference.visible(190, 190, causal=bool(causal))
    assert_right(run(q, k, v, causal=causal), reference.attention(q, k, v, seen))


@pytest.mark.parametrize("layout", ["bshd", "packed"])
def test_strides(layout):
    q, k, v = (tensor(2, 4, 300, 64, layout=layout) for _ in range(3))
    out = torch.empty(2, 300, 4, 64, device="cuda").transpose(1, 2)
    seen = reference.visible(300, 300, causal=True)
    assert_right(run(q, k, v, out=out, causal=1), reference.attention(q, k, v, seen))


def test_one_key_head_repeated_by_a_stride_of_0():
    q, k, v = tensor(2, 4, 100, 64), tensor(2, 1, 150, 64), tensor(2, 1, 150, 64)
    got = run(q, k.expand(2, 4, 150, 64), v.expand(2, 4, 150, 64))
    assert_right(got, reference.attention(q, k, v, reference.visible(100, 150)))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("left", "right", "sinks"), [(0, 0, 0), (100, 0, 0), (64, 37, 0), (300, -1, 4), (130, 0, 140), (-1, 5, 0)]
)
@pytest.mark.parametrize("bottom_right", [0, 1])
def test_windows(dim, left, right, sinks, bottom_right):
    nq, nk = 700, 900
    q, k, v = tensor(1, 2, nq, dim), tensor(1, 2, nk, dim), tensor(1, 2, nk, dim)
    seen = reference.visible(nq, nk, bottom_right=bool(bottom_right), left=left, right=right, sinks=sinks)
    got = run(q, k, v, window_left=left, window_right=right, sinks=sinks, alignment=bottom_right)
    assert_right(got, reference.attention(q, k, v, seen))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("hidden", [math.nan, math.inf])
def test_key_lengths_hide_even_nan(dim, causal, hidden):
    lengths = [0, 1, 63, 128, 500, 600]
    nq, nk = 250, 600
    q = tensor(len(lengths), 2, nq, dim)
    k, v = (tensor(len(lengths), 1, nk, dim) for _ in range(2))
    seen = reference.visible(nq, nk, causal=bool(causal))
    seen = seen & (torch.arange(nk, device="cuda") < torch.tensor(lengths, device="cuda")[:, None, None, None])
    truth = reference.attention(q, k, v, seen)
    for i, n in enumerate(lengths):
        k[i, :, n:] = hidden
        v[i, :, n:] = hidden
    assert_right(run(q, k, v, causal=causal, key_lengths=torch.tensor(lengths, device="cuda")), truth)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_scales(scale):
    # Scores, and with them their errors, are sqrt(D) times scale as large as usual.
    q, k, v = (tensor(1, 2, 400, 64) for _ in range(3))
    want = reference.attention(q, k, v, reference.visible(400, 400), scale)
    assert_right(run(q, k, v, scale=scale), want, 1 + 8 * scale)


# The cut-off sums of the tensor cores add up over long rows if nothing is done about it, most where values have a mean.
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_long_rows(dim, causal, mean):
    n = 16384
    q, k, v = tensor(1, 1, n, dim), tensor(1, 1, n, dim), tensor(1, 1, n, dim) + mean
    out, _ = run(q, k, v, causal=causal)
    worst = 0.0
    for first in range(0, n, 2048):
        rows = slice(first, first + 2048)
        seen = reference.visible(n, n, causal=bool(causal))[rows]
        want = reference.attention(q[:, :, rows], k, v, seen)[0]
        worst = max(worst, (out[:, :, rows].double() - want).abs().max().item())
    print(f"{Chosen.name} D {dim} causal {causal} mean {mean}: largest error {worst:.2e}")
    # The bound; with a mean, values of up to 15 keep 2^-18 of themselves, and those of one row may add up.
    assert worst < (1e-4 if mean == 0 else 2e-4)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("where", "value"),
    [("q", math.nan), ("k", math.nan), ("v", math.nan), ("q", math.inf), ("k", math.inf), ("v", -math.inf)],
)
def test_nan_and_inf_propagate(dim, where, value):
    tensors = {name: tensor(1, 1, 300, dim) for name in "qkv"}
    tensors[where][0, 0, 123, 7] = value
    out, _ = run(tensors["q"], tensors["k"], tensors["v"])
    want = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in tensors.values()))
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())


def test_the_largest_floats():
    """One rounds to infinity in 16 bits, and must not become it."""
    q, k, v = (tensor(1, 1, 100, 64) for _ in range(3))
    v[0, 0, 31, 5] = torch.finfo(torch.float32).max
    out, _ = run(q, k, v)
    want, _ = reference.attention(q, k, v, reference.visible(100, 100))
    column = torch.arange(64, device="cuda") == 5
    for part in (column, ~column):
        assert ((out.double() - want)[..., part].norm() / want[..., part].norm()).item() < LIMITS[Chosen.name]


def test_no_keys_and_no_queries():
    q, k = tensor(2, 2, 50, 64), torch.empty(2, 2, 0, 64, device="cuda")
    out, lse = run(q, k, k)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert run(torch.empty(2, 2, 0, 64, device="cuda"), q, q)[0].numel() == 0


def test_same_bits_every_time():
    q, k, v = (tensor(2, 80, 700, 128) for _ in range(3))
    first = run(q, k, v, causal=1)[0]
    for _ in range(5):
        assert torch.equal(run(q, k, v, causal=1)[0], first)


def test_graph_capture_and_streams():
    q, k, v = (tensor(2, 80, 700, 128) for _ in range(3))
    out = torch.empty_like(q)
    call = Forward(q, k, v, out, kernel=Chosen.name.encode(), causal=1)
    call()
    want = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, want)
    outs = [torch.full_like(q, math.nan) for _ in range(4)]
    calls = [Forward(q, k, v, o, kernel=Chosen.name.encode(), causal=1) for o in outs]
    torch.cuda.synchronize()
    for c in calls:
        with torch.cuda.stream(torch.cuda.Stream()):
            c()
    torch.cuda.synchronize()
    assert all(torch.equal(o, want) for o in outs)


def test_which_kernel_takes_what():
    q, mask = tensor(1, 1, 64, 64), torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda")
    best = "sm90_float32" if torch.cuda.get_device_capability() == (9, 0) else SIMT
    assert Forward(q, q, q, torch.empty_like(q)).chosen() == best
    assert Forward(q, q, q, torch.empty_like(q), mask=mask).chosen() == SIMT
    odd = q[..., :63]
    assert Forward(odd, odd, odd, torch.empty(1, 1, 64, 63, device="cuda")).chosen() == SIMT


@pytest.mark.parametrize("dim", [63, 250])
def test_any_head_size_and_stride(dim):
    if Chosen.name != SIMT:
        pytest.skip("takes steps of 8")
    q, k, v = (torch.randn(2, 3, dim, 150, device="cuda").transpose(2, 3) for _ in range(3))
    out = torch.empty(2, 3, dim, 150, device="cuda").transpose(2, 3)
    seen = reference.visible(150, 150, causal=True)
    assert_right(run(q, k, v, out=out, causal=1), reference.attention(q, k, v, seen))


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("size", [(2, 4, 200, 333), (2, 1, 1, 333), (1, 1, 200, 333), (1, 1, 1, 1)])
@pytest.mark.parametrize("scale", [0.125, -0.3])
def test_masks_and_statistics(kind, size, scale):
    if Chosen.name != SIMT:
        pytest.skip("takes neither")
    q, k, v = tensor(2, 4, 200, 64), tensor(2, 2, 333, 64), tensor(2, 2, 333, 64)
    seen, options, bias = reference.visible(200, 333, causal=True), {}, None
    if kind == "bool":
        options["mask"] = torch.rand(size, device="cuda") < 0.7
        seen = seen & options["mask"]
    elif kind == "float":
        options["mask"] = bias = torch.randn(size, device="cuda")
        bias[..., 0] = -math.inf
    entropy, top = (torch.full(q.shape[:3], math.nan, device="cuda") for _ in range(2))
    got = run(q, k, v, causal=1, scale=scale, entropy=entropy, max_probability=top, **options)
    # A bias of -inf hides, as an unseen key does.
    if bias is not None:
        seen, bias = seen & (bias != -math.inf), bias.clamp(min=-1e30)
    p, want_lse = reference.softmax(q, k, seen, scale, bias)
    assert_right(got, (p @ v.double().repeat_interleave(2, 1), want_lse), 1 + 8 * abs(scale))
    assert (entropy.double() + torch.special.xlogy(p, p).sum(-1)).abs().max() < 1e-4
    assert (top.double() - p.amax(-1)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q: (q.half(), q.half(), q.half(), {}), "float32 only"),
        (lambda q: (q[..., :60], q[..., :60], q[..., :60], {}), "multiples of 8"),
        (lambda q: (q[:, :, :, 1:57], q[..., :56], q[..., :56], {}), "16 bytes"),
        (lambda q: (q, q, q, {"scale": -1.0}), "negative scale"),
    ],
)
def test_declines_with_a_reason(change, reason):
    if Chosen.name == SIMT and "float32" not in reason:
        pytest.skip("takes it")
    q, k, v, options = change(tensor(1, 1, 64, 64))
    with pytest.raises(AdaAttnError, match=reason):
        run(q, k, v, out=torch.empty(*q.shape[:3], v.shape[-1], device="cuda", dtype=q.dtype), **options)

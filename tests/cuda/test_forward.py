"""The CUDA forward kernels against FP64, each by its name, on fresh inputs, with outputs poisoned beforehand."""

from __future__ import annotations

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from binding import AdaAttnError, Forward

import reference

HOPPER = ("sm90_forward", "sm90_few_rows", "sm90_masks")
TO_256 = (*HOPPER, "sm80_forward")
TO_128 = ("sm90_short",)
NAMES = os.environ.get("ADAATTN_TEST_KERNEL")
KERNELS = NAMES.split(",") if NAMES else [*TO_256, *TO_128]
BF16, FP16 = torch.bfloat16, torch.float16

# What exact attention may be wrong by, in units u of the dtype's unit roundoff (2^-8, 2^-11). Probabilities and outputs
# are each rounded once: by at most u, spread evenly, so u / sqrt(3) rms at most, and sqrt(2 / 3) u = 0.82 u together. A
# missing or doubled key is far outside. Heads of few elements average nothing: there each may be off by u.
UNIT = {BF16: 2**-8, FP16: 2**-11}
MANY, FEW = 0.82, 2.02


class Chosen:
    """The kernel of the test that runs."""

    name = KERNELS[0]


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request):
    Chosen.name = request.param


def tensor(*shape: int, dtype: torch.dtype, layout: str = "bhsd") -> torch.Tensor:
    b, h, n, d = shape
    if layout == "bshd":
        return torch.randn(b, n, h, d, device="cuda", dtype=dtype).transpose(1, 2)
    if layout == "packed":  # one of three side by side, as a fused projection leaves it
        return torch.randn(b, n, 3, h, d, device="cuda", dtype=dtype)[:, :, 1].transpose(1, 2)
    return torch.randn(b, h, n, d, device="cuda", dtype=dtype)


def run(q, k, v, *, out=None, **options):
    if Chosen.name in TO_128 and max(q.shape[-1], v.shape[-1]) > 128:
        pytest.skip("made for D of at most 128")
    out = torch.empty(*q.shape[:3], v.shape[-1], device="cuda", dtype=q.dtype) if out is None else out
    out.fill_(math.nan)
    lse = torch.full(q.shape[:3], math.nan, device="cuda")
    Forward(q, k, v, out, lse, kernel=Chosen.name.encode(), **options)()
    torch.cuda.synchronize()
    return out, lse


def assert_right(got, truth, dtype):
    out, lse = got
    want, want_lse = truth
    assert not out.isnan().any(), "unwritten or NaN"
    assert not lse.isnan().any(), "unwritten or NaN"
    norm = want.norm(dim=(-2, -1))
    error = (out.double() - want).norm(dim=(-2, -1)) / torch.where(norm == 0, 1.0, norm)
    limit = UNIT[dtype] * (MANY if want.shape[-2] * want.shape[-1] >= 4096 else FEW)
    assert error.max() <= limit, f"relative error {error.max():.2e} > {limit:.2e}"
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    seen = want_lse != -math.inf
    assert (lse.double() - want_lse)[seen].abs().max().item() < 2e-4 if seen.any() else True
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
    (1, 3, 3, 700, 2100),  # tiles in parts
    (1, 140, 140, 100, 3000),  # the last wave of them
]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mode", ["full", "causal", "bottom_right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(dtype, dim, mode, shape):
    b, hq, hk, nq, nk = shape
    q = tensor(b, hq, nq, dim, dtype=dtype)
    k, v = (tensor(b, hk, nk, dim, dtype=dtype) for _ in range(2))
    bottom = mode == "bottom_right"
    seen = reference.visible(nq, nk, causal=mode != "full", bottom_right=bottom)
    got = run(q, k, v, causal=int(mode != "full"), alignment=int(bottom))
    assert_right(got, reference.attention(q, k, v, seen), dtype)


@pytest.mark.parametrize(
    "dims", [(8, 8), (32, 32), (40, 40), (72, 72), (80, 80), (96, 96), (136, 136), (192, 128), (200, 248)]
)
@pytest.mark.parametrize("causal", [0, 1])
def test_head_sizes(dims, causal):
    q, k, v = (tensor(2, 3, 190, d, dtype=BF16) for d in (dims[0], dims[0], dims[1]))
    seen = reference.visible(190, 190, causal=bool(causal))
    assert_right(run(q, k, v, causal=causal), reference.attention(q, k, v, seen), BF16)


@pytest.mark.parametrize("layout", ["bshd", "packed"])
def test_strides(layout):
    q, k, v = (tensor(2, 4, 300, 64, dtype=BF16, layout=layout) for _ in range(3))
    out = torch.empty(2, 300, 4, 64, device="cuda", dtype=BF16).transpose(1, 2)
    seen = reference.visible(300, 300, causal=True)
    assert_right(run(q, k, v, out=out, causal=1), reference.attention(q, k, v, seen), BF16)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("left", "right", "sinks"), [(0, 0, 0), (100, 0, 0), (64, 37, 0), (300, -1, 4), (130, 0, 140), (-1, 5, 0)]
)
@pytest.mark.parametrize("bottom_right", [0, 1])
def test_windows(dim, left, right, sinks, bottom_right):
    nq, nk = 700, 900
    q = tensor(1, 2, nq, dim, dtype=BF16)
    k, v = (tensor(1, 2, nk, dim, dtype=BF16) for _ in range(2))
    seen = reference.visible(nq, nk, bottom_right=bool(bottom_right), left=left, right=right, sinks=sinks)
    got = run(q, k, v, window_left=left, window_right=right, sinks=sinks, alignment=bottom_right)
    assert_right(got, reference.attention(q, k, v, seen), BF16)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mode", ["full", "causal", "bottom_right"])
def test_key_lengths_hide_even_nan(dim, mode):
    lengths = [0, 1, 63, 128, 500, 600]
    nq, nk = 250, 600
    q = tensor(len(lengths), 2, nq, dim, dtype=BF16)
    k, v = (tensor(len(lengths), 1, nk, dim, dtype=BF16) for _ in range(2))
    bottom = mode == "bottom_right"
    seen = torch.stack(
        [
            reference.visible(nq, nk, causal=mode != "full")
            if not bottom
            else torch.cat(
                [
                    reference.visible(nq, n, causal=True, bottom_right=True),
                    torch.ones(nq, nk - n, dtype=torch.bool, device="cuda"),
                ],
                1,
            )
            for n in lengths
        ]
    )[:, None]
    seen = seen & (torch.arange(nk, device="cuda") < torch.tensor(lengths, device="cuda")[:, None, None, None])
    truth = reference.attention(q, k, v, seen)
    for i, n in enumerate(lengths):
        k[i, :, n:] = math.nan
        v[i, :, n:] = math.nan
    got = run(
        q, k, v, causal=int(mode != "full"), alignment=int(bottom), key_lengths=torch.tensor(lengths, device="cuda")
    )
    assert_right(got, truth, BF16)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-3, 30.0])
def test_scales(scale):
    q, k, v = (tensor(1, 2, 400, 64, dtype=BF16) for _ in range(3))
    seen = reference.visible(400, 400)
    want, want_lse = reference.attention(q, k, v, seen, scale)
    out, lse = run(q, k, v, scale=scale)
    assert ((out.double() - want).norm() / want.norm()).item() <= MANY * UNIT[BF16]
    # Scores of some hundreds carry FP32 rounding of that size into the lse: relative, not absolute.
    assert ((lse.double() - want_lse).abs() / want_lse.abs().clamp(min=1)).max().item() < 1e-5


def test_outliers_do_not_overflow():
    q, k, v = (tensor(1, 2, 600, 128, dtype=FP16) for _ in range(3))
    q[:, :, 5] *= 100
    k[:, :, 300] *= 100
    truth = reference.attention(q, k, v, reference.visible(600, 600))
    out, lse = run(q, k, v)
    assert ((out.double() - truth[0]).norm() / truth[0].norm()).item() <= MANY * UNIT[FP16]
    assert ((lse.double() - truth[1]).abs() / truth[1].abs().clamp(min=1)).max().item() < 1e-5


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("n", [300, 1500])
@pytest.mark.parametrize(
    ("where", "value"), [("q", math.nan), ("k", math.nan), ("v", math.nan), ("k", math.inf), ("v", math.inf)]
)
def test_nan_and_inf_propagate(dim, n, where, value):
    tensors = {name: tensor(1, 1, n, dim, dtype=BF16) for name in "qkv"}
    tensors[where][0, 0, 123, 7] = value
    out, _ = run(tensors["q"], tensors["k"], tensors["v"])
    want = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in tensors.values()))
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())


def grow(q, k, odds: float) -> None:
    """Adds odds, in nats, to every query's scores with the first 100 keys: blocks are visited from the last on, so that
    the largest scores come late. In every third head only: the others' tiles go their usual way."""
    step = math.sqrt(odds * math.sqrt(q.shape[-1]))
    for head in range(0, q.shape[1], 3):
        q[:, head, :, 0] = step
        k[:, head * k.shape[1] // q.shape[1], :100, 0] = step


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("shape", [(2, 6, 6, 700), (1, 160, 4, 1500)])
@pytest.mark.parametrize("odds", [8.0, 30.0, 60.0, 300.0])
def test_largest_scores_come_late(dtype, dim, causal, shape, odds):
    b, hq, hk, n = shape
    q = tensor(b, hq, n, dim, dtype=dtype)
    k, v = (tensor(b, hk, n, dim, dtype=dtype) for _ in range(2))
    grow(q, k, odds)
    truth = reference.attention(q, k, v, reference.visible(n, n, causal=bool(causal)))
    out, lse = run(q, k, v, causal=causal)
    assert_right((out, truth[1]), truth, dtype)
    assert ((lse.double() - truth[1]).abs() / truth[1].abs().clamp(min=1)).max().item() < 1e-5


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("n", [700, 1500])
@pytest.mark.parametrize("columns", [slice(None), slice(3, 4)])
def test_huge_values_with_late_maxima(dim, n, columns):
    """What a probability over 1 would take out of float32's range; also where one thread has the values, another the
    probabilities."""
    q, k, v = (tensor(1, 3, n, dim, dtype=BF16) for _ in range(3))
    grow(q, k, 20.0)
    if columns.stop is not None:  # scores of one key alone: one thread of a row has it
        k[:, :, 1:100, 0] = 0
    v[..., columns] *= 1e35
    truth = reference.attention(q, k, v, reference.visible(n, n))
    assert_right(run(q, k, v), truth, BF16)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("n", [700, 1500])
def test_first_keys_score_nothing(dim, n):
    """Those of the blocks that are visited first: rows have no maximum when they meet the others."""
    q, k, v = (tensor(1, 3, n, dim, dtype=BF16) for _ in range(3))
    q[..., 0] = q[..., 0].abs() + 0.1
    k[:, 1, 200:, 0] = -math.inf
    truth = reference.attention(q, k, v, reference.visible(n, n))
    assert_right(run(q, k, v), truth, BF16)


def test_no_keys_and_no_queries():
    q = tensor(2, 2, 50, 64, dtype=BF16)
    k = torch.empty(2, 2, 0, 64, device="cuda", dtype=BF16)
    out, lse = run(q, k, k)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    empty = torch.empty(2, 2, 0, 64, device="cuda", dtype=BF16)
    assert run(empty, q, q)[0].numel() == 0


@pytest.mark.parametrize("odds", [0.0, 60.0])
def test_same_bits_every_time(odds):
    q, k, v = (tensor(2, 80, 700, 128, dtype=BF16) for _ in range(3))
    grow(q, k, odds)
    first = run(q, k, v, causal=1)[0]
    for _ in range(20):
        assert torch.equal(run(q, k, v, causal=1)[0], first)


def test_graph_capture_and_streams():
    q, k, v = (tensor(2, 80, 700, 128, dtype=BF16) for _ in range(3))
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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q: (q.float(), q.float(), q.float(), {}), "float16 and bfloat16"),
        (lambda q: (q[..., :60], q[..., :60], q[..., :60], {}), "multiples of 8"),
        (lambda q: (q[:, :, :, 1:57], q, q, {}), "16 bytes"),
        (lambda q: (q, q, q, {"scale": -1.0}), "negative scale"),
    ],
)
def test_declines_with_a_reason(change, reason):
    if Chosen.name in ("sm90_masks", "sm80_forward") and "scale" in reason:
        pytest.skip("takes any scale")
    q, k, v, options = change(tensor(1, 1, 64, 64, dtype=BF16))
    if k.shape[-1] != q.shape[-1]:
        k = k[..., : q.shape[-1]]
    with pytest.raises(AdaAttnError, match=reason):
        run(q, k, v, out=torch.empty(*q.shape[:3], v.shape[-1], device="cuda", dtype=q.dtype), **options)

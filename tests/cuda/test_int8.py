"""The 8-bit CUDA forward kernel: against a model of its bytes, and against FP64."""

from __future__ import annotations

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import int8_model
from binding import AdaAttnError, Forward

import reference

BF16, FP16 = torch.bfloat16, torch.float16

# Against the model, which rounds queries and keys alone: powers by products err by 4.8e-3 root mean square,
# probabilities are rounded once more (2^-9 at most), and float16 values to bfloat16 (as much): 5.8e-3 together. Scores
# of small multipliers err by up to 2^-24 of a sum. Then the output is rounded once (0.82 u, see test_forward.py).
UNIT = {BF16: 2**-8, FP16: 2**-11}
POWERS = 8e-3
# Against FP64: rounding to bytes errs by c / (127 sqrt(12)) of the rms, c being the largest value over the rms, 3 of
# one query and 4.5 of 80 or 128 keys: 1.2e-2 together, and powers 0.6e-2. Where few keys are seen nothing averages:
# twice as much.
LIMIT = 2.8e-2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


def tensor(*shape: int, dtype: torch.dtype = BF16, layout: str = "bhsd") -> torch.Tensor:
    b, h, n, d = shape
    if layout == "bshd":
        return torch.randn(b, n, h, d, device="cuda", dtype=dtype).transpose(1, 2)
    if layout == "packed":  # one of three side by side, as a fused projection leaves it
        return torch.randn(b, n, 3, h, d, device="cuda", dtype=dtype)[:, :, 1].transpose(1, 2)
    return torch.randn(b, h, n, d, device="cuda", dtype=dtype)


def run(q, k, v, *, out=None, **options):
    out = torch.empty(*q.shape[:3], v.shape[-1], device="cuda", dtype=q.dtype) if out is None else out
    out.fill_(math.nan)
    lse = torch.full(q.shape[:3], math.nan, device="cuda")
    call = Forward(q, k, v, out, lse, kernel=b"sm90_int8", **options)
    call.workspace.fill_(0xFF)  # floats of it are NaN
    call()
    torch.cuda.synchronize()
    return out, lse


def relative(out, want):
    norm = want.norm(dim=(-2, -1))
    return ((out.double() - want).norm(dim=(-2, -1)) / torch.where(norm == 0, 1.0, norm)).max().item()


def assert_right(got, model, truth=None, limit=LIMIT):
    out, lse = got
    want, want_lse = model
    assert not out.isnan().any(), "unwritten or NaN"
    assert not lse.isnan().any(), "unwritten or NaN"
    few = want.shape[-2] * want.shape[-1] < 4096
    allowed = UNIT[out.dtype] * (2.02 if few else 0.82) + POWERS * (3 if few else 1)
    error = relative(out, want)
    assert error <= allowed, f"off the model by {error:.2e} > {allowed:.2e}"
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    seen = want_lse != -math.inf
    if seen.any():
        # A power errs by at most 1.2e-2, a sum of them by less; scores carry float32 rounding.
        assert ((lse.double() - want_lse)[seen].abs() / want_lse[seen].abs().clamp(min=1)).max().item() < 1.2e-2
    assert (out[~seen] == 0).all()
    if truth is not None:
        assert relative(out, truth[0]) <= limit


SHAPES = [  # b, hq, hk, nq, nk
    (1, 1, 1, 1, 1),
    (2, 3, 3, 64, 64),
    (1, 2, 2, 128, 128),
    (2, 4, 2, 200, 333),
    (1, 6, 2, 513, 129),
    (3, 2, 1, 77, 1000),
    (1, 2, 2, 1024, 1024),
    (2, 80, 80, 257, 300),  # more tiles than multiprocessors
    (1, 8, 1, 1, 4097),
    (1, 1, 1, 300, 1),
    (1, 3, 3, 700, 2100),
    (1, 2, 1, 192, 160),  # whole tiles of queries, and of 80 keys
    (1, 2, 1, 193, 241),  # one more
]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mode", ["full", "causal", "bottom_right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(dtype, dim, mode, shape):
    b, hq, hk, nq, nk = shape
    q = tensor(b, hq, nq, dim, dtype=dtype)
    k, v = (tensor(b, hk, nk, dim, dtype=dtype) for _ in range(2))
    bottom = mode == "bottom_right"
    seen = reference.visible(nq, nk, causal=mode != "full", bottom_right=bottom)
    got = run(q, k, v, causal=int(mode != "full"), alignment=int(bottom))
    assert_right(got, int8_model.attention(q, k, v, seen), reference.attention(q, k, v, seen))


@pytest.mark.parametrize("dims", [(8, 8), (32, 32), (40, 40), (72, 72), (96, 96), (128, 64), (40, 120)])
@pytest.mark.parametrize("causal", [0, 1])
def test_head_sizes(dims, causal):
    q, k, v = (tensor(2, 3, 190, d) for d in (dims[0], dims[0], dims[1]))
    seen = reference.visible(190, 190, causal=bool(causal))
    got = run(q, k, v, causal=causal)
    assert_right(got, int8_model.attention(q, k, v, seen), reference.attention(q, k, v, seen), limit=2 * LIMIT)


@pytest.mark.parametrize("layout", ["bshd", "packed"])
def test_strides(layout):
    q, k, v = (tensor(2, 4, 300, 64, layout=layout) for _ in range(3))
    out = torch.empty(2, 300, 4, 64, device="cuda", dtype=BF16).transpose(1, 2)
    seen = reference.visible(300, 300, causal=True)
    assert_right(run(q, k, v, out=out, causal=1), int8_model.attention(q, k, v, seen))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mode", ["full", "causal", "bottom_right"])
def test_key_lengths_hide_even_nan(dim, mode):
    lengths, nq, nk = [0, 1, 63, 80, 81, 128, 129, 1200, 1300], 250, 1300
    q = tensor(len(lengths), 2, nq, dim)
    k, v = (tensor(len(lengths), 1, nk, dim) for _ in range(2))
    bottom, keys = mode == "bottom_right", torch.arange(nk, device="cuda")
    seen = torch.stack(
        [
            reference.visible(nq, nk, causal=mode != "full") & (keys < n)
            if not bottom
            else (keys <= torch.arange(nq, device="cuda")[:, None] + n - nq) & (keys < n)
            for n in lengths
        ]
    )[:, None]
    model = int8_model.attention(q, k, v, seen, key_lengths=lengths)
    for i, n in enumerate(lengths):
        k[i, :, n:] = math.nan
        v[i, :, n:] = math.nan
    options = {"causal": int(mode != "full"), "alignment": int(bottom)}
    assert_right(run(q, k, v, key_lengths=torch.tensor(lengths, device="cuda"), **options), model)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_scales(scale):
    q, k, v = (tensor(1, 2, 400, 64) for _ in range(3))
    seen = reference.visible(400, 400)
    assert_right(run(q, k, v, scale=scale), int8_model.attention(q, k, v, seen, scale))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", ["normal", "outliers", "bias", "peaky"])
def test_hard_inputs(dim, kind):
    q, k, v = (t[None, None].cuda() for t in int8_model.samples(kind, 2500, dim))
    seen = reference.visible(2500, 2500, causal=True)
    got = run(q, k, v, causal=1)
    assert_right(got, int8_model.attention(q, k, v, seen), reference.attention(q, k, v, seen), limit=6e-2)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("left", "right", "sinks"), [(100, 0, 0), (0, 0, 0), (37, 50, 0), (200, -1, 130), (-1, 5, 0), (300, 0, 4)]
)
@pytest.mark.parametrize("bottom_right", [0, 1])
def test_windows(dim, left, right, sinks, bottom_right):
    q = tensor(1, 2, 700, dim)
    k, v = (tensor(1, 1, 900, dim) for _ in range(2))
    seen = reference.visible(700, 900, left=left, right=right, sinks=sinks, bottom_right=bool(bottom_right))
    got = run(q, k, v, window_left=left, window_right=right, sinks=sinks, alignment=bottom_right)
    assert_right(got, int8_model.attention(q, k, v, seen), reference.attention(q, k, v, seen), limit=2 * LIMIT)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("size", [30, 100, 300])
def test_rows_far_below_their_bound_are_done_again(dtype, dim, size):
    """One long key against which all queries point: by the norms any score could be as high as its is low, by 2^150 to
    2^4000, so that all other powers underflow relative to the bound. Not one of the keys of the mean."""
    nq, nk = 300, 1500
    direction = torch.nn.functional.normalize(torch.randn(dim, device="cuda"), dim=0)
    q = (tensor(1, 2, nq, dim).float() + 3 * math.sqrt(dim) * direction).to(dtype)
    k, v = tensor(1, 2, nk, dim, dtype=dtype), tensor(1, 2, nk, dim, dtype=dtype)
    k[:, :, 701] = (-size * math.sqrt(dim) * direction).to(dtype)
    for causal in (0, 1):
        seen = reference.visible(nq, nk, causal=bool(causal), bottom_right=True)
        assert_right(run(q, k, v, causal=causal, alignment=1), int8_model.attention(q, k, v, seen))


def test_values_as_large_as_their_type_has():
    """Products of powers up to 2^60 with these overflow."""
    q, k, v = (tensor(1, 1, 300, 128) for _ in range(3))
    direction = torch.ones(128, device="cuda", dtype=BF16)
    q, k = q + 2 * direction, k + 2 * direction * torch.rand(300, 1, device="cuda", dtype=BF16)
    v = v.clamp(-3, 3) * 2.0**118
    seen = reference.visible(300, 300)
    want = int8_model.attention(q, k, v * 2.0**-118, seen)
    out, lse = run(q, k, v)
    assert_right((out * 2.0**-118, lse), want)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("first", [True, False])
def test_scores_far_above_those_before(dim, first):
    """The weights' reference moves when a tile is 2^20 above it: tiles are visited from the last to the first."""
    n = 1500
    direction = torch.randn(dim, device="cuda")
    q = (tensor(1, 1, 200, dim).float() * 0.3 + direction).to(BF16)
    k, v = tensor(1, 1, n, dim), tensor(1, 1, n, dim)
    growth = torch.linspace(1, 0, n, device="cuda") if first else torch.linspace(0, 1, n, device="cuda")
    k = (k.float() + 8 * growth[:, None] * direction).to(BF16)
    seen = reference.visible(200, n)
    assert_right(run(q, k, v), int8_model.attention(q, k, v, seen), reference.attention(q, k, v, seen), limit=0.3)


def test_magnitudes():
    q, k, v = (tensor(1, 2, 300, 128) for _ in range(3))
    seen = reference.visible(300, 300)
    want = int8_model.attention(q * 2.0**40, k * 2.0**-40, v * 2.0**20, seen)
    assert_right(run(q * 2.0**40, k * 2.0**-40, v * 2.0**20), want)
    zero = torch.zeros_like(q)
    assert_right(run(zero, zero, v), int8_model.attention(zero, zero, v, seen))
    assert run(q, k, zero)[0].abs().max() < 1e-20


@pytest.mark.parametrize("dim", [64, 128])
def test_nan_reaches_the_rows_that_see_it(dim):
    q, k, v = (tensor(1, 1, 300, dim) for _ in range(3))
    for position, poisoned in ((0, q), (1, k), (2, v)):
        inputs = [q.clone(), k.clone(), v.clone()]
        inputs[position][0, 0, 100, 3] = math.nan if position else math.inf
        out, _ = run(*inputs)
        rows = out[0, 0].isnan().any(-1)
        if position == 0:
            assert rows[100]
            assert rows.sum() == 1
        else:
            assert rows.all(), f"NaN in {poisoned.shape} is not seen"


def test_repeats_bit_for_bit():
    q, k, v = tensor(2, 70, 400, 64), tensor(2, 35, 700, 64), tensor(2, 35, 700, 64)
    first = run(q, k, v, causal=1, alignment=1)
    second = run(q, k, v, causal=1, alignment=1)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_never_chosen_and_what_it_refuses():
    q, k, v = (tensor(1, 1, 2048, 128) for _ in range(3))
    for error in (0.0, 0.5):
        assert "int8" not in Forward(q, k, v, torch.empty_like(q), error=error).chosen()
    for options, reason in (
        ({"scale": -1.0}, "negative scale"),
        ({"mask": torch.ones(1, 1, 2048, 2048, dtype=torch.bool, device="cuda")}, "mask"),
        ({"entropy": torch.empty(1, 1, 2048, device="cuda")}, "entropy"),
    ):
        with pytest.raises(AdaAttnError, match=reason):
            run(q, k, v, **options)
    wide = tensor(1, 1, 64, 136)
    with pytest.raises(AdaAttnError, match="at most 128"):
        run(wide, wide, wide)

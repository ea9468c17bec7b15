"""Mask tensors and row statistics on CUDA, against FP64."""

from __future__ import annotations

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from binding import Forward

import reference

BF16, FP16 = torch.bfloat16, torch.float16
UNIT = {BF16: 2**-8, FP16: 2**-11}  # limits as in test_forward.py
MANY, FEW = 0.82, 2.02


KERNELS = ("sm90_masks", "sm80_forward")


class Chosen:
    """The kernel of the test that runs."""

    name = KERNELS[0]


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request):
    Chosen.name = request.param


def tensor(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def run(q, k, v, **options):
    """out, lse, entropy and max_probability."""
    out = torch.full((*q.shape[:3], v.shape[-1]), math.nan, device="cuda", dtype=q.dtype)
    lse, entropy, top = (torch.full(q.shape[:3], math.nan, device="cuda") for _ in range(3))
    Forward(q, k, v, out, lse, entropy=entropy, max_probability=top, kernel=Chosen.name.encode(), **options)()
    torch.cuda.synchronize()
    return out, lse, entropy, top


def assert_right(got, q, k, v, seen, scale=None, bias=None):
    out, lse, entropy, top = got
    p, want_lse = reference.softmax(q, k, seen, scale, bias)
    want = p @ v.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    assert not any(t.isnan().any() for t in got), "unwritten or NaN"
    norm = want.norm(dim=(-2, -1))
    error = (out.double() - want).norm(dim=(-2, -1)) / torch.where(norm == 0, 1.0, norm)
    limit = UNIT[q.dtype] * (MANY if want.shape[-2] * want.shape[-1] >= 4096 else FEW)
    assert error.max() <= limit, f"relative error {error.max():.2e} > {limit:.2e}"
    alive = want_lse != -math.inf
    assert torch.equal(lse != -math.inf, alive)
    assert (out[~alive] == 0).all()
    assert (entropy[~alive] == 0).all()
    assert (top[~alive] == 0).all()
    # Sums of D products in float32 are off by a few 2^-22 of the largest score, some tens here, and the power of two by
    # 2^-22: below 1e-4 relative in each probability, in its logarithm, and in a mean of those.
    scale_of_lse = want_lse[alive].abs().clamp(min=1)
    assert ((lse.double() - want_lse)[alive].abs() / scale_of_lse).max() < 1e-4 if alive.any() else True
    want_entropy = -torch.special.xlogy(p, p).sum(-1)
    assert (entropy.double() - want_entropy).abs().max() < 2e-4
    assert (top.double() - p.amax(-1)).abs().max() < 1e-4


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="chosen on Hopper")
def test_hopper_prefers_its_own():
    q, mask = tensor(1, 1, 64, 64), torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda")
    assert Forward(q, q, q, torch.empty_like(q), mask=mask).chosen() == "sm90_masks"


SHAPES = [  # b, hq, hk, nq, nk
    (1, 1, 1, 1, 1),
    (2, 4, 2, 200, 333),
    (1, 6, 2, 513, 129),
    (2, 8, 2, 1, 5000),  # in parts
    (1, 71, 1, 2, 700),
    (2, 60, 60, 300, 300),  # more tiles than multiprocessors
]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(dim, causal, shape):
    b, hq, hk, nq, nk = shape
    q, k, v = tensor(b, hq, nq, dim), tensor(b, hk, nk, dim), tensor(b, hk, nk, dim)
    seen = reference.visible(nq, nk, causal=bool(causal))
    assert_right(run(q, k, v, causal=causal), q, k, v, seen)


@pytest.mark.parametrize("kind", ["bool", "float32", "own"])
@pytest.mark.parametrize("sizes", ["full", "keys", "head", "query", "one"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("shape", SHAPES)
def test_masks(kind, sizes, dtype, shape):
    b, hq, hk, nq, nk = shape
    q, k, v = (tensor(*s, 64, dtype=dtype) for s in ((b, hq, nq), (b, hk, nk), (b, hk, nk)))
    of = {
        "full": (b, hq, nq, nk),
        "keys": (b, 1, 1, nk),
        "head": (1, hq, 1, nk),
        "query": (1, 1, nq, nk),
        "one": (1,) * 4,
    }
    size = of[sizes]
    everything = torch.ones(nq, nk, dtype=torch.bool, device="cuda")
    if kind == "bool":
        mask = torch.rand(size, device="cuda") < 0.7
        mask[..., 0, :] = False  # a row, or all, that sees nothing
        assert_right(run(q, k, v, mask=mask), q, k, v, mask.expand(b, hq, nq, nk))
        return
    mask = torch.randn(size, device="cuda", dtype=torch.float32 if kind == "float32" else dtype)
    mask[torch.rand(size, device="cuda") < 0.2] = -math.inf
    assert_right(run(q, k, v, mask=mask), q, k, v, everything, bias=mask)


def test_masks_join_causal_lengths_and_windows():
    lengths = [0, 70, 400]
    q, k, v = tensor(3, 4, 130, 128), tensor(3, 2, 400, 128), tensor(3, 2, 400, 128)
    mask = torch.rand(3, 1, 130, 400, device="cuda") < 0.6
    seen = torch.zeros(3, 1, 130, 400, dtype=torch.bool, device="cuda")
    for i, n in enumerate(lengths):
        seen[i, 0, :, :n] = reference.visible(130, n, causal=True, left=50, sinks=3)
    got = run(q, k, v, mask=mask, causal=1, window_left=50, sinks=3, key_lengths=torch.tensor(lengths, device="cuda"))
    assert_right(got, q, k, v, seen & mask)


def test_strided_masks():
    q, k, v = tensor(2, 3, 100, 64), tensor(2, 3, 150, 64), tensor(2, 3, 150, 64)
    mask = torch.rand(150, 100, 3, 2, device="cuda").permute(3, 2, 1, 0) < 0.5
    assert mask.stride(3) != 1
    assert_right(run(q, k, v, mask=mask), q, k, v, mask)


def test_the_lowest_number_is_not_minus_infinity():
    q, k, v = tensor(1, 2, 70, 64), tensor(1, 2, 90, 64), tensor(1, 2, 90, 64)
    mask = torch.full((1, 1, 70, 90), torch.finfo(torch.float32).min, device="cuda")
    out, _, _, _ = run(q, k, v, mask=mask)
    # Such terms drown the scores: all keys count the same.
    want = v.double().mean(2, keepdim=True).expand(1, 2, 70, 64)
    assert ((out.double() - want).norm() / want.norm()).item() <= MANY * UNIT[BF16]


def test_what_a_mask_hides_may_be_nan():
    q, k, v = tensor(1, 1, 70, 64), tensor(1, 1, 90, 64), tensor(1, 1, 90, 64)
    mask = torch.ones(1, 1, 1, 90, dtype=torch.bool, device="cuda")
    mask[..., 40] = False
    clean = run(q, k, v, mask=mask)
    k[:, :, 40] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(run(q, k, v, mask=mask), clean, strict=True))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales(scale):
    q, k, v = tensor(1, 2, 100, 64), tensor(1, 2, 150, 64), tensor(1, 2, 150, 64)
    assert_right(run(q, k, v, scale=scale), q, k, v, reference.visible(100, 150), scale)

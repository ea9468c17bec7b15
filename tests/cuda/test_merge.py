"""Merging partial results on CUDA, against attention over all keys."""

from __future__ import annotations

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from binding import AdaAttnError, merge


def parts_of(count: int, dtype: torch.dtype, shape=(2, 3, 17, 40)):
    outs = [torch.randn(shape, device="cuda").to(dtype) for _ in range(count)]
    lses = [torch.randn(shape[:3], device="cuda") * 3 for _ in range(count)]
    return outs, lses


def truth(outs, lses):
    stacked = torch.stack([lse.double() for lse in lses])
    lse = torch.logsumexp(stacked, 0)
    weights = torch.where(stacked == -math.inf, 0.0, torch.exp(stacked - lse))
    values = torch.stack([out.double() for out in outs])
    values = torch.where((stacked == -math.inf)[..., None], 0.0, values)
    return (weights[..., None] * values).sum(0), lse


# float32 sums of at most 32 terms, then one rounding.
LIMIT = {torch.float32: 4e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("count", [1, 2, 7, 32])
@pytest.mark.parametrize("dim", [8, 40, 128, 256])
def test_against_fp64(dtype, count, dim):
    outs, lses = parts_of(count, dtype, (2, 3, 17, dim))
    lses[0][:, :, 3] = -math.inf
    outs[0][:, :, 3] = math.nan  # of no keys: does not count
    for lse in lses:
        lse[:, :, 5] = -math.inf
    out, lse = torch.full_like(outs[0], math.nan), torch.full_like(lses[0], math.nan)
    merge(outs, lses, out, lse)
    want, want_lse = truth(outs, lses)
    assert (out.double() - want).norm() / want.norm() < LIMIT[dtype]
    assert (out[:, :, 5] == 0).all()
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    alive = want_lse != -math.inf
    assert (lse.double() - want_lse)[alive].abs().max() < 1e-5


def test_in_place_and_strided():
    outs, lses = parts_of(3, torch.bfloat16)
    outs[1] = outs[1].transpose(1, 2).contiguous().transpose(1, 2)
    outs[2] = outs[2].transpose(2, 3).contiguous().transpose(2, 3)
    want, want_lse = truth(outs, lses)
    merge(outs, lses, outs[1], lses[2])
    assert (outs[1].double() - want).norm() / want.norm() < LIMIT[torch.bfloat16]
    assert (lses[2].double() - want_lse).abs().max() < 1e-5


def test_nan_propagates():
    outs, lses = parts_of(2, torch.float32)
    lses[1][0, 0, 0] = math.nan
    outs[0][0, 0, 1, 3] = math.nan
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    merge(outs, lses, out, lse)
    assert out[0, 0, 0].isnan().all()
    assert lse[0, 0, 0].isnan()
    assert out[0, 0, 1, 3].isnan()
    assert out.isnan().sum() == 41
    assert lse.isnan().sum() == 1


def test_refuses_more_than_32():
    outs, lses = parts_of(33, torch.float32, (1, 1, 1, 8))
    with pytest.raises(AdaAttnError, match="count is 33, on cuda at most 32"):
        merge(outs, lses, outs[0])

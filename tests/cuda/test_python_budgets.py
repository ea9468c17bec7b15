"""Budgets through the Python package on CUDA tensors: metrics, plans, the policy, the hook, graphs and gradients."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("made for compute capability 9.0", allow_module_level=True)

import adaattn
from made_heads import heads

NAME = "sm90_adaptive"
ERROR = 3e-2


def inputs(batch: int = 12) -> tuple[torch.Tensor, ...]:
    """Heads that lose blocks, enough of them for a look at each to pay, without a mask."""
    return tuple(x.repeat(batch, 1, 1, 1) for x in heads("near", 8192, 64, torch.bfloat16))


def error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Largest of a head against the exact kernels, whose own error is 3e-3."""
    want = adaattn.attention(q, k, v).float()
    return ((out.float() - want).norm(dim=(-2, -1)) / want.norm(dim=(-2, -1))).max().item()


def test_metrics():
    q, k, v = inputs()
    out, lse, metrics = adaattn.attention(q, k, v, error=ERROR, return_lse=True, return_metrics=True)
    assert metrics.kernel == NAME
    assert metrics.form in ("tiled", "mixed")  # a head may have missed and run again densely
    assert metrics.compute_precision == "bfloat16"
    assert metrics.entropy is None
    assert f"within error={ERROR:g} reports entropy" in metrics.fallback
    assert metrics.seconds is None
    assert 0 < metrics.work < 0.9
    found = metrics.heads
    assert found.forms.shape == (12, 4)
    assert (found.estimated_limit <= ERROR).all()
    assert (found.high_tiles + found.dropped_tiles == found.tiles).all()
    assert (found.dropped_tiles > 0).mean() > 0.5
    assert json.loads(metrics.to_json())["heads"]["forms"] == found.forms.tolist()
    assert error(out, q, k, v) <= ERROR + 3e-3
    silent, silent_lse = adaattn.attention(q, k, v, error=ERROR, return_lse=True)
    assert torch.equal(silent, out)
    assert torch.equal(silent_lse, lse)


def test_metrics_of_exact_calls():
    q, k, v = (x[:, :, :200] for x in inputs(1))
    _, metrics = adaattn.attention(q, k, v, error=ERROR, return_metrics=True)
    assert metrics.kernel != NAME
    assert f"error={ERROR:g} is met exactly: {NAME}: " in metrics.fallback
    assert metrics.entropy is not None
    assert metrics.heads.plan.precision[0, 0] == "bfloat16"
    _, metrics = adaattn.attention(*inputs(), key_lengths=[4000] * 12, error=ERROR, return_metrics=True)
    assert metrics.kernel != NAME
    assert "key lengths" in metrics.fallback


def test_plans():
    q, k, v = inputs()
    out, metrics = adaattn.attention(q, k, v, error=ERROR, return_metrics=True)
    again = adaattn.attention(q, k, v, error=ERROR, plan=metrics.heads.plan)
    tiled = torch.from_numpy(
        metrics.heads.plan.form == "tiled"
    ).cuda()  # heads given as dense take blocks in another order
    assert tiled.any()
    assert torch.equal(again[tiled], out[tiled])
    words = metrics.heads.plan.records(12, 4)
    words["form"] = 0
    _, dense = adaattn.attention(q, k, v, error=ERROR, plan=adaattn.Plan.from_records(words), return_metrics=True)
    assert dense.kernel != NAME
    assert dense.form == "dense"
    assert "all dense" in dense.fallback
    words["form"], words["rank"] = 2, 64
    _, exact = adaattn.attention(q, k, v, error=ERROR, plan=adaattn.Plan.from_records(words), return_metrics=True)
    assert exact.kernel != NAME
    assert "low-rank" in exact.fallback


def test_policy():
    policy = adaattn.Policy()
    q, k, v = inputs()
    for _ in range(7):
        out = policy.attention("layer", q, k, v, error=ERROR)
        assert error(out, q, k, v) <= ERROR + 3e-3
    policy.attention("layer", q[:, :, :64], k[:, :, :64], v[:, :, :64], error=ERROR)  # exact
    found = policy.statistics()
    assert (found.calls, found.heads) == (7, 7 * 48)
    assert found.dense < found.heads // 2
    assert found.work < 0.9
    plan = policy.plan("layer", 8192)
    assert (plan.form == "tiled").any()
    assert (plan.screen <= 0).all()
    assert np.isneginf(plan.low).all()
    assert (plan.drop == 0).all()


def test_hook():
    q, k, v = inputs()
    attend = torch.nn.functional.scaled_dot_product_attention
    with adaattn.enabled(error=ERROR):
        adaattn.hook_statistics(reset=True)
        out = attend(q, k, v)
        exact = attend(q[:, :, :64], k[:, :, :64], v[:, :, :64])
        assert adaattn.hook_statistics().taken == 2
    assert torch.equal(out, adaattn.attention(q, k, v, error=ERROR))
    assert not torch.equal(out, adaattn.attention(q, k, v)), "the budget was not used"
    assert torch.equal(exact, adaattn.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64]))


def test_graphs():
    """A call that reports nothing waits for nothing, so that it can be captured; one that does is refused."""
    q, k, v = inputs()
    want = adaattn.attention(q, k, v, error=ERROR)
    adaattn.attention(q, k, v, error=ERROR, return_metrics=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = adaattn.attention(q, k, v, error=ERROR)
        with pytest.raises(NotImplementedError, match="captur"):
            adaattn.attention(q, k, v, error=ERROR, return_metrics=True)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


@pytest.mark.parametrize("backward", ["exact", "consistent"])
def test_gradients_are_exact(backward):
    q, k, v = (x[:, :, :4096].requires_grad_() for x in inputs(1))
    options = {"error": ERROR, "backward": backward}
    _, metrics = adaattn.attention(q, k, v, return_metrics=True, **options)
    assert "calls that record a gradient run exact" in metrics.fallback
    out, exact = adaattn.attention(q, k, v, **options), adaattn.attention(q, k, v)
    got = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert torch.equal(out, exact)
    # The order of sums is not fixed: float32 sums of terms of one size, rounded to bfloat16.
    for a, b in zip(got, torch.autograd.grad(exact, (q, k, v), torch.ones_like(exact)), strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()

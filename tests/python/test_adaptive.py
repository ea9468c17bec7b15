"""Calls with an error budget: what they return, what they report, and where they stay exact."""

import json

import adaattn
import numpy as np
import pytest

TOKENS, DIM = 4128, 32


def local_heads(rng, dtype=np.float32):
    """q, k, v (1, 2, N, D) whose scores are large near the diagonal alone."""
    place = np.arange(TOKENS)[:, None] * 0.005 * (np.arange(DIM // 2) + 1)
    falling = 4 * 0.85 ** np.arange(DIM // 2)[:, None]  # what few dimensions can hold
    turning = (falling * np.stack([np.cos(place), np.sin(place)], -1)).reshape(1, 1, TOKENS, DIM)
    q, k = (turning + 0.3 * rng.standard_normal((1, 2, TOKENS, DIM)) for _ in range(2))
    return q.astype(dtype), k.astype(dtype), rng.standard_normal((1, 2, TOKENS, DIM)).astype(dtype)


def error_by_head(out, exact):
    difference = np.linalg.norm((out - exact).astype(np.float64), axis=(-2, -1))
    return difference / np.linalg.norm(exact.astype(np.float64), axis=(-2, -1))


@pytest.mark.parametrize("error", [0.1, 0.01])
def test_budget_is_kept_and_reported(rng, error):
    q, k, v = local_heads(rng)
    exact = adaattn.attention(q, k, v, is_causal=True)
    out, metrics = adaattn.attention(q, k, v, is_causal=True, error=error, return_metrics=True, kernel="cpu_adaptive")
    assert (error_by_head(out, exact) <= error).all()
    assert (error_by_head(out, exact) > 0).all()
    assert metrics.kernel == "cpu_adaptive"
    assert metrics.error_budget == error
    assert metrics.fallback is None
    assert (metrics.heads.estimated_error <= metrics.heads.estimated_limit).all()
    assert (metrics.heads.estimated_limit <= error).all()
    assert ((metrics.heads.tiles > 0) == (metrics.heads.forms == "tiled")).all()
    if error == 0.1:  # what is cheapest at tighter budgets depends on the machine
        assert (metrics.heads.work < 1).all()
    assert (metrics.heads.escalations >= 0).all()
    parsed = json.loads(metrics.to_json())
    assert parsed == metrics.to_dict()
    assert parsed["heads"]["forms"] == metrics.heads.forms.tolist()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_masses_are_reported(rng, library):
    arrays = local_heads(rng)
    if library == "torch":
        torch = pytest.importorskip("torch")
        arrays = [torch.from_numpy(array) for array in arrays]
    form, exact_products = np.array([["tiled"] * 2]), np.array([["float32"] * 2])
    plan = adaattn.Plan(
        form=form, precision=exact_products, low_precision=exact_products, pooled=np.zeros((1, 2), bool),
        rank=np.zeros((1, 2), np.int32), screen=np.array([[-3, -np.inf]], np.float32),
        low=np.full((1, 2), -np.inf, np.float32), drop=np.array([[0, 0.05]], np.float32),
    )  # fmt: skip
    call = {"is_causal": True, "error": 10.0, "plan": plan, "kernel": "cpu_adaptive", "return_metrics": True}
    out, metrics = adaattn.attention(*arrays, **call)
    heads, exact = metrics.heads, adaattn.attention(*arrays, is_causal=True)
    assert heads.omitted_mass[0, 0] > 0 == heads.omitted_mass[0, 1]
    assert heads.summarised_mass[0, 1] > 0 == heads.summarised_mass[0, 0]
    # Nothing is dropped of the second head, and float32 rounds by less than 1e-5, but one panel in eight tells the
    # error: 16 of them, whose squares scatter by half of their mean.
    errors = error_by_head(np.asarray(out), np.asarray(exact))
    assert heads.accounted_error[0, 1] == pytest.approx(errors[0, 1], rel=0.2)
    assert 0 < heads.accounted_error[0, 0] < 1
    _, metrics = adaattn.attention(*arrays, is_causal=True, return_metrics=True)
    for name in ("omitted_mass", "summarised_mass", "accounted_error"):
        assert (getattr(metrics.heads, name) == 0).all(), "exact heads account for everything"


def test_zero_budget_is_the_exact_kernel_bit_for_bit(rng):
    q, k, v = local_heads(rng)
    np.testing.assert_array_equal(
        adaattn.attention(q, k, v, is_causal=True, error=0),
        adaattn.attention(q, k, v, is_causal=True, kernel="cpu_flash"),
    )


def test_permuting_heads_permutes_results(rng):
    q, k, v = local_heads(rng)
    k *= np.array([1, 1.5], np.float32)[:, None, None]  # heads that differ
    out = adaattn.attention(q, k, v, error=0.05, kernel="cpu_adaptive")
    swapped = adaattn.attention(q[:, ::-1], k[:, ::-1], v[:, ::-1], error=0.05, kernel="cpu_adaptive")
    np.testing.assert_array_equal(swapped, out[:, ::-1])


def test_masks_and_windows_stay_exact_and_say_so(rng):
    q, k, v = local_heads(rng)
    for options in ({"attn_mask": np.ones((TOKENS, TOKENS), bool)}, {"window": (100, 0)}):
        out, metrics = adaattn.attention(q, k, v, error=0.1, return_metrics=True, **options)
        np.testing.assert_array_equal(out, adaattn.attention(q, k, v, **options))
        assert "error=0.1 is met exactly: cpu_adaptive: takes no" in metrics.fallback
        assert metrics.form == "dense"


def test_the_table_takes_it_from_where_it_pays(rng):
    def chosen(tokens):
        q, k, v = rng.standard_normal((3, 1, 1, tokens, 8), dtype=np.float32)
        return adaattn.attention(q, k, v, error=0.1, return_metrics=True)[1]

    assert "takes 64 tokens or more" in chosen(50).fallback
    assert "fewer than 4,096 tokens" in chosen(512).fallback
    assert chosen(4096).kernel == "cpu_adaptive"


def test_a_mixed_form_is_named(rng):
    q, k, v = local_heads(rng)
    forms, exact = np.array([["tiled", "dense"]]), np.full((1, 2), "float32")
    zeros, never = np.zeros((1, 2), np.float32), np.full((1, 2), -np.inf, np.float32)
    screen = np.array([[-3, -np.inf]], np.float32)
    plan = adaattn.Plan(forms, exact, exact, zeros > 0, zeros.astype(int), screen, never, zeros)
    _, metrics = adaattn.attention(q, k, v, error=0.5, is_causal=True, plan=plan, return_metrics=True)
    assert metrics.form == "mixed"
    assert metrics.heads.forms.tolist() == forms.tolist()
    assert (metrics.heads.dropped_tiles > 0).tolist() == [[True, False]]
    assert metrics.heads.estimated_error[0, 1] == 0


class TestTorch:
    torch = pytest.importorskip("torch")

    def inputs(self, rng):
        return [self.torch.from_numpy(array) for array in local_heads(rng)]

    def test_same_as_numpy(self, rng):
        q, k, v = self.inputs(rng)
        options = {"error": 0.05, "kernel": "cpu_adaptive"}
        out, metrics = adaattn.attention(q, k, v, return_metrics=True, **options)
        assert metrics.kernel == "cpu_adaptive"
        np.testing.assert_array_equal(out, adaattn.attention(q.numpy(), k.numpy(), v.numpy(), **options))

    def test_calls_that_record_a_gradient_are_exact(self, rng):
        q, k, v = self.inputs(rng)
        q.requires_grad_()
        out, metrics = adaattn.attention(q, k, v, error=0.1, return_metrics=True)
        assert self.torch.equal(out, adaattn.attention(q, k, v))
        assert "record a gradient" in metrics.fallback
        assert metrics.error_budget == 0.1
        with self.torch.no_grad():
            _, metrics = adaattn.attention(q, k, v, error=0.1, return_metrics=True, kernel="cpu_adaptive")
        assert metrics.fallback is None

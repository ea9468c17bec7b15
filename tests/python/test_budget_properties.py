"""Properties of calls within a budget, on heads of several kinds and seeds."""

import adaattn
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TOKENS, DIM = 2048, 32  # the adaptive kernel takes 1,024 and more
BUDGETS = (1e-1, 3e-2, 1e-2, 3e-3)
KERNEL = "cpu_adaptive"
# What float32 arithmetic alone makes of these heads is about 3e-7 (see adaattn._tolerance); ten times that.
ROUNDING = 3e-6

few_examples = settings(max_examples=5)


def turning(strength):
    """(N, D): its products with itself are large near the diagonal alone."""
    angle = np.arange(TOKENS)[:, None] * 0.002 * (np.arange(DIM // 2) + 1)
    return strength * np.stack([np.cos(angle), np.sin(angle)], -1).reshape(TOKENS, DIM)


def diffuse_head(rng):
    return tuple(rng.standard_normal((3, TOKENS, DIM)))


def local_head(rng):
    q, k, v = diffuse_head(rng)
    return turning(2) + 0.3 * q, turning(2) + 0.3 * k, v


def sink_head(rng):
    q, k, v = local_head(rng)
    direction = rng.standard_normal(DIM)
    direction *= 5 / np.linalg.norm(direction)
    k[:4] += direction
    v[:4] *= 0.05
    return q + direction, k, v


def constant_head(rng):
    q, k, v = diffuse_head(rng)
    return q, np.broadcast_to(k[:1], k.shape), v


KINDS = {"diffuse": diffuse_head, "local": local_head, "sink": sink_head, "constant": constant_head}


def heads(kinds, seed):
    """q, k, v (1, H, N, D) float32, one head of each kind."""
    rng = np.random.default_rng(seed)
    made = [KINDS[kind](rng) for kind in kinds]
    return tuple(np.stack([head[part] for head in made]).astype(np.float32)[None] for part in range(3))


kinds_of_heads = st.lists(st.sampled_from(list(KINDS)), min_size=2, max_size=4)
seeds = st.integers(0, 2**32 - 1)


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64), axis=(-2, -1))


def dense(q, k, v, *, is_causal=False):
    """(out, lse) in FP64, faster than adaattn.reference."""
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if is_causal:
        scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights / total @ v.astype(np.float64), (top + np.log(total))[..., 0]


@given(kinds_of_heads, seeds, st.sampled_from(BUDGETS), st.booleans(), st.randoms(use_true_random=False))
@few_examples
def test_permuting_heads_permutes_results_and_reports(kinds, seed, error, is_causal, random):
    """Two query heads read each key head; both they and the key heads change places."""
    q, k, v = heads(kinds, seed)
    q = np.concatenate([q, q[:, :, ::-1]], 1).reshape(1, 2, -1, TOKENS, DIM).swapaxes(1, 2).reshape(1, -1, TOKENS, DIM)
    order = list(range(len(kinds)))
    random.shuffle(order)
    query_order = [2 * head + member for head in order for member in random.sample((0, 1), 2)]
    options = {"error": error, "is_causal": is_causal, "enable_gqa": True, "kernel": KERNEL}
    out, lse, metrics = adaattn.attention(q, k, v, return_lse=True, return_metrics=True, **options)
    permuted, permuted_lse, permuted_metrics = adaattn.attention(
        q[:, query_order], k[:, order], v[:, order], return_lse=True, return_metrics=True, **options
    )
    np.testing.assert_array_equal(permuted, out[:, query_order])
    np.testing.assert_array_equal(permuted_lse, lse[:, query_order])
    for name in ("forms", "work", "estimated_error", "escalations", "dropped_tiles"):
        got, want = getattr(permuted_metrics.heads, name), getattr(metrics.heads, name)
        np.testing.assert_array_equal(got, want[:, query_order], err_msg=name)


@given(kinds_of_heads, seeds, st.booleans(), st.sampled_from([None, 0.0, 0.3]))
@few_examples
def test_zero_budget_is_the_exact_kernel_bit_for_bit(kinds, seed, is_causal, scale):
    q, k, v = heads(kinds, seed)
    options = {"is_causal": is_causal, "scale": scale}
    out, lse, metrics = adaattn.attention(q, k, v, error=0, return_lse=True, return_metrics=True, **options)
    exact, exact_lse = adaattn.attention(q, k, v, return_lse=True, kernel="cpu_flash", **options)
    np.testing.assert_array_equal(out, exact)
    np.testing.assert_array_equal(lse, exact_lse)
    assert metrics.form == "dense"


@given(kinds_of_heads, seeds, st.booleans())
@few_examples
def test_a_budget_that_allows_nothing_is_the_exact_kernel_bit_for_bit(kinds, seed, is_causal):
    q, k, v = heads(kinds, seed)
    out, metrics = adaattn.attention(q, k, v, error=1e-12, is_causal=is_causal, return_metrics=True, kernel=KERNEL)
    dense_heads = metrics.heads.forms[0] == "dense"
    exact = adaattn.attention(q, k, v, is_causal=is_causal)
    np.testing.assert_array_equal(out[:, dense_heads], exact[:, dense_heads])
    # A head whose other forms are as exact may keep one (equal keys: every tile's mean is its output).
    assert (norm(out - exact)[0, ~dense_heads] <= ROUNDING * norm(exact)[0, ~dense_heads]).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_tighter_budgets_never_raise_the_error_class(kind, is_causal):
    """The class of a call is how many of the budgets down to its own the error exceeds: none. What is beyond, such as a
    head that runs densely and so far better than asked, is left to the engine."""
    q, k, v = heads([kind] * 3, 1)
    truth, _ = dense(q, k, v, is_causal=is_causal)
    for budget in BUDGETS:
        out, metrics = adaattn.attention(q, k, v, error=budget, is_causal=is_causal, kernel=KERNEL, return_metrics=True)
        errors = (norm(out - truth) / norm(truth))[0]
        assert (errors <= budget).all(), f"{errors} at {budget}"
        assert (metrics.heads.estimated_error <= budget).all()


@given(kinds_of_heads, seeds, st.sampled_from(BUDGETS), st.sampled_from([1024, TOKENS // 2]))
@few_examples
def test_merged_parts_within_a_budget_stay_within_the_stated_bound(kinds, seed, error, cut):
    """The bound that `adaattn.merge` states, from the true errors of the parts and of their LSE."""
    q, k, v = heads(kinds, seed)
    parts = [slice(0, cut), slice(cut, TOKENS)]
    options = {"error": error, "return_lse": True, "kernel": KERNEL}
    found = [adaattn.attention(q, k[:, :, p], v[:, :, p], **options) for p in parts]
    true = [dense(q, k[:, :, p], v[:, :, p]) for p in parts]
    merged, _ = adaattn.merge([out for out, _ in found], [lse for _, lse in found])
    whole, _ = dense(q, k, v)
    lse_error = np.max([np.abs(lse - want) for (_, lse), (_, want) in zip(found, true, strict=True)], 0)
    distance = np.linalg.norm(true[0][0] - true[1][0], axis=-1)
    errors = [norm(out - want) for (out, _), (want, _) in zip(found, true, strict=True)]
    bound = np.linalg.norm(errors, axis=0) + np.linalg.norm(np.tanh(lse_error / 2) * distance, axis=-1)
    assert (norm(merged - whole) <= bound + ROUNDING * norm(whole)).all()
    assert (errors <= error * np.array([norm(want) for want, _ in true])).all()


UNIT_ROUNDOFF = {np.float32: 0.0, np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8}


@given(
    st.integers(1024, 1300),
    st.integers(1024, 1300),
    st.sampled_from([(24, 80), (80, 24), (33, 1), (128, 64)]),
    st.sampled_from(list(UNIT_ROUNDOFF)),
    st.sampled_from(BUDGETS),
    st.booleans(),
    seeds,
)
@settings(max_examples=12)
def test_odd_shapes_and_dtypes_keep_the_budget(nq, nk, dims, dtype, error, is_causal, seed):
    """Lengths that no tile divides, queries and keys of different number, values of another size."""
    rng = np.random.default_rng(seed)
    dim, value_dim = dims
    angle = np.arange(max(nq, nk))[:, None] * 0.004 * (1 + np.arange(dim))
    turning = 12 / np.sqrt(dim) * np.sin(angle + np.arange(dim) % 2 * np.pi / 2)
    q = (turning[:nq] + 0.3 * rng.standard_normal((2, nq, dim)))[None].astype(dtype)
    k = (turning[:nk] + 0.3 * rng.standard_normal((2, nk, dim)))[None].astype(dtype)
    v = rng.standard_normal((1, 2, nk, value_dim)).astype(dtype)
    out = adaattn.attention(q, k, v, error=error, is_causal=is_causal, kernel=KERNEL)
    truth, _ = dense(q, k, v, is_causal=is_causal)
    # The budget is for the output before it is rounded to its dtype.
    limit = np.hypot(error, UNIT_ROUNDOFF[dtype]) + ROUNDING
    assert (norm(out.astype(np.float64) - truth) <= limit * norm(truth)).all()


class TestWhatBudgetsLeaveAlone:
    """Heads and sequences that no form suits: exact, and named."""

    def test_heads_with_nan_run_densely_and_others_are_not_touched(self):
        q, k, v = heads(["local"] * 3, 2)
        clean = adaattn.attention(q, k, v, error=0.05, kernel=KERNEL)
        k[0, 1, 700, 3] = np.nan
        v[0, 2, 5, 0] = np.inf
        out, metrics = adaattn.attention(q, k, v, error=0.05, return_metrics=True, kernel=KERNEL)
        assert metrics.heads.work[0, 0] < metrics.heads.work[0, 1:].min()
        assert (metrics.heads.estimated_error[0, 1:] == 0).all()
        np.testing.assert_array_equal(out[:, :1], clean[:, :1])
        np.testing.assert_array_equal(out[:, 1:], adaattn.attention(q, k, v)[:, 1:])
        assert np.isnan(out[0, 1]).all()
        assert not np.isfinite(out[0, 2, :, 0]).any()

    @pytest.mark.parametrize("tokens", [1, 63, 512])
    def test_short_sequences_are_exact_and_say_so(self, rng, tokens):
        q, k, v = rng.standard_normal((3, 1, 2, tokens, DIM), dtype=np.float32)
        out, metrics = adaattn.attention(q, k, v, error=0.1, return_metrics=True)
        np.testing.assert_array_equal(out, adaattn.attention(q, k, v))
        assert metrics.form == "dense"
        assert "error=0.1 is met exactly: cpu_adaptive: " in metrics.fallback

    def test_values_of_zero_give_zero(self):
        q, k, v = heads(["local", "diffuse"], 3)
        assert not adaattn.attention(q, k, 0 * v, error=0.1, kernel=KERNEL).any()

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_sizes_of_values_do_not_matter(self, size):
        q, k, v = heads(["local", "sink", "diffuse"], 4)
        truth, _ = dense(q, k, v * np.float32(size))
        out = adaattn.attention(q, k, v * np.float32(size), error=0.01, kernel=KERNEL)
        assert (norm(out - truth) <= 0.01 * norm(truth)).all()

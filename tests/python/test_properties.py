"""Properties of attention on random problems: any shapes, strides, dtypes and options, on every kernel."""

import adaattn
import ml_dtypes
import numpy as np
from adaattn import _numpy_calls, _options
from hypothesis import given
from hypothesis import strategies as st
from truth import assert_backward, assert_forward, backward_kernels, dense, kernels_for

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@st.composite
def strided(draw, shape, dtype, rng):
    """An array of that shape with an order of dimensions, gaps and directions of its own."""
    order = draw(st.permutations(range(4)))
    steps = draw(st.tuples(*[st.sampled_from([1, 1, 2, -1])] * 4))
    memory = rng.standard_normal([shape[axis] * abs(steps[axis]) for axis in order], dtype=np.float32)
    view = memory.astype(DTYPES[dtype]).transpose(np.argsort(order))
    return view[tuple(slice(None, None, step) for step in steps)]


@st.composite
def problems(draw, *, options=True, largest=40):
    """(q, k, v, dout, options) of one call."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(list(DTYPES)))
    b, hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    nq = draw(st.integers(1, largest))
    nk = draw(st.integers(0, largest))
    d, dv = (draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 64, 80, 128]))) for _ in range(2))
    q = draw(strided((b, hk * group, nq, d), dtype, rng))
    k = draw(strided((b, hk, nk, d), dtype, rng))
    v = draw(strided((b, hk, nk, dv), dtype, rng))
    dout = draw(strided((b, hk * group, nq, dv), dtype, rng))
    chosen = {}
    if options:
        chosen["alignment"] = draw(st.sampled_from(["top_left", "bottom_right"]))
        chosen["scale"] = draw(st.sampled_from([None, 0.0, -0.5, 1.0]))
        limit = st.one_of(st.none(), st.integers(0, largest))
        if draw(st.booleans()):
            chosen["window"] = (draw(limit), draw(limit))
            chosen["sinks"] = draw(st.integers(0, 5))
        if draw(st.booleans()):
            chosen["key_lengths"] = draw(st.lists(st.integers(0, nk), min_size=b, max_size=b))
        kind = draw(st.sampled_from(["none", "causal", "bool", "float32", "own"]))
        chosen |= mask_option(draw, kind, rng, (b, hk * group, nq, nk), dtype)
    return q, k, v, dout, dtype, chosen


def mask_option(draw, kind, rng, full, dtype):
    if kind == "none":
        return {}
    if kind == "causal":
        return {"is_causal": True}
    shape = [size if draw(st.booleans()) else 1 for size in full]
    shape = shape[draw(st.integers(0, 3)) :]
    if kind == "bool":
        return {"attn_mask": rng.random(shape) < 0.6}
    mask = rng.standard_normal(shape, dtype=np.float32)
    mask = np.where(rng.random(shape) < 0.2, np.float32(-np.inf), mask)
    return {"attn_mask": mask.astype(np.float32 if kind == "float32" else DTYPES[dtype])}


def truth_of(q, k, v, options):
    options = dict(options)
    if "attn_mask" in options:
        mask = np.asarray(options["attn_mask"])
        if mask.dtype != bool:
            mask = mask.astype(np.float64)
        options["attn_mask"] = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return dense(q, k, v, **options)


@given(problems())
def test_forward_is_the_truth(problem):
    q, k, v, _, dtype, options = problem
    truth = truth_of(q, k, v, options)
    for kernel in kernels_for(q, k, v, **options):
        out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, kernel=kernel, **options)
        assert_forward(out, lse, truth, dtype, kernel)


@given(problems())
def test_backward_is_the_truth(problem):
    q, k, v, dout, dtype, options = problem
    truth = truth_of(q, k, v, options)
    out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, **options)
    every = {"is_causal": False, "scale": None, "alignment": "top_left", "window": None, "sinks": 0, **options}
    mask, lengths = every.pop("attn_mask", None), every.pop("key_lengths", None)
    for kernel in backward_kernels():
        checked = _options.make_options(0.0, **every, kernel=kernel)
        gradients = _numpy_calls.backward(q, k, v, mask, lengths, out, lse, dout, checked)
        assert_backward(gradients, truth, dout, dtype, kernel)


@given(problems(), st.data())
def test_merged_key_splits_are_the_whole(problem, data):
    """Masked by a bool mask only: windows and lengths count from the start of all keys."""
    q, k, v, _, dtype, _ = problem
    nk = k.shape[2]
    cuts = sorted(data.draw(st.lists(st.integers(0, nk), max_size=3)))
    shown = np.random.default_rng(0).random((q.shape[2], nk)) < 0.7
    parts = [
        adaattn.attention(q, k[:, :, a:b], v[:, :, a:b], attn_mask=shown[:, a:b], enable_gqa=True, return_lse=True)
        for a, b in zip([0, *cuts], [*cuts, nk], strict=True)
    ]
    out, lse = adaattn.merge([part for part, _ in parts], [part_lse for _, part_lse in parts])
    assert_forward(out, lse, truth_of(q, k, v, {"attn_mask": shown}), dtype)


@given(problems(options=False), st.randoms(use_true_random=False))
def test_permuting_heads_permutes_results(problem, random):
    q, k, v, _, _, _ = problem
    group = q.shape[1] // k.shape[1]
    order = list(range(k.shape[1]))
    random.shuffle(order)
    query_order = [head * group + member for head in order for member in range(group)]
    for kernel in kernels_for(q, k, v):
        out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, kernel=kernel)
        permuted = adaattn.attention(
            q[:, query_order], k[:, order], v[:, order], enable_gqa=True, return_lse=True, kernel=kernel
        )
        # Not one bit may depend on where a head stands.
        np.testing.assert_array_equal(permuted[0].astype(np.float32), out[:, query_order].astype(np.float32))
        np.testing.assert_array_equal(permuted[1], lse[:, query_order])


@given(problems(options=False))
def test_grouped_heads_are_repeated_heads(problem):
    q, k, v, _, dtype, _ = problem
    group = q.shape[1] // k.shape[1]
    for kernel in kernels_for(q, k, v):
        grouped = adaattn.attention(q, k, v, enable_gqa=True, kernel=kernel)
        assert_forward(grouped, None, dense(q, k.repeat(group, 1), v.repeat(group, 1)), dtype, kernel)


@given(problems(), st.data())
def test_nan_and_infinity_spread_as_in_the_definition(problem, data):
    q, k, v, _, dtype, options = problem
    arrays = [np.array(x) for x in (q, k, v)]
    for _ in range(data.draw(st.integers(1, 2))):
        array = arrays[data.draw(st.integers(0, 2))]
        if array.size:
            where = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
            array[where] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    truth = truth_of(*arrays, options)
    for kernel in kernels_for(*arrays, **options):
        out = adaattn.attention(*arrays, enable_gqa=True, kernel=kernel, **options)
        assert_forward(out, None, truth, dtype, kernel)


@given(problems())
def test_statistics_are_those_of_the_softmax(problem):
    q, k, v, _, _, options = problem
    truth = truth_of(q, k, v, options)
    for kernel in kernels_for(q, k, v, return_metrics=True, **options):
        _, metrics = adaattn.attention(q, k, v, enable_gqa=True, return_metrics=True, kernel=kernel, **options)
        # The relative error of a probability is at most 1e-5 (see _tolerance.py with scores of size below 4 from up to
        # 128 dimensions); entropy weighs it by log(p), at most log(40) plus the spread of the scores, below 30.
        np.testing.assert_allclose(metrics.entropy, truth.entropy.mean(-1), rtol=0, atol=3e-4)
        largest = truth.probabilities.max(-1, initial=0.0).mean(-1)
        np.testing.assert_allclose(metrics.max_probability, largest, rtol=0, atol=3e-5)

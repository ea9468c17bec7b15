"""Attention in dense FP64 NumPy, written from the definition and apart from the library, and comparison with it."""

from __future__ import annotations

from dataclasses import dataclass

import adaattn
import numpy as np
from adaattn._tolerance import backward_tolerance, forward_tolerance, lse_tolerance


@dataclass
class Dense:
    """One problem, with everything that a comparison needs."""

    out: np.ndarray
    lse: np.ndarray
    probabilities: np.ndarray  # [b, hq, nq, nk]
    scores: np.ndarray  # [b, hq, nq, nk], -inf where hidden
    keys: np.ndarray  # k with repeated heads
    values: np.ndarray
    queries: np.ndarray
    scale: float
    group: int

    @property
    def entropy(self):
        p = self.probabilities
        return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), -1)


def visible(nq, nk, *, is_causal=False, window=None, sinks=0, alignment="top_left", key_lengths=None, batch=1):
    """[batch, nq, nk] bools, from the words of the documentation."""
    result = np.zeros((batch, nq, nk), bool)
    for b in range(batch):
        length = nk if key_lengths is None else int(key_lengths[b])
        for i in range(nq):
            diagonal = i + (length - nq if alignment == "bottom_right" else 0)
            for j in range(length):
                left, right = (None if x in (None, -1) else x for x in window or (None, None))
                in_window = (left is None or j >= diagonal - left) and (right is None or j <= diagonal + right)
                is_sink = j < sinks and left is not None and j < diagonal - left
                sees = in_window or is_sink
                # Nothing after the diagonal, or the window's right end, is shown by being a sink.
                if is_causal and j > diagonal:
                    sees = False
                if right is not None and j > diagonal + right:
                    sees = False
                result[b, i, j] = sees
    return result


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def dense(q, k, v, *, attn_mask=None, scale=None, enable_gqa=True, **visibility):
    """The truth for any inputs that convert to float64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // max(k.shape[1], 1)
    keys, values = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    seen = visible(q.shape[2], k.shape[2], batch=q.shape[0], **visibility)[:, None]
    scores = scale * (q @ np.swapaxes(keys, -1, -2))
    if attn_mask is not None:
        mask = np.asarray(attn_mask)
        if mask.dtype == bool:
            seen = seen & mask
        else:
            scores = scores + mask.astype(np.float64)
            seen = seen & (mask != -np.inf)  # hides whatever the key holds
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.where(scores == -np.inf, 0.0, np.exp(scores - top))
    total = weights.sum(-1, keepdims=True)
    probabilities = np.where(total == 0, 0.0, weights / total)
    lse = np.where(total == 0, -np.inf, top + np.log(total))[..., 0]
    hidden_values = probabilities[..., None] * values[:, :, None]
    out = np.where(probabilities[..., None] == 0, 0.0, hidden_values).sum(-2)
    return Dense(out, lse, probabilities, scores, keys, values, q, scale, group)


def dense_backward(d: Dense, dout):
    """((dq, dk, dv), sizes): gradients, and the Frobenius norms per head of the terms they are sums of.

    dS = P (dP - delta) cancels, down to exactly 0 for a row with one key; errors are relative to |P| (|dP| + |delta|).
    """
    dout = np.asarray(dout).astype(np.float64)
    p = d.probabilities
    dp = dout @ np.swapaxes(d.values, -1, -2)
    delta = (p * dp).sum(-1, keepdims=True)

    def pull(ds, dv_terms, queries, keys):
        dq = d.scale * (ds @ keys)
        dk = d.scale * (np.swapaxes(ds, -1, -2) @ queries)
        dv = np.swapaxes(p, -1, -2) @ dv_terms
        b, hq = dq.shape[:2]
        return dq, *(x.reshape(b, hq // d.group, d.group, *x.shape[2:]).sum(2) for x in (dk, dv))

    gradients = pull(p * (dp - delta), dout, d.queries, d.keys)
    absolute = pull(p * (np.abs(dp) + np.abs(delta)), np.abs(dout), np.abs(d.queries), np.abs(d.keys))
    return gradients, tuple(np.linalg.norm(x, axis=(-2, -1)) for x in absolute)


def to_float64(value):
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    return value.detach().cpu().double().numpy()


def score_size(d: Dense):
    """Size of the partial sums of a score, where it counts: terms of random sign add up to their 2-norm. The finished
    score is rounded once more when a mask is added or the maximum subtracted."""
    counts = d.probabilities > 1e-30
    if not counts.any():
        return 1.0
    terms = abs(d.scale) * np.sqrt((d.queries**2) @ np.swapaxes(d.keys**2, -1, -2))
    return float((terms + np.abs(np.where(counts, d.scores, 0.0)) / np.sqrt(d.queries.shape[3]))[counts].max())


@np.errstate(invalid="ignore")
def assert_forward(out, lse, d: Dense, dtype, note=""):
    """out and lse against the truth, head by head; NaN and infinities must be where the truth has them."""
    out = to_float64(out)
    assert out.shape == d.out.shape, note
    finite = np.isfinite(d.out)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(d.out), err_msg=note)
    np.testing.assert_array_equal(out[np.isinf(d.out)], d.out[np.isinf(d.out)], err_msg=note)
    size = score_size(d)
    dim, keys = d.queries.shape[3], d.keys.shape[2]
    # Outputs are weighted means of values; where they cancel, the error is still that of the values' size.
    magnitude = np.abs(np.where(np.isfinite(d.values), d.values, 0.0))
    scale = np.linalg.norm(np.where(np.isfinite(d.probabilities), d.probabilities, 0.0) @ magnitude, axis=(-2, -1))
    error = np.linalg.norm(np.where(finite, out, 0.0) - np.where(finite, d.out, 0.0), axis=(-2, -1))
    tolerance = forward_tolerance(dtype, dim, keys, size) * scale + smallest(dtype) * np.sqrt(out[0, 0].size + 1)
    assert (error <= tolerance).all(), f"{note}: error {error.max()} over tolerance {tolerance.min()}"
    if lse is None:
        return
    lse = to_float64(lse)
    seen = np.isfinite(d.lse)
    np.testing.assert_array_equal(lse[~seen], d.lse[~seen], err_msg=note)
    if seen.any():
        bound = lse_tolerance(dim, keys, float(np.abs(d.lse[seen]).max()), size)
        np.testing.assert_allclose(lse[seen], d.lse[seen], rtol=0, atol=bound, err_msg=note)


def smallest(dtype):
    """Half the distance between subnormal numbers: the absolute error of rounding values near 0."""
    return {"float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}[dtype]


def assert_backward(gradients, d: Dense, dout, dtype, note=""):
    truths, sizes = dense_backward(d, dout)
    rows = max(d.queries.shape[2] * d.group, d.keys.shape[2])
    tolerance = backward_tolerance(dtype, d.queries.shape[3], rows, score_size(d))
    for name, gradient, truth, size in zip(("dq", "dk", "dv"), gradients, truths, sizes, strict=True):
        error = np.linalg.norm(to_float64(gradient) - truth, axis=(-2, -1))
        floor = smallest(dtype) * np.sqrt(truth[0, 0].size + 1) if truth.size else 0.0
        assert (error <= tolerance * size + floor).all(), f"{note} {name}: {error.max()} over {tolerance * size}"


def kernels_for(q, k, v, **options):
    """Names of the forward kernels that take a call of attention."""
    options.pop("key_lengths", None)  # no kernel declines them
    facts = adaattn.describe(q, k, v, enable_gqa=True, **options)
    return [
        kernel["name"]
        for kernel in facts["kernels"]
        if kernel["takes_device"] and not kernel["unavailable"] and not kernel["declines"]
    ]


def backward_kernels(device="cpu"):
    """Names of the backward kernels that this machine can run on the inputs alone."""
    needs_plans = {"cpu_tiled"}
    return [
        kernel["name"]
        for kernel in adaattn.describe()["kernels"]
        if kernel["operation"] == "backward"
        and kernel["device"] == device
        and not kernel["unavailable"]
        and kernel["name"] not in needs_plans
    ]

"""adaattn.measure against FP64 NumPy, and the spectra against known ones."""

from __future__ import annotations

import json

import adaattn
import numpy as np
import pytest
from adaattn import spectra
from adaattn.measurement import STATISTICS
from truth import dense

ALL_ROWS = 4096
UNIT = 2.0**-24

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "alignment": "bottom_right"},
    "window": {"window": (20, 3), "sinks": 2},
    "scale": {"scale": -0.4},
    "key lengths": {"key_lengths": [60, 0]},
}


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def problem(rng, nq=90, nk=75, d=32, dv=24, dtype=np.float32):
    """4 query heads on 2 key heads; keys have a mean to take away."""
    k = normal(rng, 2, 2, nk, d) + 0.7
    return normal(rng, 2, 4, nq, d, dtype=dtype), k.astype(dtype), normal(rng, 2, 2, nk, dv, dtype=dtype)


def row_mean(values, seen):
    return np.divide(np.where(seen, values, 0).sum(-1), seen.sum(-1), out=np.full(seen.shape[:2], np.nan),
                     where=seen.any(-1))  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_against_numpy(rng, name, dtype):
    """Scores of size s are rounded to about D * UNIT * s in float32; s stays below 40 here. Each probability is off by
    that much in relative terms, entropy by that times its largest log, under 10; sums of 256 terms add 256 units."""
    options = CASES[name]
    q, k, v = problem(rng, dtype=dtype)
    got = adaattn.measure(q, k, v, enable_gqa=True, sample_rows=ALL_ROWS, **options)
    truth = dense(q, k, v, **options)
    seen = np.isfinite(truth.lse)
    tolerance = 10 * (32 * 40 + 256) * UNIT
    np.testing.assert_array_equal(got.sampled_rows, seen.sum(-1))
    np.testing.assert_allclose(got.entropy, row_mean(truth.entropy, seen), atol=tolerance)
    np.testing.assert_allclose(got.max_probability, row_mean(truth.probabilities.max(-1), seen), atol=tolerance)
    visible = np.isfinite(truth.scores)
    scores = np.ma.masked_array(truth.scores, ~visible)
    deviation = row_mean(np.ma.filled(scores.std(-1), 0), seen)
    np.testing.assert_allclose(got.score_deviation, deviation, rtol=1e-4, atol=tolerance)
    spread = row_mean(np.ma.filled(scores.max(-1) - scores.min(-1), 0), seen)
    np.testing.assert_allclose(got.score_range, spread, atol=tolerance)
    norm = np.sqrt(row_mean((truth.out**2).sum(-1), seen))
    np.testing.assert_allclose(got.output_norm, norm, rtol=tolerance)
    squares = norm**2 / np.nansum(norm**2, -1, keepdims=True).clip(1e-300)
    np.testing.assert_allclose(got.importance[seen.any((1, 2))], squares[seen.any((1, 2))], rtol=4 * tolerance)


@pytest.mark.parametrize("name", CASES)
def test_spectra_against_numpy_svd(rng, name):
    """Both come from matrices A A^T with errors of at most 300 units of ||A||^2 (sums of 256 float32 products, and
    those in float64), and by Weyl their eigenvalues move by no more: singular values by sqrt(300 units) ||A|| where
    they are 0, and by 300 units ||A||^2 / (2 sigma) elsewhere. The scores' rounding, 32 * 40 units, comes on top."""
    options = CASES[name]
    q, k, v = problem(rng)
    got = adaattn.measure(q, k, v, enable_gqa=True, sample_rows=ALL_ROWS, **options)
    truth = dense(q, k, v, **options)
    lengths = options.get("key_lengths", [k.shape[2]] * 2)
    for b, h in np.ndindex(2, 4):
        keys = k[b, h // 2, : lengths[b]].astype(np.float64)
        centred = keys - keys.mean(0) if len(keys) else keys
        product = truth.scale * q[b, h].astype(np.float64) @ centred.T
        for spectrum, matrix in ((got.scores, product), (got.softmax, truth.probabilities[b, h])):
            values = np.linalg.svd(matrix, compute_uv=False)
            found = spectrum.singular_values[b, h]
            padded = np.zeros(len(found))
            padded[: len(values)] = values[: len(found)]
            norm = np.linalg.norm(matrix)
            units = (300 + 32 * 40) * UNIT
            moved = np.minimum(np.sqrt(units) * norm, units * norm**2 / np.maximum(padded, 1e-300))
            assert (np.abs(found - padded) <= moved).all()
            assert spectrum.energy[b, h] == pytest.approx(norm**2, rel=2 * units)
            assert spectrum.residual[b, h] == 0


def test_known_spectra():
    """diag(2^0, 2^-1, ...): energies 4^-i, of which 75 %, 93.75 %, 98.4 % and 99.6 % are in the first one to four."""
    values = np.broadcast_to(2.0 ** -np.arange(12), (1, 3, 12))
    s = spectra.spectrum(values, (values**2).sum(-1), np.zeros((1, 3)))
    assert (s.rank_90 == 2).all()
    assert (s.rank_95 == 3).all()
    assert (s.rank_99 == 4).all()
    weights = values[0, 0] / values[0, 0].sum()
    np.testing.assert_allclose(s.entropy_rank, np.exp(-(weights * np.log(weights)).sum()))
    np.testing.assert_array_equal(s.spectral_norm, 1)
    power = np.broadcast_to(np.arange(1, 400.0) ** -1.5, (1, 1, 399))
    np.testing.assert_allclose(spectra.spectrum(power, (power**2).sum(-1), np.zeros((1, 1))).decay, 1.5)
    flat = np.ones((1, 1, 100))
    s = spectra.spectrum(flat, (flat**2).sum(-1), np.zeros((1, 1)))
    assert (s.rank_90.item(), s.rank_95.item(), s.rank_99.item()) == (90, 95, 99)
    assert s.entropy_rank.item() == pytest.approx(100)


def test_spectra_of_nothing_and_of_nan():
    zero = spectra.spectrum(np.zeros((1, 2, 5)), np.zeros((1, 2)), np.zeros((1, 2)))
    assert (zero.rank_95 == 0).all()
    assert (zero.entropy_rank == 0).all()
    assert np.isnan(zero.decay).all()
    lost = spectra.spectrum(np.full((1, 1, 5), np.nan), np.ones((1, 1)), np.zeros((1, 1)))
    assert lost.rank_95.item() == -1
    assert np.isnan([lost.energy, lost.entropy_rank, lost.residual]).all()
    left_out = spectra.spectrum(np.ones((1, 1, 5)), np.full((1, 1), 20.0), np.ones((1, 1)))
    assert left_out.rank_90.item() == 6


def low_rank_heads(rng, n=400, d=64, clusters=6, noise=0.05):
    """Keys in a few clusters, so that the softmax has about that many singular values that matter."""
    centres = 3 * normal(rng, clusters, d)
    k = centres[rng.integers(clusters, size=n)] + noise * normal(rng, n, d)
    q = 2 * centres[rng.integers(clusters, size=n)] / 3 + 0.3 * normal(rng, n, d)
    return q.astype(np.float32)[None, None], k.astype(np.float32)[None, None]


@pytest.mark.parametrize("power", [0, 1, 3])
def test_sketch(rng, power):
    """Singular values of Q^T A never exceed those of A (interlacing), and lie below them by at most the norm of what Q
    leaves out; equation 4.3's bound on that norm holds, and is not above ten times Gaussian test vectors' norms."""
    q, k = low_rank_heads(rng)
    exact = adaattn.measure(q, k, statistics="softmax", sample_rows=ALL_ROWS).softmax
    sketched = adaattn.measure(q, k, statistics="softmax", sample_rows=ALL_ROWS, sketch=20, power_iterations=power)
    s = sketched.softmax
    want, got = exact.singular_values[0, 0], s.singular_values[0, 0]
    assert got.shape == (20,)
    rounding = 1e-5 * want[0]
    assert (got <= want[:20] + rounding).all()
    left_out = s.residual[0, 0]
    assert left_out >= want[20] - rounding  # no basis of 20 leaves less than the 21st singular value
    assert ((want[:20] - got) <= left_out + rounding).all()
    # ||(I - QQ^T) A w|| is at most its Frobenius norm times |w| of 400 entries, about 20; 30 is beyond 10 deviations.
    rest = np.sqrt(np.maximum(exact.energy[0, 0] - (got**2).sum(), rounding**2))
    assert left_out <= 10 * np.sqrt(2 / np.pi) * 30 * rest
    assert s.energy[0, 0] == pytest.approx(exact.energy[0, 0], rel=1e-6)
    assert s.rank_90.item() == exact.rank_90.item()
    np.testing.assert_allclose(got[:3], want[:3], rtol=0.02 if power == 0 else 1e-3)


def test_a_sketch_of_a_low_rank_matrix_leaves_rounding(rng):
    """Keys in 6 places: the softmax has rank 6 exactly, and 20 columns leave what float32 rounding puts there, 1e-5."""
    q, k = low_rank_heads(rng, noise=0)
    exact = adaattn.measure(q, k, statistics="softmax", sample_rows=ALL_ROWS).softmax
    s = adaattn.measure(q, k, statistics="softmax", sample_rows=ALL_ROWS, sketch=20).softmax
    largest = exact.spectral_norm[0, 0]
    np.testing.assert_allclose(s.singular_values[0, 0, :6], exact.singular_values[0, 0, :6], rtol=1e-4)
    assert (s.singular_values[0, 0, 6:] < 1e-3 * largest).all()  # roots of rounding
    assert s.residual[0, 0] < 8 * 30 * 1e-5 * largest
    assert s.rank_99.item() == exact.rank_99.item() <= 6


def test_sampled_rows_estimate_the_whole(rng):
    """256 of 2,000 rows of one distribution: means are off by a few standard errors at most, 1 / 16 of a row's
    deviation each; the energy's spread is that of a row's sum of squares."""
    q, k, v = normal(rng, 1, 2, 2000, 32), normal(rng, 1, 2, 500, 32), normal(rng, 1, 2, 500, 8)
    some = adaattn.measure(q, k, v, sample_rows=256)
    every = adaattn.measure(q, k, v, sample_rows=ALL_ROWS)
    assert (some.sampled_rows == 256).all()
    assert (every.sampled_rows == 2000).all()
    np.testing.assert_allclose(some.entropy, every.entropy, rtol=0.02)
    np.testing.assert_allclose(some.output_norm, every.output_norm, rtol=0.1)
    np.testing.assert_allclose(some.softmax.energy, every.softmax.energy, rtol=0.1)
    np.testing.assert_allclose(some.softmax.spectral_norm, every.softmax.spectral_norm, rtol=0.05)
    np.testing.assert_array_equal(some.scores.rank_95, every.scores.rank_95)


def test_seeds(rng):
    q, k, v = normal(rng, 1, 2, 500, 16), normal(rng, 1, 2, 500, 16), normal(rng, 1, 2, 500, 8)
    one, same, other = (adaattn.measure(q, k, v, sample_rows=20, sketch=5, seed=seed) for seed in (1, 1, 2))
    assert one.to_dict() == same.to_dict()
    assert (one.entropy != other.entropy).all()
    assert (one.softmax.singular_values != other.softmax.singular_values).any()


def test_work(rng):
    """N = 256, D = 64, 64 rows, not causal, against 2 N^2 D for dense attention."""
    q, k, v = normal(rng, 1, 2, 256, 64), normal(rng, 1, 1, 256, 64), normal(rng, 1, 1, 256, 64)
    work = adaattn.measure(q, k, v, enable_gqa=True, sample_rows=64).work
    total = 2 * 256**2 * 64
    np.testing.assert_allclose(work["rows"], 64 * 256 * 64 / total)
    np.testing.assert_allclose(work["output"], 64 * 256 * 64 / total)
    np.testing.assert_allclose(work["softmax"], 64 * 65 / 2 * 256 / total)
    np.testing.assert_allclose(work["scores"], ((256 + 128) * 64 * 65 / 2 + 128 * 64) / total)
    np.testing.assert_allclose(work["range"], 3 * 64 * (256 + 128 + 128) / total)
    causal = adaattn.measure(q, k, v, enable_gqa=True, sample_rows=64, statistics="rows", is_causal=True).work
    assert (causal["rows"] <= work["rows"] * 2 * 257 / 256).all()
    assert (causal["softmax"] == 0).all()


def test_only_what_was_asked_for(rng):
    q, k, v = problem(rng)
    for name in STATISTICS:
        got = adaattn.measure(q, k, v, enable_gqa=True, statistics=[name])
        assert np.isnan(got.largest_q).all() == (name != "range")
        assert np.isnan(got.entropy).all() == (name in ("range", "scores"))
        assert np.isnan(got.importance).all() == (name != "output")
        assert (got.scores is None) == (name != "scores")
        assert (got.softmax is None) == (name != "softmax")
        json.dumps(got.to_dict())
    without_values = adaattn.measure(q, k, enable_gqa=True)
    assert np.isnan(without_values.output_norm).all()
    assert np.isnan(without_values.largest_v).all()
    assert without_values.softmax is not None


def test_torch(rng):
    torch = pytest.importorskip("torch")
    q, k, v = problem(rng)
    want = adaattn.measure(q, k, v, enable_gqa=True, is_causal=True, key_lengths=[70, 20])
    tensors = [torch.from_numpy(x).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    tensors[0].requires_grad_()
    got = adaattn.measure(*tensors, enable_gqa=True, is_causal=True, key_lengths=torch.tensor([70, 20]))
    assert got.to_dict() == want.to_dict()
    half = adaattn.measure(*(x.to(torch.bfloat16) for x in tensors), enable_gqa=True)
    np.testing.assert_allclose(half.entropy, adaattn.measure(q, k, v, enable_gqa=True).entropy, rtol=0.01)
    masked = adaattn.measure(q, k, v, enable_gqa=True, attn_mask=np.tri(90, 75, dtype=bool))
    np.testing.assert_allclose(masked.entropy, adaattn.measure(q, k, v, enable_gqa=True, is_causal=True).entropy)
    with pytest.raises(NotImplementedError, match="measure takes cpu tensors only, q is on meta"):
        adaattn.measure(*(x.to("meta") for x in tensors), enable_gqa=True)


def test_nan_and_infinity_stay_in_their_head(rng):
    q, k, v = normal(rng, 1, 4, 40, 8), normal(rng, 1, 4, 30, 8), normal(rng, 1, 4, 30, 8)
    k[0, 1, 3, 2] = np.nan
    q[0, 2, 5, 1] = np.inf
    v[0, 3, 4, 0] = np.inf
    got = adaattn.measure(q, k, v)
    np.testing.assert_array_equal(np.isnan(got.entropy)[0], [False, True, True, False])
    np.testing.assert_array_equal(got.scores.rank_95[0] == -1, [False, True, True, False])
    np.testing.assert_array_equal(got.softmax.rank_95[0] == -1, [False, True, True, False])
    assert np.isnan(got.largest_k[0, 1])
    assert got.largest_q[0, 2] == np.inf
    assert not np.isfinite(got.output_norm[0, 3])


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (1, 0, 5, 4), (1, 2, 0, 4)])
def test_empty(shape):
    q = np.zeros(shape, np.float32)
    got = adaattn.measure(q, q, q)
    assert got.entropy.shape == shape[:2]
    assert np.isnan(got.entropy).all()


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"statistics": ["entropy"]}, ValueError, "statistics has 'entropy', must be some of range, rows"),
        ({"statistics": []}, ValueError, "statistics is empty"),
        ({"v": None, "statistics": "output"}, ValueError, "needs v"),
        ({"sample_rows": 0}, ValueError, "sample_rows is 0, must be in 1..4096"),
        ({"sample_rows": 5000}, ValueError, "sample_rows is 5000"),
        ({"sample_rows": 2.5}, TypeError, "sample_rows is 2.5"),
        ({"sketch": 2000}, ValueError, "sketch is 2000, must be in 0..1024"),
        ({"power_iterations": 20}, ValueError, "power_iterations is 20"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": "a"}, TypeError, "seed is 'a'"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"is_causal": True, "attn_mask": np.ones((5, 5), bool)}, ValueError, "is_causal and attn_mask are both set"),
        ({"k": np.zeros((1, 1, 5, 4), np.float32)}, ValueError, "enable_gqa"),
        ({"q": [1]}, TypeError, "q is of type list"),
    ],
)
def test_bad_arguments(keywords, error, message):
    x = np.zeros((1, 2, 5, 4), np.float32)
    with pytest.raises(error, match=message):
        adaattn.measure(**{"q": x, "k": x, "v": x, **keywords})

"""adaattn.attention, merge, reference and describe on NumPy arrays."""

import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import adaattn
import numpy as np
import pytest
from adaattn import _arrays, _library, _numpy_calls, _options
from truth import (
    assert_backward,
    assert_forward,
    backward_kernels,
    dense,
    dense_backward,
    kernels_for,
)

VARIANTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal bottom right": {"is_causal": True, "alignment": "bottom_right"},
    "scale": {"scale": -0.7},
    "window": {"window": (3, 2)},
    "window to the left with sinks": {"window": (4, None), "sinks": 2, "is_causal": True},
    "window to the right": {"window": (None, 1), "alignment": "bottom_right"},
    "window of one": {"window": [0, 0]},
    "no limits": {"window": (-1, None), "sinks": 5},
    "sinks only matter in a window": {"sinks": 100},
    "key lengths": {"key_lengths": [3, 0]},
    "key lengths, bottom right": {"key_lengths": (9, 2), "is_causal": True, "alignment": "bottom_right"},
}


def problem(rng, b=2, hq=4, hk=2, nq=7, nk=9, d=8, dv=5, dtype="float32"):
    make = lambda *shape: rng.standard_normal(shape, dtype=np.float32).astype(as_dtype(dtype))  # noqa: E731
    return make(b, hq, nq, d), make(b, hk, nk, d), make(b, hk, nk, dv)


def as_dtype(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_meets_the_truth(rng, variant, dtype):
    q, k, v = problem(rng, dtype=dtype)
    options = VARIANTS[variant]
    truth = dense(q, k, v, **options)
    for kernel in kernels_for(q, k, v, **options):
        out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, kernel=kernel, **options)
        assert out.dtype == q.dtype
        assert lse.dtype == np.float32
        assert_forward(out, lse, truth, dtype, f"{kernel}, {variant}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_is_the_definition(rng, variant):
    q, k, v = problem(rng)
    options = VARIANTS[variant]
    truth = dense(q, k, v, **options)
    out, lse = adaattn.reference(q, k, v, enable_gqa=True, **options)
    assert out.dtype == lse.dtype == np.float64
    # Both are FP64: a few dozen roundings of 1e-16 each, on values of order 1.
    np.testing.assert_allclose(out, truth.out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse, truth.lse, rtol=0, atol=1e-13)
    dout = rng.standard_normal(out.shape, dtype=np.float32)
    gradients = adaattn.reference_backward(q, k, v, dout, enable_gqa=True, **options)
    for ours, theirs in zip(gradients, dense_backward(truth, dout)[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_meets_the_truth(rng, variant, dtype):
    q, k, v = problem(rng, dtype=dtype)
    options = dict(VARIANTS[variant])
    truth = dense(q, k, v, **options)
    dout = rng.standard_normal(truth.out.shape, dtype=np.float32).astype(q.dtype)
    out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, **options)
    lengths = options.pop("key_lengths", None)
    every = {"is_causal": False, "scale": None, "alignment": "top_left", "window": None, "sinks": 0, **options}
    for kernel in backward_kernels():
        checked = _options.make_options(0.0, **every, kernel=kernel)
        gradients = _numpy_calls.backward(q, k, v, None, lengths, out, lse, dout, checked)
        assert all(gradient.dtype == q.dtype for gradient in gradients)
        assert_backward(gradients, truth, dout, dtype, f"{kernel}, {variant}")


@pytest.mark.parametrize("shape", [(9,), (1, 9), (7, 9), (7, 1), (4, 7, 9), (1, 1, 9), (2, 1, 1, 9), (2, 4, 7, 9)])
@pytest.mark.parametrize("kind", ["bool", "float32", "float16"])
def test_masks_broadcast(rng, shape, kind):
    q, k, v = problem(rng, dtype="float16" if kind == "float16" else "float32")
    mask = rng.random(shape) < 0.6 if kind == "bool" else rng.standard_normal(shape, dtype=np.float32).astype(kind)
    full = np.broadcast_to(mask, np.broadcast_shapes(shape, (1, 1, 1, 1)))
    truth = dense(q, k, v, attn_mask=full)
    for kernel in kernels_for(q, k, v, attn_mask=mask):
        out, lse = adaattn.attention(q, k, v, attn_mask=mask, enable_gqa=True, return_lse=True, kernel=kernel)
        assert_forward(out, lse, truth, q.dtype.name, kernel)


def test_mask_of_minus_infinity_hides_and_rows_without_keys_are_zero(rng):
    q, k, v = problem(rng)
    mask = np.zeros((7, 9), np.float32)
    mask[3] = -np.inf
    mask[:, 4] = -np.inf
    truth = dense(q, k, v, attn_mask=mask)
    for kernel in kernels_for(q, k, v, attn_mask=mask):
        out, lse = adaattn.attention(q, k, v, attn_mask=mask, enable_gqa=True, return_lse=True, kernel=kernel)
        assert_forward(out, lse, truth, "float32", kernel)
        assert (out[:, :, 3] == 0).all()
        assert (lse[:, :, 3] == -np.inf).all()


def strided_views(x):
    """The same values in memory laid out otherwise."""
    b, h, n, d = x.shape
    tokens_first = np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    dims_outside = np.ascontiguousarray(x.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    wide = np.full((b, 2 * h, n + 3, 3 * d), np.nan, x.dtype)
    wide[:, ::2, 1 : n + 1, 2::3] = x
    return {
        "tokens first": tokens_first,
        "dims outside": dims_outside,
        "gaps": wide[:, ::2, 1 : n + 1, 2::3],
        "backwards": np.ascontiguousarray(x[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1],
        "fortran": np.asfortranarray(x),
    }


@pytest.mark.parametrize("layout", ["tokens first", "dims outside", "gaps", "backwards", "fortran"])
def test_any_strides(rng, layout):
    q, k, v = problem(rng, d=16, dv=16)
    truth = dense(q, k, v)
    strided = [strided_views(x)[layout] for x in (q, k, v)]
    assert all(not view.flags.c_contiguous for view in strided)
    for kernel in kernels_for(*strided):
        out, lse = adaattn.attention(*strided, enable_gqa=True, return_lse=True, kernel=kernel)
        assert_forward(out, lse, truth, "float32", f"{kernel}, {layout}")


def test_repeated_and_read_only_inputs(rng):
    q, k, v = problem(rng)
    one_key = np.broadcast_to(k[:, :, :1], k.shape)  # strides of 0, read-only
    one_value = np.broadcast_to(v[:1], v.shape)
    q.flags.writeable = False
    truth = dense(q, one_key, one_value)
    for kernel in kernels_for(q, one_key, one_value):
        out, lse = adaattn.attention(q, one_key, one_value, enable_gqa=True, return_lse=True, kernel=kernel)
        assert_forward(out, lse, truth, "float32", kernel)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
def test_no_batch_no_heads_no_queries(rng, shape):
    b, h, n, d = shape
    q, k = np.zeros(shape, np.float32), np.ones((b, h, 6, d), np.float32)
    out, lse, metrics = adaattn.attention(q, k, k, return_lse=True, return_metrics=True)
    assert out.shape == shape
    assert lse.shape == (b, h, n)
    assert metrics.entropy.shape == (b, h)
    assert np.isnan(metrics.entropy).all()  # the mean of no rows
    # A mask without elements is still looked at.
    with pytest.raises(ValueError, match="attn_mask"):
        adaattn.attention(q, k, k, attn_mask=np.zeros((0, 7), bool))


def test_no_keys(rng):
    q, k, v = problem(rng, nk=0)
    out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_nan_and_infinity_spread_as_in_the_definition(rng):
    q, k, v = problem(rng, b=1, hq=2)
    q[0, 0, 2, 1] = np.nan
    q[0, 1, 5, 0] = np.inf
    k[0, 1, 8, 3] = -np.inf
    v[0, 0, 1, 0] = np.inf
    v[0, 1, 0, 2] = np.nan
    truth = dense(q, k, v, is_causal=True)
    assert np.isnan(truth.out).any()
    assert np.isfinite(truth.out).any()
    for kernel in kernels_for(q, k, v, is_causal=True):
        out, lse = adaattn.attention(q, k, v, is_causal=True, return_lse=True, kernel=kernel)
        assert_forward(out, lse, truth, "float32", kernel)


def test_hidden_keys_are_not_read(rng):
    q, k, v = problem(rng)
    clean = adaattn.attention(q, k, v, enable_gqa=True, key_lengths=[4, 4])
    k[:, :, 4:], v[:, :, 4:] = np.nan, np.inf
    np.testing.assert_array_equal(adaattn.attention(q, k, v, enable_gqa=True, key_lengths=[4, 4]), clean)


def test_large_scores_do_not_overflow(rng):
    q, k, v = problem(rng)
    q *= 1e3  # exp(1000) is not a float64
    truth = dense(q, k, v)
    for kernel in kernels_for(q, k, v):
        out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, kernel=kernel)
        assert_forward(out, lse, truth, "float32", kernel)


def test_metrics(rng):
    q, k, v = problem(rng)
    truth = dense(q, k, v, is_causal=True)
    for kernel in kernels_for(q, k, v, is_causal=True, return_metrics=True):
        out, metrics = adaattn.attention(
            q, k, v, is_causal=True, enable_gqa=True, return_metrics=True, error=0.01, kernel=kernel
        )
        np.testing.assert_array_equal(out, adaattn.attention(q, k, v, is_causal=True, enable_gqa=True, kernel=kernel))
        # FP32 sums of at most 9 terms of order 1, on probabilities with the errors of test_forward.
        np.testing.assert_allclose(metrics.entropy, truth.entropy.mean(-1), atol=2e-6)
        np.testing.assert_allclose(metrics.max_probability, truth.probabilities.max(-1).mean(-1), atol=2e-6)
        assert metrics.kernel == kernel
        assert metrics.form == "dense"
        assert (metrics.heads.work == 1).all()
        assert metrics.heads.forms.shape == (2, 4)
        assert metrics.compute_precision == ("float64" if kernel == "reference_fp64" else "float32")
        assert metrics.error_budget == 0.01
        assert metrics.memory_saved_gb == 2 * 4 * 7 * 9 * 4 / 1e9
        assert "error=0.01" in metrics.fallback
        parsed = json.loads(metrics.to_json())
        assert parsed == metrics.to_dict()
        assert np.asarray(parsed["entropy"]).shape == (2, 4)
    with pytest.raises(AttributeError):
        metrics.kernel = "other"


def test_metrics_name_what_declined(rng):
    q, k, v = problem(rng)
    assert adaattn.attention(q, k, v, enable_gqa=True, return_metrics=True)[1].fallback is None
    _, metrics = adaattn.attention(q, k, v, enable_gqa=True, return_metrics=True, error=0.1)
    assert "cpu_adaptive: takes 64 tokens or more" in metrics.fallback
    wide = np.ones((1, 1, 2, 300), np.float32)
    _, metrics = adaattn.attention(wide, wide, wide, return_metrics=True)
    assert metrics.kernel == "reference_fp64"
    assert "cpu_flash: head size D is above 256" in metrics.fallback


def test_metrics_without_statistics(rng, monkeypatch):
    """Where no kernel reports them, as on GPUs, the call still runs and says so."""
    q, k, v = problem(rng)
    right = _numpy_calls.describe

    def without_statistics(*args):
        if args[-1]:
            raise NotImplementedError("none reports the entropy")
        return right(*args)

    monkeypatch.setattr(_numpy_calls, "describe", without_statistics)
    out, lse, metrics = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, return_metrics=True)
    assert_forward(out, lse, dense(q, k, v), "float32")
    assert metrics.entropy is None
    assert metrics.max_probability is None
    assert "reports entropy" in metrics.fallback
    assert json.loads(metrics.to_json())["entropy"] is None
    # What no kernel takes at all is still refused.
    with pytest.raises(ValueError, match="kernel is"):
        adaattn.attention(q, k, v, enable_gqa=True, return_metrics=True, kernel="none")


def test_a_budget_goes_before_statistics(rng, monkeypatch):
    """Where only kernels without a budget report them, as on GPUs."""
    q, k, v = rng.standard_normal((3, 1, 1, 4096, 16), dtype=np.float32)
    right = _numpy_calls.describe

    def exact_with_statistics(*args):
        facts = json.loads(right(*args))
        return json.dumps(facts | {"chosen": "cpu_flash"} if args[-1] else facts)

    monkeypatch.setattr(_numpy_calls, "describe", exact_with_statistics)
    _, metrics = adaattn.attention(q, k, v, error=0.1, return_metrics=True)
    assert metrics.kernel == "cpu_adaptive"
    assert metrics.entropy is None
    assert metrics.fallback == "no kernel that takes this call within error=0.1 reports entropy and largest probability"
    _, metrics = adaattn.attention(q, k, v, return_metrics=True)
    assert metrics.kernel == "cpu_flash"
    assert metrics.entropy is not None


def test_describe_knows_of_key_lengths(rng, monkeypatch):
    seen = []
    right = _numpy_calls._calls.describe

    def listening(*args):
        seen.append(args[3:])
        return right(*args)

    monkeypatch.setattr(_numpy_calls._calls, "describe", listening)
    q, k, v = problem(rng)
    adaattn.describe(q, k, v, enable_gqa=True)
    adaattn.describe(q, k, v, enable_gqa=True, key_lengths=[3, 4])
    assert seen == [(False, 0), (True, 0)]
    with pytest.raises(ValueError, match="key_lengths"):
        adaattn.describe(q, k, v, enable_gqa=True, key_lengths=[3])


def test_merge_of_key_splits_is_the_whole(rng):
    q, k, v = problem(rng)
    whole, whole_lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True)
    parts = [
        adaattn.attention(q, k[:, :, a:b], v[:, :, a:b], enable_gqa=True, return_lse=True)
        for a, b in ((0, 2), (2, 2), (2, 8), (8, 9))  # one of them without keys
    ]
    out, lse = adaattn.merge([part for part, _ in parts], [part_lse for _, part_lse in parts])
    truth = dense(q, k, v)
    assert_forward(out, lse, truth, "float32")
    assert_forward(whole, whole_lse, truth, "float32")
    strided = [np.repeat(part_lse, 2, -1)[..., ::2] for _, part_lse in parts]
    np.testing.assert_array_equal(adaattn.merge([part for part, _ in parts], strided)[0], out)


def test_describe(rng):
    facts = adaattn.describe()
    assert {kernel["operation"] for kernel in facts["kernels"]} == {"forward", "backward"}
    assert facts["kernels"][-1]["name"] == "reference_fp64"
    q, k, v = problem(rng)
    facts = adaattn.describe(q, k, v, enable_gqa=True, kernel="reference_fp64")
    assert facts["chosen"] == "reference_fp64"
    assert all(kernel["operation"] == "forward" for kernel in facts["kernels"])


def test_calls_from_many_threads(rng):
    q, k, v = problem(rng, nq=40, nk=50)
    expected = adaattn.attention(q, k, v, enable_gqa=True)
    wrong = []

    def work(scale):
        for _ in range(10):
            if not np.array_equal(adaattn.attention(q, k, v, enable_gqa=True), expected):
                wrong.append("result")
            try:
                adaattn.attention(q, k, v[:, :, : 10 + scale], enable_gqa=True)
            except ValueError as error:
                if f"{10 + scale}" not in str(error):  # each thread has its own last error
                    wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_import_is_lazy():
    program = (
        "import sys, adaattn, numpy as np; x = np.ones((1, 1, 2, 4), np.float32); adaattn.attention(x, x, x); "
        "assert 'torch' not in sys.modules; assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class TestLibrary:
    def test_structs_match_the_header(self, tmp_path):
        """Sizes and offsets as the C compiler sees them."""
        include = Path(__file__).resolve().parents[2] / "include"
        structs = {
            "adaattn_tensor": _library.Tensor,
            "adaattn_options": _library.Options,
            "adaattn_forward_args": _library.ForwardArgs,
            "adaattn_backward_args": _library.BackwardArgs,
            "adaattn_merge_args": _library.MergeArgs,
            "adaattn_head_plan": _library.HeadPlan,
            "adaattn_head_report": _library.HeadReport,
            "adaattn_stage_times": _library.StageTimes,
        }
        expected = {"ADAATTN_ABI_VERSION": _library.ABI_VERSION}
        for name, kind in structs.items():
            expected[f"sizeof({name})"] = ctypes.sizeof(kind)
            expected |= {f"offsetof({name}, {field})": getattr(kind, field).offset for field, _ in kind._fields_}
        enums = ("FLOAT32", "FLOAT16", "BFLOAT16", "BOOL", "CPU", "CUDA", "TOP_LEFT", "BOTTOM_RIGHT")
        expected |= {f"ADAATTN_{name}": getattr(_library, name) for name in enums}
        lines = "".join(f'printf("%ld\\n", (long)({expression}));' for expression in expected)
        source = tmp_path / "layout.c"
        source.write_text(
            f"#include <stdio.h>\n#include <stddef.h>\n#include <adaattn/adaattn.h>\nint main(void) {{ {lines} }}\n"
        )
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-I", include, source, "-o", tmp_path / "layout"], check=True)
        found = subprocess.run([tmp_path / "layout"], check=True, capture_output=True, text=True).stdout.split()
        assert dict(zip(expected, map(int, found), strict=True)) == expected

    def test_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ADAATTN_LIBRARY", str(tmp_path / "none.so"))
        _library.library.cache_clear()
        try:
            with pytest.raises(ImportError, match="ADAATTN_LIBRARY"):
                _library.library()
            monkeypatch.delenv("ADAATTN_LIBRARY")
            assert all(path.name == "libadaattn.so" for path in _library._candidates())
        finally:
            monkeypatch.undo()
            _library.library.cache_clear()

    def test_not_a_library(self, tmp_path):
        path = tmp_path / "broken.so"
        path.write_text("text")
        with pytest.raises(ImportError, match="cannot load"):
            _library.load(path)

    def test_of_another_version(self, tmp_path):
        source, path = tmp_path / "other.c", tmp_path / "other.so"
        source.write_text("unsigned adaattn_abi_version(void) { return 999; }")
        subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", source, "-o", path], check=True)
        with pytest.raises(ImportError, match="version 999"):
            _library.load(path)

    def test_unknown_status(self):
        with pytest.raises(RuntimeError):
            _library.check(4)

    def test_dtype_codes(self):
        assert _arrays.dtype_code(np.dtype(np.float32)) == _library.FLOAT32
        assert _arrays.dtype_code(np.dtype(np.float64)) is None
        assert _arrays.dtype_code(np.dtype(np.float32).newbyteorder()) is None

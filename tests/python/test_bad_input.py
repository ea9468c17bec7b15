"""Every malformed call gets an error that names the argument; none crashes."""

import adaattn
import numpy as np
import pytest
from adaattn import _numpy_calls
from adaattn._options import CallOptions

GOOD = {"q": (2, 4, 5, 8), "k": (2, 4, 6, 8), "v": (2, 4, 6, 8)}


class Numpy:
    @staticmethod
    def make(shape, dtype="float32"):
        return np.ones(shape, dtype)

    @staticmethod
    def stretched(shape):  # one element, however large the shape
        return np.lib.stride_tricks.as_strided(np.ones(1, np.float32), shape, (0,) * len(shape))


class Torch:
    @staticmethod
    def make(shape, dtype="float32"):
        torch = pytest.importorskip("torch")
        return torch.ones(shape, dtype=getattr(torch, dtype))

    @staticmethod
    def stretched(shape):
        return pytest.importorskip("torch").ones(1).as_strided(shape, (0,) * len(shape))


@pytest.fixture(params=[Numpy, Torch], ids=["numpy", "torch"])
def library(request):
    return request.param


def call(library, *, function=None, changes=None, dtypes=None, **options):
    shapes = GOOD | (changes or {})
    arrays = {name: library.make(shape, (dtypes or {}).get(name, "float32")) for name, shape in shapes.items()}
    return (function or adaattn.attention)(**arrays, **options)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("shape", [(), (8,), (5, 8), (4, 5, 8), (1, 2, 4, 5, 8)])
def test_rank(library, name, shape):
    with pytest.raises(ValueError, match=rf"^{name} has {len(shape)} dimensions.*must have 4"):
        call(library, changes={name: shape})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (3, 4, 5, 8)}, r"^k\.shape is \[2, 4, 6, 8\], must be"),
        ({"k": (2, 4, 6, 7)}, r"^k\.shape is"),
        ({"k": (2, 4, 7, 8)}, r"^v\.shape is"),
        ({"v": (1, 4, 6, 8)}, r"^v\.shape is"),
        ({"q": (2, 4, 5, 0), "k": (2, 4, 6, 0)}, r"^q\.shape is .*must be >= 1"),
        ({"v": (2, 4, 6, 0)}, r"^v\.shape is .*must be >= 1"),
        ({"k": (2, 2, 6, 8), "v": (2, 2, 6, 8)}, r"^q has 4 heads, k 2 and v 2.*enable_gqa"),
        ({"v": (2, 2, 6, 8)}, r"^q has 4 heads, k 4 and v 2"),
    ],
)
def test_shapes(library, changes, message):
    with pytest.raises(ValueError, match=message):
        call(library, changes=changes)


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_head_counts_that_do_not_divide(library, heads):
    changes = {"k": (2, heads, 6, 8), "v": (2, heads, 6, 8)}
    with pytest.raises(ValueError, match=f"k has {heads} heads, q has 4"):
        call(library, changes=changes, enable_gqa=True)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", "complex64", "uint8"])
def test_dtypes(library, name, dtype):
    with pytest.raises(TypeError, match=rf"^{name} has dtype .*{dtype}, must be float32, float16 or bfloat16"):
        call(library, dtypes={name: dtype})


@pytest.mark.parametrize("name", ["k", "v"])
def test_dtypes_that_differ(library, name):
    with pytest.raises(ValueError, match=rf"^{name}\.dtype is float16, must be that of q, float32"):
        call(library, dtypes={name: "float16"})


@pytest.mark.parametrize("value", [-1e-9, -1, float("nan"), float("inf"), -float("inf")])
def test_error_budget(library, value):
    with pytest.raises(ValueError, match="^error is"):
        call(library, error=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_scale(library, value):
    with pytest.raises(ValueError, match="^scale is"):
        call(library, scale=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("error", "0.1"),
        ("error", None),
        ("error", True),
        ("scale", "1"),
        ("scale", 1j),
        ("is_causal", 1),
        ("is_causal", None),
        ("enable_gqa", "yes"),
        ("sinks", 1.0),
        ("sinks", True),
        ("sinks", None),
        ("window", 3),
        ("window", (1.5, 0)),
        ("kernel", 3),
        ("kernel", b"cpu_flash"),
        ("key_lengths", [1.5, 2]),
        ("key_lengths", [True, True]),
        ("attn_mask", [[True]]),
    ],
)
def test_types_of_options(library, name, value):
    with pytest.raises(TypeError, match=f"^{name}"):
        call(library, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sinks", -1),
        ("sinks", 2**63),
        ("window", (1,)),
        ("window", (1, 2, 3)),
        ("window", (-2, 0)),
        ("window", (0, 2**64)),
        ("alignment", "left"),
        ("alignment", None),
        ("kernel", ""),
        ("kernel", "no such kernel"),
        ("kernel", "cpu\0flash"),
        ("key_lengths", [1]),
        ("key_lengths", [1, 2, 3]),
        ("key_lengths", 3),
        ("key_lengths", [[1, 2]]),
        ("key_lengths", [-1, 2]),
        ("key_lengths", [1, 7]),
    ],
)
def test_values_of_options(library, name, value):
    with pytest.raises(ValueError, match=f"^{name}"):
        call(library, **{name: value})


def test_numbers_of_other_types_are_taken(library):
    expected = call(library, scale=0.5, window=(1, 2), sinks=1, is_causal=True)
    out = call(
        library,
        scale=np.float64(0.5),
        window=[np.int32(1), np.int64(2)],
        sinks=np.uint8(1),
        is_causal=np.True_,
        error=np.float32(0),
        key_lengths=np.array([6, 6], np.int16),
    )
    assert (out == expected).all()


@pytest.mark.parametrize(
    "shape", [(), (5, 7), (4, 6), (3, 5, 6), (3, 1, 5, 6), (2, 3, 5, 6), (1, 1, 1, 5, 6), (0,), (0, 1, 5, 6)]
)
def test_mask_shapes(library, shape):
    with pytest.raises(ValueError, match="^attn_mask"):
        call(library, attn_mask=library.make(shape, "bool"))


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint8", "float16"])
def test_mask_dtypes(library, dtype):
    with pytest.raises((TypeError, ValueError), match=r"^attn_mask.* must be bool, float32 or that of q"):
        call(library, attn_mask=library.make((5, 6), dtype))


def test_mask_together_with_is_causal(library):
    with pytest.raises(ValueError, match="is_causal and attn_mask"):
        call(library, is_causal=True, attn_mask=library.make((5, 6), "bool"))


@pytest.mark.parametrize("value", [None, 1.0, [[[[1.0]]]], "text", object()])
def test_not_arrays(library, value):
    good = library.make(GOOD["q"])
    with pytest.raises(TypeError, match="^q is of type"):
        adaattn.attention(value, good, good)
    with pytest.raises(TypeError, match="^k is of type"):
        adaattn.attention(good, value, good)


def test_arrays_and_tensors_together():
    array, tensor = Numpy.make(GOOD["q"]), Torch.make(GOOD["q"])
    with pytest.raises(TypeError, match="^k is of type Tensor, must be a NumPy array"):
        adaattn.attention(array, tensor, array)
    with pytest.raises(TypeError, match="^v is of type ndarray, must be a torch tensor"):
        adaattn.attention(tensor, tensor, array)
    with pytest.raises(TypeError, match="^attn_mask is of type"):
        adaattn.attention(tensor, tensor, tensor, attn_mask=np.ones((5, 5), bool))


def test_sizes_that_overflow(library):
    q = library.stretched((2**20, 2**20, 2**14, 8))
    k = library.stretched((2**20, 2**20, 1, 8))
    with pytest.raises(ValueError, match="too large"):
        adaattn.attention(q, k, k)


def test_unsupported_kernel_gives_its_reasons(library):
    # The kernel for few queries declines many of them.
    declining = [
        kernel["name"]
        for kernel in call(library, function=adaattn.describe, changes={"q": (2, 4, 100, 8)})["kernels"]
        if kernel["declines"] or kernel["unavailable"]
    ]
    for name in declining:
        with pytest.raises(NotImplementedError, match=f"no kernel takes q .*{name}:"):
            call(library, changes={"q": (2, 4, 100, 8)}, kernel=name)


class TestNumpyMemory:
    def test_misaligned(self):
        memory = np.zeros(2 * 4 * 5 * 8 * 4 + 1, np.uint8)
        q = memory[1:].view(np.float32).reshape(2, 4, 5, 8)
        good = Numpy.make(GOOD["k"])
        with pytest.raises(ValueError, match=r"^q\.data is misaligned"):
            adaattn.attention(q, good, good)

    def test_strides_that_are_no_multiple_of_the_element(self):
        record = np.zeros((2, 4, 6, 8), np.dtype([("a", np.float32), ("b", np.uint8)]))
        with pytest.raises(ValueError, match=r"^k has strides of .* bytes, must be multiples of 4"):
            adaattn.attention(Numpy.make(GOOD["q"]), record["a"], Numpy.make(GOOD["v"]))

    def test_byte_swapped(self):
        q = Numpy.make(GOOD["q"])
        with pytest.raises(TypeError, match="^q has dtype .*byte-swapped"):
            adaattn.attention(q.astype(q.dtype.newbyteorder()), q, q)

    def test_masked(self):
        q = Numpy.make(GOOD["q"])
        with pytest.raises(TypeError, match="^v is a masked array"):
            adaattn.attention(q, q, np.ma.masked_less(q, 0))

    def test_unsigned_key_lengths_beyond_int64(self):
        q = Numpy.make(GOOD["q"])
        with pytest.raises(ValueError, match="^key_lengths"):
            adaattn.attention(q, q, q, key_lengths=np.array([2**63, 1], np.uint64))


class TestTorchTensors:
    def test_layouts(self):
        torch = pytest.importorskip("torch")
        good = Torch.make(GOOD["q"])
        with pytest.raises(TypeError, match="^k is a torch.sparse_coo tensor"):
            adaattn.attention(good, good.to_sparse(), good)
        nested = torch.nested.nested_tensor([torch.ones(4, 5, 8)], layout=torch.jagged)
        with pytest.raises(TypeError, match="^q is a nested tensor"):
            adaattn.attention(nested, nested, nested)

    def test_devices(self):
        torch = pytest.importorskip("torch")
        good, meta = Torch.make(GOOD["q"]), torch.empty(GOOD["q"], device="meta")
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match="meta"):
            adaattn.attention(good, meta, meta)
        with pytest.raises(NotImplementedError, match="meta"):
            adaattn.reference(meta, meta, meta)

    def test_operators_called_directly_check_memory(self):
        torch = pytest.importorskip("torch")
        from adaattn import torch_op

        q, options = Torch.make(GOOD["q"]), tuple(CallOptions())
        with pytest.raises(ValueError, match="^q has 3 dimensions"):
            torch_op.forward_op(q[0], q, q, None, None, *options)
        with pytest.raises(ValueError, match="^attn_mask has 2 dimensions"):
            torch_op.forward_op(q, q, q, torch.ones(5, 5), None, *options)
        for lengths, error in (
            (torch.ones(3, dtype=torch.int64), ValueError),
            (torch.ones(2, 1, dtype=torch.int64), ValueError),
            (torch.ones(2), TypeError),
            (torch.ones(4, dtype=torch.int64)[::2], TypeError),
        ):
            with pytest.raises(error, match="^key_lengths"):
                torch_op.forward_op(q, q, q, None, lengths, *options)
        out, lse = torch_op.forward_op(q, q, q, None, None, *options)
        for bad, error in ((lse[..., :4], ValueError), (lse.double(), TypeError), (lse[0], ValueError)):
            with pytest.raises(error, match="^lse"):
                torch_op.backward_op(out, q, q, q, None, None, out, bad, *options)
        with pytest.raises(ValueError, match=r"^dout\.shape"):
            torch_op.backward_op(out[:, :, :4], q, q, q, None, None, out, lse, *options)
        with pytest.raises(ValueError, match=r"^out has 3 dimensions"):
            torch_op.backward_op(out, q, q, q, None, None, out[0], lse, *options)


class TestMerge:
    def parts(self, library, shape=(2, 3, 5, 8), dtype="float32"):
        return library.make(shape, dtype), library.make(shape[:-1])

    def test_counts(self, library):
        out, lse = self.parts(library)
        with pytest.raises(ValueError, match="at least 1"):
            adaattn.merge([], [])
        with pytest.raises(ValueError, match="outs has 2 parts and lses 1"):
            adaattn.merge([out, out], [lse])
        with pytest.raises(TypeError, match="^outs is of type"):
            adaattn.merge(out, [lse])
        with pytest.raises(TypeError, match="^lses is of type"):
            adaattn.merge([out], lse)

    def test_parts(self, library):
        out, lse = self.parts(library)
        with pytest.raises(TypeError, match=r"^outs\[0\] is of type"):
            adaattn.merge([1.0], [lse])
        with pytest.raises(TypeError, match=r"^outs\[1\] is of type"):
            adaattn.merge([out, 1.0], [lse, lse])
        with pytest.raises(TypeError, match=r"^lses\[0\] is of type"):
            adaattn.merge([out], [None])
        with pytest.raises(ValueError, match=r"^outs\[0\] has 3 dimensions"):
            adaattn.merge([out[0]], [lse])
        with pytest.raises(ValueError, match=r"^lses\[1\] has shape"):
            adaattn.merge([out, out], [lse, lse[:1]])
        with pytest.raises(TypeError, match=r"^lses\[0\] has dtype"):
            adaattn.merge([out], [self.parts(library, dtype="float64")[0][..., 0]])
        with pytest.raises(ValueError, match=r"^outs\[1\]\.shape"):
            adaattn.merge([out, out[:, :, :4]], [lse, lse[:, :, :4]])
        with pytest.raises(ValueError, match=r"^outs\[1\]\.dtype"):
            adaattn.merge([out, self.parts(library, dtype="float16")[0]], [lse, lse])


def test_backward_of_numpy_arrays():
    q = Numpy.make(GOOD["q"])
    out, lse = adaattn.attention(q, q, q, return_lse=True)
    options = CallOptions()
    with pytest.raises(ValueError, match="^lse has shape"):
        _numpy_calls.backward(q, q, q, None, None, out, lse[0], out, options)
    with pytest.raises(ValueError, match=r"^dout\.shape"):
        _numpy_calls.backward(q, q, q, None, None, out, lse, out[:1], options)


@pytest.mark.parametrize("function", [adaattn.reference, adaattn.describe])
def test_the_other_functions_check_too(library, function):
    with pytest.raises(ValueError, match="^scale"):
        call(library, function=function, scale=float("nan"))
    with pytest.raises(ValueError, match="^q has 2 dimensions"):
        call(library, function=function, changes={"q": (5, 8)})
    with pytest.raises(TypeError, match="^q is of type"):
        function(1, 2, 3)


def test_reference_backward_checks_dout(library):
    good = library.make(GOOD["q"])
    with pytest.raises(ValueError, match=r"^dout\.shape"):
        adaattn.reference_backward(good, good, good, library.make((2, 4, 5, 7)))
    with pytest.raises(ValueError, match=r"^dout has 3"):
        adaattn.reference_backward(good, good, good, good[0])
    with pytest.raises((TypeError, ValueError), match=r"^dout"):
        adaattn.reference_backward(good, good, good, library.make(GOOD["q"], "float64"))

"""The torch operators: results, gradients, layouts, and everything that torch does to an operator."""

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import adaattn  # noqa: E402
from adaattn import _torch_kernels, torch_op  # noqa: E402
from adaattn._options import CallOptions  # noqa: E402
from truth import assert_backward, assert_forward, backward_kernels, dense, kernels_for  # noqa: E402

DTYPES = ["float32", "float16", "bfloat16"]
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "alignment": "bottom_right", "scale": 0.5},
    "window": {"window": (3, 1), "sinks": 1},
    "lengths": {"key_lengths": [5, 9]},
}


def problem(b=2, hq=4, hk=2, nq=7, nk=9, d=8, dv=5, dtype="float32", requires_grad=False):
    kind = getattr(torch, dtype)
    shapes = ((b, hq, nq, d), (b, hk, nk, d), (b, hk, nk, dv))
    return tuple(torch.randn(shape).to(kind).requires_grad_(requires_grad) for shape in shapes)


def truth_of(q, k, v, **options):
    return dense(*(x.detach().double().numpy() for x in (q, k, v)), **options)


def flat(**changes):
    return tuple(CallOptions(**changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_and_backward_meet_the_truth(name, dtype):
    options = OPTIONS[name]
    q, k, v = problem(dtype=dtype, requires_grad=True)
    truth = truth_of(q, k, v, **options)
    dout = torch.randn(truth.out.shape).to(q.dtype)
    for kernel in kernels_for(q, k, v, **options):
        out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, kernel=kernel, **options)
        assert out.dtype == q.dtype
        assert lse.dtype == torch.float32
        assert_forward(out, lse, truth, dtype, kernel)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        assert_backward(gradients, truth, dout.double().numpy(), dtype, kernel)


@pytest.mark.parametrize("kernel", backward_kernels())
def test_backward_operator_takes_any_kernel(kernel):
    q, k, v = problem()
    truth = truth_of(q, k, v)
    out, lse = torch_op.forward_op(q, k, v, None, None, *flat())
    dout = torch.randn_like(out)
    gradients = torch_op.backward_op(dout, q, k, v, None, None, out, lse, *flat(kernel=kernel))
    assert_backward(gradients, truth, dout.double().numpy(), "float32", kernel)


def test_backward_of_key_splits_adds_up_from_the_merged_result():
    """What ring attention does: each part's gradients from the whole out and lse."""
    q, k, v = problem()
    truth = truth_of(q, k, v)
    splits = [(0, 4), (4, 9)]
    parts = [
        adaattn.attention(q, k[:, :, a:b], v[:, :, a:b], enable_gqa=True, return_lse=True, kernel="cpu_flash")
        for a, b in splits
    ]
    out, lse = adaattn.merge([part for part, _ in parts], [part_lse for _, part_lse in parts])
    assert_forward(out, lse, truth, "float32")
    dout = torch.randn_like(out)
    options = flat(kernel="cpu_flash")
    pieces = [
        torch_op.backward_op(dout, q, k[:, :, a:b], v[:, :, a:b], None, None, out, lse, *options) for a, b in splits
    ]
    gradients = (
        sum(piece[0] for piece in pieces),
        torch.cat([piece[1] for piece in pieces], 2),
        torch.cat([piece[2] for piece in pieces], 2),
    )
    assert_backward(gradients, truth, dout.double().numpy(), "float32")


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_torch(causal):
    q, k, v = problem(dv=8, requires_grad=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    ours = adaattn.attention(q, k, v, is_causal=causal, enable_gqa=True)
    truth = truth_of(q, k, v, is_causal=causal)
    for out in (ours, theirs):  # the bounds fit a kernel that is not ours, too
        assert_forward(out, None, truth, "float32")
    dout = torch.randn_like(ours)
    for out in (ours, theirs):
        assert_backward(torch.autograd.grad(out, (q, k, v), dout), truth, dout.double().numpy(), "float32")


@pytest.mark.parametrize("shape", [(9,), (7, 9), (4, 7, 9), (2, 1, 7, 9)])
@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_masks(shape, dtype):
    q, k, v = problem(requires_grad=True)
    mask = torch.rand(shape) < 0.6 if dtype == "bool" else torch.randn(shape)
    full = mask.expand(torch.broadcast_shapes(shape, (1, 1, 1, 1))).numpy()
    truth = truth_of(q, k, v, attn_mask=full)
    out = adaattn.attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_forward(out, None, truth, "float32")
    dout = torch.randn_like(out)
    assert_backward(torch.autograd.grad(out, (q, k, v), dout), truth, dout.double().numpy(), "float32")


def test_gradient_of_a_sum_comes_with_strides_of_zero():
    q, k, v = problem(requires_grad=True)
    adaattn.attention(q, k, v, enable_gqa=True).sum().backward()
    truth = truth_of(q, k, v)
    dout = torch.ones(truth.out.shape).double().numpy()
    assert_backward((q.grad, k.grad, v.grad), truth, dout, "float32")


class TestLayout:
    def test_heads_inside_tokens_stay_there(self):
        b, n, h, d = 2, 7, 4, 8
        fused = torch.randn(b, n, 3, h, d, requires_grad=True)
        q, k, v = (x.transpose(1, 2) for x in fused.unbind(2))
        out = adaattn.attention(q, k, v)
        out.transpose(1, 2).view(b, n, h * d)  # joins the heads without a copy
        assert_forward(out, None, truth_of(q, k, v), "float32")
        dout = torch.randn(b, n, h, d).transpose(1, 2)
        gradients = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        assert gradients[0].transpose(1, 2).is_contiguous()
        assert_backward(gradients, truth_of(q, k, v), dout.double().numpy(), "float32")
        out.backward(dout)
        assert fused.grad is not None

    def test_contiguous_stays_contiguous(self):
        q, k, v = problem()
        out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True)
        assert out.is_contiguous()
        assert lse.is_contiguous()

    def test_negative_bit_and_expanded_inputs(self):
        q, k, v = problem(hk=4, dv=8)
        negative = torch._neg_view(k)
        assert negative.is_neg()
        expanded = v[:, :1].expand(-1, 4, -1, -1)
        out = adaattn.attention(q, negative, expanded)
        assert_forward(out, None, truth_of(q, -k, expanded), "float32")

    @pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)])
    def test_nothing(self, shape):
        q = torch.zeros(shape, requires_grad=True)
        k = torch.ones(shape[0], shape[1], 6, 4, requires_grad=True)
        out, lse, metrics = adaattn.attention(q, k, k, return_lse=True, return_metrics=True)
        assert out.shape == shape
        assert lse.shape == shape[:3]
        assert metrics.entropy.isnan().all()
        out.sum().backward()
        assert q.grad.shape == q.shape
        assert (k.grad == 0).all()

    def test_no_keys(self):
        q, k, v = problem(nk=0, requires_grad=True)
        out = adaattn.attention(q, k, v, enable_gqa=True)
        assert (out == 0).all()
        out.sum().backward()
        assert (q.grad == 0).all()


class TestAutograd:
    def test_only_some_require_grad(self):
        q, k, v = problem()
        dout = torch.randn(2, 4, 7, 5)
        every = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = torch.autograd.grad(adaattn.attention(*every, enable_gqa=True), every, dout)
        for index in range(3):
            inputs = [q, k, v]
            inputs[index] = inputs[index].clone().requires_grad_()
            out = adaattn.attention(*inputs, enable_gqa=True)
            (gradient,) = torch.autograd.grad(out, inputs[index], dout)
            assert torch.equal(gradient, expected[index])

    def test_no_graph_without_grad(self):
        q, k, v = problem(requires_grad=True)
        with torch.no_grad():
            assert adaattn.attention(q, k, v, enable_gqa=True).grad_fn is None
        with torch.inference_mode():
            assert adaattn.attention(q, k, v, enable_gqa=True).is_inference()

    def test_lse_and_statistics_are_not_differentiable(self):
        q, k, v = problem(requires_grad=True)
        out, lse, metrics = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, return_metrics=True)
        assert out.requires_grad
        assert not lse.requires_grad
        assert not metrics.entropy.requires_grad
        assert not metrics.max_probability.requires_grad

    @pytest.mark.parametrize("direct", [False, True])
    def test_mask_that_requires_grad_is_refused(self, direct):
        q, k, v = problem()
        mask = torch.zeros(1, 1, 7, 9, requires_grad=True)
        call = torch_op.forward_op if direct else torch_op.call
        arguments = (q, k, v, mask, None, *flat())
        with pytest.raises(NotImplementedError, match="attn_mask requires grad"):
            call(*arguments if direct else (torch_op.forward_op, *arguments))
        with torch.no_grad():
            adaattn.attention(q, k, v, attn_mask=mask, enable_gqa=True)

    @pytest.mark.parametrize("direct", [False, True])
    def test_without_a_backward_kernel_the_forward_pass_refuses(self, monkeypatch, direct):
        q, k, v = problem(requires_grad=True)
        monkeypatch.setattr(torch_op, "backward_kernels", lambda device: frozenset())
        arguments = (torch_op.forward_op, q, k, v, None, None, *flat())
        with pytest.raises(NotImplementedError, match="no backward kernel runs on cpu tensors"):
            arguments[0](*arguments[1:]) if direct else torch_op.call(*arguments)
        with torch.no_grad():
            torch_op.call(*arguments)

    def test_second_derivatives_are_refused(self):
        q, k, v = problem(requires_grad=True)
        out = adaattn.attention(q, k, v, enable_gqa=True)
        (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            gradient.sum().backward()

    @pytest.mark.filterwarnings("ignore:.*torch.jit")  # torch's own
    def test_forward_mode_is_refused(self):
        q, k, v = problem()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                adaattn.attention(dual, k, v, enable_gqa=True)

    def test_merge_refuses_gradients(self):
        q, k, v = problem(requires_grad=True)
        out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True)
        with pytest.raises(NotImplementedError, match=r"adaattn\.merge got a part that requires grad"):
            adaattn.merge([out, out], [lse, lse])

    def test_gradients_that_nobody_asked_for(self):
        class Context:
            options = flat()
            undifferentiated = 2 + len(flat())

        assert torch_op._differentiate(Context(), None) == (None,) * (5 + len(flat()))


@pytest.mark.filterwarnings("ignore")  # torch's own, while it looks at tensors
class TestOperatorChecks:
    @pytest.mark.parametrize("name", ["forward", "forward_reported", "forward_statistics"])
    def test_opcheck_forward(self, name, monkeypatch):
        q, k, v = problem(requires_grad=True)
        mask = torch.randn(1, 1, 7, 9)
        tokens_first = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        # Stage times, the last but one, differ from run to run, and opcheck compares runs.
        run = _torch_kernels._calls.forward
        monkeypatch.setattr(
            _torch_kernels._calls, "forward", lambda *args, **masses: run(*args[:-2], 0, args[-1], **masses)
        )
        plans = torch.tensor(adaattn.Plan.automatic(2, 4).words(2, 4), dtype=torch.int32)
        op = getattr(torch_op, f"{name}_op")
        for options, arguments in (
            (flat(causal=True), (q, k, v, None, None)),
            (flat(scale=0.3, error=0.1), (tokens_first, k, v, mask, torch.tensor([3, 9]))),
        ):
            last = () if name == "forward" else (None,) if options[0] == 0 else (plans,)
            torch.library.opcheck(op, (*arguments, *options, *last))

    def test_opcheck_backward(self):
        q, k, v = problem()
        out, lse = torch_op.forward_op(q, k, v, None, None, *flat())
        arguments = (torch.randn_like(out), q, k, v, None, None, out, lse, *flat())
        torch.library.opcheck(torch_op.backward_op, arguments)

    def test_opcheck_merge(self):
        q, k, v = problem()
        out, lse = torch_op.forward_op(q, k, v, None, None, *flat())
        torch.library.opcheck(torch_op.merge_op, ([out, out], [lse, lse]))


@pytest.mark.filterwarnings("ignore")
class TestCompile:
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_fullgraph(self, dynamic):
        def block(q, k, v):
            out, lse = adaattn.attention(q * 2, k, v, enable_gqa=True, is_causal=True, return_lse=True)
            return out.transpose(1, 2).flatten(2), lse

        compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for nq in (7, 11):
            q, k, v = problem(nq=nq, requires_grad=True)
            expected, expected_lse = block(q, k, v)
            out, lse = compiled(q, k, v)
            assert torch.equal(out, expected)
            assert torch.equal(lse, expected_lse)
            dout = torch.randn_like(out)
            for ours, eager in zip(
                torch.autograd.grad(out, (q, k, v), dout),
                torch.autograd.grad(expected, (q, k, v), dout),
                strict=True,
            ):
                assert torch.equal(ours, eager)

    @pytest.mark.slow
    def test_inductor(self):
        def block(q, k, v, mask):
            return adaattn.attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2) + 1

        compiled = torch.compile(block, fullgraph=True)
        q, k, v = problem(hq=4, hk=4, nq=9)
        q, mask = q.transpose(1, 2).contiguous().requires_grad_(), torch.rand(9, 9) < 0.7
        truth = truth_of(q.transpose(1, 2), k, v, attn_mask=mask.numpy())
        out = compiled(q, k, v, mask) - 1  # its rounding, relative to values near 1, is within the bound too
        assert_forward(out.transpose(1, 2), None, truth, "float32")
        compiled(q, k, v, mask).sum().backward()
        assert q.grad is not None

    def test_first_import_inside_compiled_code(self):
        program = (
            "import torch, adaattn\n"
            "f = torch.compile(lambda x: adaattn.attention(x, x, x), fullgraph=True, backend='aot_eager')\n"
            "x = torch.randn(1, 2, 5, 8)\n"
            "assert torch.equal(f(x), adaattn.attention(x, x, x))\n"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=300)

    def test_export_and_fake_tensors(self):
        class Model(torch.nn.Module):
            def forward(self, q):
                return adaattn.attention(q, q, q)

        q = torch.randn(1, 2, 5, 8)
        program = torch.export.export(Model(), (q,))
        assert "adaattn.forward" in str(program.graph)
        assert torch.equal(program.module()(q), adaattn.attention(q, q, q))
        meta = adaattn.attention(*(q.to("meta"),) * 3)
        assert meta.shape == q.shape
        assert meta.is_meta


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch runs one sample after the other
class TestTransforms:
    def test_vmap_gives_the_same(self):
        q, k, v = (torch.randn(3, 2, 2, 5, 8) for _ in range(3))
        out = torch.vmap(adaattn.attention)(q, k, v)
        expected = torch.stack([adaattn.attention(*x) for x in zip(q, k, v, strict=True)])
        assert torch.equal(out, expected)

    def test_gradients_through_vmap(self):
        q, k, v = (torch.randn(3, 2, 2, 5, 8, requires_grad=True) for _ in range(3))
        loss = lambda q, k, v: adaattn.attention(q, k, v).square().sum()  # noqa: E731
        expected = torch.autograd.grad(sum(loss(*x) for x in zip(q, k, v, strict=True)), (q, k, v))
        inputs = tuple(x.detach() for x in (q, k, v))
        every = {
            "backward of vmap": torch.autograd.grad(torch.vmap(loss)(q, k, v).sum(), (q, k, v)),
            "vmap of grad": torch.vmap(torch.func.grad(loss, (0, 1, 2)))(*inputs),
            "grad of vmap": torch.func.grad(lambda *x: torch.vmap(loss)(*x).sum(), (0, 1, 2))(*inputs),
        }
        for name, gradients in every.items():
            for ours, plain in zip(gradients, expected, strict=True):
                assert torch.equal(ours, plain), name
        with torch.no_grad():
            assert not torch.vmap(loss)(q, k, v).requires_grad

    def test_vmap_without_a_backward_kernel(self, monkeypatch):
        q, k, v = (torch.randn(3, 2, 2, 5, 8) for _ in range(3))
        monkeypatch.setattr(torch_op, "backward_kernels", lambda device: frozenset())
        torch.vmap(adaattn.attention)(q, k, v)  # nobody asks for gradients
        with pytest.raises((NotImplementedError, SystemError)):  # torch 2.11 loses what setup_context raises
            torch.vmap(adaattn.attention)(q.requires_grad_(), k, v)

    def test_func_grad_gives_the_same(self):
        q, k, v = problem(requires_grad=True)
        loss = lambda q: adaattn.attention(q, k.detach(), v.detach(), enable_gqa=True).square().sum()  # noqa: E731
        expected = torch.autograd.grad(loss(q), q)[0]
        assert torch.equal(torch.func.grad(loss)(q.detach()), expected)

    def test_checkpoint(self):
        q, k, v = problem(requires_grad=True)
        block = lambda *x: adaattn.attention(*x, enable_gqa=True)  # noqa: E731
        out = torch.utils.checkpoint.checkpoint(block, q, k, v, use_reentrant=False)
        dout = torch.randn_like(out)
        for ours, plain in zip(
            torch.autograd.grad(out, (q, k, v), dout),
            torch.autograd.grad(block(q, k, v), (q, k, v), dout),
            strict=True,
        ):
            assert torch.equal(ours, plain)


class TestAutocast:
    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_casts_like_torch(self, requires_grad):
        q, k, v = problem(hk=4, dv=8, requires_grad=requires_grad)
        with torch.autocast("cpu", torch.bfloat16):
            ours = adaattn.attention(q, k, v)
            theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            direct, _ = torch_op.forward_op(q, k, v, None, None, *flat())
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert torch.equal(ours, direct)
        rounded = [x.detach().bfloat16() for x in (q, k, v)]
        assert_forward(ours, None, truth_of(*rounded), "bfloat16")
        if requires_grad:
            ours.float().square().sum().backward()
            assert q.grad.dtype == torch.float32

    def test_mask_stays_float32(self):
        q, k, v = problem(hk=4)
        mask = torch.full((7, 9), torch.finfo(torch.float32).min).triu(3)
        with torch.autocast("cpu", torch.float16):
            out = adaattn.attention(q, k, v, attn_mask=mask)
        assert out.dtype == torch.float16
        assert out.isfinite().all()


def test_metrics_are_tensors_on_the_inputs_device():
    q, k, v = problem()
    _, metrics = adaattn.attention(q, k, v, enable_gqa=True, return_metrics=True)
    truth = truth_of(q, k, v)
    # FP32 sums of 9 terms of order 1 on probabilities with the errors of the forward test.
    torch.testing.assert_close(metrics.entropy.double().numpy(), truth.entropy.mean(-1), atol=2e-6, rtol=0)
    assert metrics.to_dict()["max_probability"][0][0] == metrics.max_probability[0, 0].item()
    assert metrics.memory_saved_gb == 2 * 4 * 7 * 9 * 4 / 1e9


def test_threads_follow_torch():
    q, k, v = problem(nq=64, nk=64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(adaattn.attention(q, k, v, enable_gqa=True))
    finally:
        torch.set_num_threads(before)
    assert_forward(results[0], None, truth_of(q, k, v), "float32")
    assert_forward(results[1], None, truth_of(q, k, v), "float32")


def test_reference_on_tensors():
    q, k, v = problem()
    truth = truth_of(q, k, v, key_lengths=[4, 9])
    out, lse = adaattn.reference(q, k, v, enable_gqa=True, key_lengths=torch.tensor([4, 9], dtype=torch.int32))
    assert out.dtype == lse.dtype == torch.float64
    # Both are FP64: a few dozen roundings of 1e-16 each, on values of order 1.
    torch.testing.assert_close(out, torch.from_numpy(truth.out), rtol=0, atol=1e-13)
    dout = torch.randn(out.shape)
    gradients = adaattn.reference_backward(q, k, v, dout, enable_gqa=True, key_lengths=[4, 9])
    assert_backward(gradients, truth, dout.double().numpy(), "float32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestCuda:
    @pytest.fixture(autouse=True)
    def _kernel(self):
        self.names = [
            f"{kernel['operation']} {kernel['name']}"
            for kernel in adaattn.describe()["kernels"]
            if kernel["device"] == "cuda" and not kernel["unavailable"]
        ]
        if not any(name.startswith("forward") for name in self.names):
            pytest.skip("no CUDA kernel runs on this device")

    @staticmethod
    def problem(dtype="bfloat16", tokens_first=False):
        if tokens_first:
            return tuple(
                x.transpose(1, 2).cuda() for x in problem(b=2, hq=65, hk=65, nq=4, nk=4, d=64, dv=64, dtype=dtype)
            )
        return tuple(x.cuda() for x in problem(hq=4, hk=2, nq=65, nk=130, d=64, dv=64, dtype=dtype))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("name", ["plain", "causal"])
    def test_forward(self, name, dtype):
        q, k, v = self.problem(dtype)
        truth = truth_of(*(x.cpu() for x in (q, k, v)), **OPTIONS[name])
        out, lse = adaattn.attention(q, k, v, enable_gqa=True, return_lse=True, **OPTIONS[name])
        assert out.is_cuda
        assert_forward(out, lse, truth, dtype)

    def test_memory_order_of_the_output(self):
        q, k, v = self.problem(tokens_first=True)
        out = adaattn.attention(q, k, v, enable_gqa=True)
        assert out.transpose(1, 2).is_contiguous()
        assert_forward(out, None, truth_of(*(x.cpu() for x in (q, k, v))), "bfloat16")

    # torch 2.11's compiler meets its own deprecation when it is first imported.
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
    def test_stream_and_compile(self):
        q, k, v = self.problem()
        expected = adaattn.attention(q, k, v, enable_gqa=True)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            assert torch.equal(adaattn.attention(q, k, v, enable_gqa=True), expected)
        compiled = torch.compile(lambda *x: adaattn.attention(*x, enable_gqa=True), fullgraph=True)
        assert torch.equal(compiled(q, k, v), expected)

    def test_autocast(self):
        q, k, v = (x.float() for x in self.problem())
        with torch.autocast("cuda", torch.bfloat16):
            out = adaattn.attention(q, k, v, enable_gqa=True)
        assert out.dtype == torch.bfloat16

    def test_metrics(self):
        _, metrics = adaattn.attention(*self.problem(), enable_gqa=True, return_metrics=True)
        assert metrics.compute_precision == "bfloat16"
        assert (metrics.entropy is None) == ("reports entropy" in (metrics.fallback or ""))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_gradients_or_a_refusal(self, dtype):
        q, k, v = (x.requires_grad_() for x in self.problem(dtype))
        if not any(name.startswith("backward") for name in self.names):
            with pytest.raises(NotImplementedError, match="no backward kernel runs on cuda tensors"):
                adaattn.attention(q, k, v, enable_gqa=True)
            return
        truth = truth_of(*(x.cpu() for x in (q, k, v)))
        out = adaattn.attention(q, k, v, enable_gqa=True)
        dout = torch.randn_like(out)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        assert_backward(gradients, truth, dout.cpu().double().numpy(), dtype)

    def test_merge(self):
        q, k, v = self.problem()
        parts = [
            adaattn.attention(q, k[:, :, a:b], v[:, :, a:b], enable_gqa=True, return_lse=True)
            for a, b in ((0, 64), (64, 130))
        ]
        out, lse = adaattn.merge([part for part, _ in parts], [part_lse for _, part_lse in parts])
        assert_forward(out, lse, truth_of(*(x.cpu() for x in (q, k, v))), "bfloat16")


def test_a_forward_kernel_without_a_backward_one_of_its_name_still_gets_gradients():
    q, k, v = problem(nq=1, requires_grad=True)
    truth = truth_of(q, k, v)
    dout = torch.randn(truth.out.shape)
    for kernel in kernels_for(q, k, v):
        out = adaattn.attention(q, k, v, enable_gqa=True, kernel=kernel)
        assert_backward(torch.autograd.grad(out, (q, k, v), dout), truth, dout.double().numpy(), "float32", kernel)


def test_merge_in_torch_operators_agrees_with_the_library():
    """What CUDA tensors take, here on the CPU."""
    from adaattn._torch_kernels import merge_cpu, merge_cuda

    outs = [torch.randn(2, 3, 5, 4) for _ in range(3)]
    lses = [torch.randn(2, 3, 5) for _ in range(3)]
    lses[0][0], lses[1][0, 0], lses[2][0, 0] = -torch.inf, -torch.inf, -torch.inf
    outs[0][0] = torch.nan  # does not count
    out, lse = merge_cuda(outs, lses)
    expected, expected_lse = merge_cpu(outs, lses)
    # The library sums in FP64, torch in FP32: a few roundings of values of order 1.
    torch.testing.assert_close(out, expected, rtol=0, atol=8 * 2**-23)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=8 * 2**-23)
    assert (out[0, 0] == 0).all()
    for bad in (outs[1][:, :, :4], outs[1].half()):
        with pytest.raises((TypeError, ValueError), match=r"^(out|lse)s\[1\]"):
            merge_cuda([outs[0], bad], lses[:2])

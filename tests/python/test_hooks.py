"""enable(), disable() and enabled(): which SDPA calls are routed, that results and gradients stay, that all is
restored."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

import adaattn  # noqa: E402
from adaattn import hooks  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

EPSILON = 2.0**-24  # half the distance from 1 to the next float32


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    adaattn.hook_statistics(reset=True)
    yield
    adaattn.disable()


def dispatcher() -> tuple[str, str]:
    """Every kernel that PyTorch has for SDPA, and which one each dispatch key takes."""
    name = "aten::scaled_dot_product_attention"
    return torch._C._dispatch_dump(name), torch._C._dispatch_dump_table(name)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def close(ours: torch.Tensor, theirs: torch.Tensor, *, terms: int = 200) -> None:
    """Two float32 evaluations of one formula, each a chain of sums of at most `terms` terms of order 1: each is within
    terms * epsilon of the exact result (Higham, Accuracy and Stability, eq. 3.5), so within twice that of each
    other."""
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2 * terms * EPSILON * scale)


Q, K = (2, 4, 6, 8), (2, 4, 9, 8)
MASK = torch.ones(6, 9, dtype=torch.bool).tril(2)
TAKEN = {
    "plain": ((Q, K, K), {}),
    "causal": ((Q, K, K), {"is_causal": True}),
    "scale": ((Q, K, K), {"scale": 0.3}),
    "boolean mask": ((Q, K, K), {"attn_mask": MASK}),
    "additive mask": ((Q, K, K), {"attn_mask": torch.linspace(-2, 1, 54).view(6, 9)}),
    "mask per head": ((Q, K, K), {"attn_mask": torch.linspace(-2, 1, 216).view(4, 6, 9)}),
    "3-D": ((Q[1:], K[1:], K[1:]), {}),
    "3-D mask": ((Q[1:], K[1:], K[1:]), {"attn_mask": torch.linspace(-2, 1, 216).view(4, 6, 9)}),
    "grouped queries": ((Q, (2, 2, 9, 8), (2, 2, 9, 8)), {"enable_gqa": True}),
    "other value size": ((Q, K, (2, 4, 9, 5)), {}),
    "no queries": (((2, 4, 0, 8), K, K), {}),
}


@pytest.mark.parametrize("case", TAKEN)
@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference"])
def test_calls_are_taken(case: str, mode: str) -> None:
    shapes, options = TAKEN[case]
    q, k, v = tensors(*shapes)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    context = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with adaattn.enabled(), context():
        out = F.scaled_dot_product_attention(q, k, v, **options)
    assert adaattn.hook_statistics() == adaattn.HookStatistics(taken=1, returned={})
    assert out.shape == expected.shape
    if out.numel():
        close(out, expected)


@pytest.mark.parametrize("case", [name for name in TAKEN if name != "no queries"])
def test_gradients(case: str) -> None:
    shapes, options = TAKEN[case]
    results = []
    for route in (True, False):
        inputs = [x.requires_grad_() for x in tensors(*shapes)]
        if route:
            adaattn.enable()
        F.scaled_dot_product_attention(*inputs, **options).sin().sum().backward()
        adaattn.disable()
        results.append([x.grad for x in inputs])
    assert adaattn.hook_statistics().taken == 1
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


RETURNED = {
    "dropout_p > 0": ((Q, K, K), {"dropout_p": 0.5}, torch.float32),
    "dtype torch.float64": ((Q, K, K), {}, torch.float64),
    "shapes that need broadcasting or do not fit": ((Q, (1, 4, 9, 8), (1, 4, 9, 8)), {}, torch.float32),
    "query, key and value are not all 3-D or all 4-D": (((3, *Q), (3, *K), (3, *K)), {}, torch.float32),
    "attn_mask requires a gradient": ((Q, K, K), {"attn_mask": torch.zeros(6, 9, requires_grad=True)}, torch.float32),
    "attn_mask with 1 dimensions": ((Q, K, K), {"attn_mask": torch.zeros(9)}, torch.float32),
    "attn_mask of dtype torch.float16 for query of dtype torch.float32": (
        (Q, K, K),
        {"attn_mask": torch.zeros(6, 9, dtype=torch.float16)},
        torch.float32,
    ),
}


@pytest.mark.parametrize("reason", RETURNED)
def test_calls_are_handed_back(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    shapes, options, dtype = RETURNED[reason]
    q, k, v = tensors(*shapes, dtype=dtype)

    def run() -> object:
        torch.manual_seed(1)
        try:
            return F.scaled_dot_product_attention(q, k, v, **options)
        except (RuntimeError, IndexError) as error:  # what PyTorch refuses, it refuses still
            return str(error)

    expected = run()
    with adaattn.enabled(), caplog.at_level(logging.DEBUG, "adaattn"):
        for _ in range(3):
            out = run()
            assert torch.equal(out, expected) if isinstance(out, torch.Tensor) else out == expected
    assert adaattn.hook_statistics().returned == {reason: 3}
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG", "DEBUG"]
    assert all(reason in record.getMessage() for record in caplog.records)


def test_what_pytorch_refuses_stays_an_error() -> None:
    q, k, v = tensors(Q, K, K)
    bad_calls = [
        ((q, k, v), {"is_causal": True, "attn_mask": MASK}),
        ((q, k.half(), v), {}),
        ((q, k, v), {"attn_mask": MASK[:, :5]}),
        ((q, k[..., :5], v), {}),
    ]
    for inputs, options in bad_calls:
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(*inputs, **options)
        with adaattn.enabled(), pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(*inputs, **options)
    assert adaattn.hook_statistics().taken == 0
    assert adaattn.hook_statistics().total == len(bad_calls)


def test_kernels_refusal_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise NotImplementedError("no kernel takes D = 8")

    monkeypatch.setattr(hooks, "attention", refuse)
    q, k, v = tensors(Q, K, K)
    with adaattn.enabled():
        out = F.scaled_dot_product_attention(q, k, v)
    assert adaattn.hook_statistics().returned == {"no kernel takes D = 8": 1}
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v))


def test_sdpa_kernel_is_respected() -> None:
    q, k, v = tensors(Q, K, K)
    with adaattn.enabled():
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            F.scaled_dot_product_attention(q, k, v)
    statistics = adaattn.hook_statistics()
    assert statistics.taken == 1
    assert [reason for reason in statistics.returned if "sdpa_kernel" in reason]
    assert statistics.to_dict()["taken"] == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # jvp's first use compiles PyTorch's own rules
def test_function_transforms() -> None:
    """AdaAttn's operator has no rules for torch.func, so its transforms go on with PyTorch's."""
    (q,) = tensors(Q)
    tangent = torch.ones_like(q)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x).sin().sum()

    def transforms() -> list[torch.Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the only backend with forward mode and without a warning under vmap
            forward_mode, batched = torch.func.jvp(loss, (q,), (tangent,))[1], torch.vmap(loss)(q[None])
        return [torch.func.grad(loss)(q), forward_mode, batched]

    expected = transforms()
    with adaattn.enabled():
        for ours, theirs in zip(transforms(), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert adaattn.hook_statistics().taken == 0
    assert adaattn.hook_statistics().returned["function transforms (torch.func)"] == 1


def test_autocast() -> None:
    q, k, v = tensors(Q, K, K)
    with adaattn.enabled(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == torch.bfloat16
    assert adaattn.hook_statistics().taken == 1


def test_torch_compile() -> None:
    q, k, v = tensors(Q, K, K)
    with adaattn.enabled():
        compiled = torch.compile(F.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
        out = compiled(q, k, v)
        assert adaattn.hook_statistics().taken > 0
    close(out, F.scaled_dot_product_attention(q, k, v))


def train(model: nn.Module, x: torch.Tensor, steps: int) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def encoder() -> nn.Module:
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def test_training_an_existing_model() -> None:
    (x,) = tensors((2, 6, 16))
    with adaattn.enabled():
        ours = train(encoder(), x, 3)
    assert adaattn.hook_statistics() == adaattn.HookStatistics(taken=6, returned={})
    for got, expected in zip(ours, train(encoder(), x, 3), strict=True):
        close(got, expected, terms=2000)  # three steps through two layers


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_inference_of_an_existing_encoder(padded: bool) -> None:
    """nn.TransformerEncoder's inference path is one operator that never calls SDPA: the hook has to switch it off."""
    (x,) = tensors((2, 6, 16))
    model = encoder().eval()
    padding = torch.arange(6) >= torch.tensor([[6], [4]]) if padded else None
    with torch.inference_mode():
        expected = model(x, src_key_padding_mask=torch.zeros(2, 6).bool() if padding is None else padding)
        with adaattn.enabled():
            out = model(x, src_key_padding_mask=padding)
    assert adaattn.hook_statistics() == adaattn.HookStatistics(taken=2, returned={})
    kept = slice(None) if padding is None else ~padding
    close(out[kept], expected[kept], terms=2000)


def test_disable_restores_everything() -> None:
    before = dispatcher()
    for fastpath in (True, False):
        torch.backends.mha.set_fastpath_enabled(fastpath)
        adaattn.enable()
        assert adaattn.is_enabled()
        assert dispatcher() != before
        assert torch.nn.attention.current_flash_attention_impl() == "adaattn"
        assert not torch.backends.mha.get_fastpath_enabled()
        adaattn.disable()
        assert not adaattn.is_enabled()
        assert dispatcher() == before
        assert torch.nn.attention.current_flash_attention_impl() is None
        assert torch.backends.mha.get_fastpath_enabled() == fastpath
    torch.backends.mha.set_fastpath_enabled(True)
    adaattn.disable()  # does nothing
    assert dispatcher() == before


def test_contexts_nest() -> None:
    with adaattn.enabled(0.1):
        with adaattn.enabled(0.2):
            assert hooks.current_error() == 0.2
        assert hooks.current_error() == 0.1
        assert adaattn.is_enabled()
    assert not adaattn.is_enabled()
    assert hooks.current_error() == 0.0
    adaattn.enable(0.3)
    adaattn.enable(0.4)
    with pytest.raises(KeyError), adaattn.enabled(0.1):
        raise KeyError
    assert hooks.current_error() == 0.4
    adaattn.disable()
    assert not adaattn.is_enabled()


def test_budget_reaches_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = []
    attention = hooks.attention

    def spy(*args: object, **options: object) -> object:
        budgets.append(options["error"])
        return attention(*args, **options)

    monkeypatch.setattr(hooks, "attention", spy)
    q, k, v = tensors(Q, K, K)
    with adaattn.enabled(error=0.05):
        F.scaled_dot_product_attention(q, k, v)
    assert budgets == [0.05]


class Other:
    """A flash attention implementation of somebody else's."""

    active = False

    def __init__(self) -> None:
        Other.active = True

    def remove(self) -> None:
        Other.active = False


def test_other_implementations_come_back() -> None:
    registry = torch.nn.attention
    registry.register_flash_attention_impl("other", register_fn=Other)
    registry.activate_flash_attention_impl("other")
    with adaattn.enabled():
        assert not Other.active
    assert registry.current_flash_attention_impl() == "other"
    assert Other.active
    # Somebody activates theirs while ours is on: ours is gone, and disable() leaves theirs alone.
    adaattn.enable()
    registry.activate_flash_attention_impl("other")
    assert not adaattn.is_enabled()
    adaattn.disable()
    assert registry.current_flash_attention_impl() == "other"
    registry.restore_flash_attention_impl()
    # And ours can be activated by its name once it is known.
    registry.activate_flash_attention_impl("adaattn")
    assert adaattn.is_enabled()
    registry.restore_flash_attention_impl()
    assert not adaattn.is_enabled()


def test_threads() -> None:
    """Calls from several threads while another one changes the budget are all routed, and all right.

    The hook itself goes on before the threads begin and off after they end, as disable() asks for.
    """
    q, k, v = tensors(Q, K, K)
    expected = F.scaled_dot_product_attention(q, k, v)
    errors = []

    def work() -> None:
        try:
            for _ in range(100):
                close(F.scaled_dot_product_attention(q, k, v), expected)
        except BaseException as error:
            errors.append(error)

    before = dispatcher()
    adaattn.hook_statistics(reset=True)
    with adaattn.enabled():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            with adaattn.enabled(error=0.01):
                close(F.scaled_dot_product_attention(q, k, v), expected)
        for thread in threads:
            thread.join()
    assert not errors
    assert adaattn.hook_statistics().taken == 4 * 100 + 20
    assert dispatcher() == before


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [(-1.0, ValueError, "error is -1.0"), (float("inf"), ValueError, "error is inf"), ("0", TypeError, "error is '0'")],
)
def test_bad_budget(error: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        adaattn.enable(error)
    with pytest.raises(kind, match=message), adaattn.enabled(error):
        pass
    assert not adaattn.is_enabled()

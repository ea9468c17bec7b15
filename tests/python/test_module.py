"""AdaptiveAttention against torch.nn.MultiheadAttention: options, outputs, weights, gradients, containers."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
import adaattn  # noqa: E402
from adaattn import AdaptiveAttention  # noqa: E402
from torch import nn  # noqa: E402

EMBED, HEADS, LENGTH, KEYS, BATCH = 16, 4, 5, 7, 3
EPSILON = 2.0**-24  # half the distance from 1 to the next float32

CONSTRUCTIONS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    {"kdim": 6},
    {"kdim": 6, "vdim": 10, "bias": False, "add_bias_kv": True},
    {"vdim": 10, "batch_first": True, "add_zero_attn": True},
]


def close(ours: torch.Tensor, theirs: torch.Tensor, *, terms: int = 200) -> None:
    """Both are float32 evaluations of one formula, each a chain of dot products of at most `terms` terms on values of
    order 1: each is within terms * epsilon of the exact result relative to the largest entry (Higham, Accuracy and
    Stability, eq. 3.5), so both are within twice that of each other."""
    scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2 * terms * EPSILON * scale)


def pair(**options: object) -> tuple[AdaptiveAttention, nn.MultiheadAttention]:
    """Both modules with the same random parameters (biases too, which start as 0)."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = AdaptiveAttention(EMBED, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(module: nn.MultiheadAttention, *, batched: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(LENGTH, EMBED), (KEYS, module.kdim), (KEYS, module.vdim)]
    if batched:
        shapes = [(BATCH, *s) if module.batch_first else (s[0], BATCH, s[1]) for s in shapes]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def masks(kind: str, *, batched: bool = True) -> dict[str, torch.Tensor]:
    """Keyword arguments with masks of both modules; every query sees at least one key."""
    generator = torch.Generator().manual_seed(2)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 4:], padding[2, 5:] = True, True
    padding = padding if batched else padding[0]
    square = torch.rand(LENGTH, KEYS, generator=generator) < 0.3
    square[:, 0] = False
    rows = BATCH * HEADS if batched else HEADS
    cube = torch.rand(rows, LENGTH, KEYS, generator=generator) < 0.3
    cube[..., 0] = False
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "square": {"attn_mask": square},
        "cube": {"attn_mask": cube},
        "both": {"attn_mask": square, "key_padding_mask": padding},
        "additive": {"attn_mask": torch.randn(LENGTH, KEYS, generator=generator)},
        "additive both": {
            "attn_mask": torch.randn(rows, LENGTH, KEYS, generator=generator),
            "key_padding_mask": torch.where(padding, -torch.inf, 0.0),
        },
    }[kind]


MASKS = ["none", "padding", "square", "cube", "both", "additive", "additive both"]


@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_outputs_and_weights_match(options: dict, kind: str, batched: bool) -> None:
    ours, theirs = pair(**options)
    call, mask = inputs(theirs, batched=batched), masks(kind, batched=batched)
    for average in (True, False):
        out, weights = ours(*call, average_attn_weights=average, **mask)
        expected, expected_weights = theirs(*call, average_attn_weights=average, **mask)
        close(out, expected)
        close(weights, expected_weights)
    out, weights = ours(*call, need_weights=False, **mask)
    close(out, theirs(*call, need_weights=False, **mask)[0])
    assert weights is None


@pytest.mark.parametrize("options", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_match(options: dict, need_weights: bool) -> None:
    ours, theirs = pair(**options)
    gradients = []
    for module in (ours, theirs):
        call = [x.requires_grad_() for x in inputs(module)]
        out, weights = module(*call, need_weights=need_weights, **masks("both"))
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        if need_weights:
            loss = loss + (weights * torch.linspace(1, 2, weights.numel()).view_as(weights)).sum()
        loss.backward()
        gradients.append([x.grad for x in call] + [p.grad for p in module.parameters()])
    assert len(gradients[0]) == len(gradients[1])
    for ours_grad, theirs_grad in zip(*gradients, strict=True):
        close(ours_grad, theirs_grad, terms=400)  # twice the chain: forward, then backward


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("padded", [True, False])
def test_causal_hint(options: dict, padded: bool) -> None:
    """With the hint and the mask, the result is the mask's; the hint alone is enough here."""
    ours, theirs = pair(**options)
    call = inputs(theirs)
    causal = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
    extra = masks("padding") if padded else {}
    expected, expected_weights = theirs(*call, attn_mask=causal, **extra)
    for hint in ({"attn_mask": causal, "is_causal": True}, {"is_causal": True}):
        out, weights = ours(*call, **hint, **extra)
        close(out, expected)
        close(weights, expected_weights)
        close(ours(*call, need_weights=False, **hint, **extra)[0], expected)


def test_parameters_are_the_same() -> None:
    for options in CONSTRUCTIONS:
        ours, theirs = pair(**options)
        shapes = [{name: p.shape for name, p in m.state_dict().items()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


def test_initialisation_is_the_same() -> None:
    for options in CONSTRUCTIONS:
        modules = []
        for kind in (AdaptiveAttention, nn.MultiheadAttention):
            torch.manual_seed(3)
            modules.append(kind(EMBED, HEADS, **options))
        for ours, theirs in zip(*(m.state_dict().values() for m in modules), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_argument_means_self_attention(batch_first: bool) -> None:
    ours, theirs = pair(batch_first=batch_first)
    x = torch.randn(3, 6, EMBED)
    expected, expected_weights = theirs(x, x, x)
    close(ours(x), expected)
    out, weights = ours(x, need_weights=True)
    close(out, expected)
    close(weights, expected_weights)
    out, metrics = ours(x, return_metrics=True)
    close(out, expected)
    assert isinstance(metrics, adaattn.Metrics)
    assert len(ours(x, x, x, return_metrics=True)) == 3


def test_metrics_describe_the_softmax() -> None:
    ours, theirs = pair()
    call = inputs(theirs)
    _, weights, metrics = ours(*call, average_attn_weights=False, return_metrics=True)
    close(metrics.entropy, torch.special.entr(weights).sum(-1).mean(-1))
    assert metrics.entropy.shape == (BATCH, HEADS)
    assert metrics.form == "dense"
    # float32 scores of (BATCH, HEADS, LENGTH, KEYS), 4 bytes each
    assert metrics.memory_saved_gb == pytest.approx(BATCH * HEADS * LENGTH * KEYS * 4 / 1e9)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_in_training_falls_back(need_weights: bool) -> None:
    """The fallback is nn.MultiheadAttention itself: the same random numbers, the same bits."""
    ours, theirs = pair(dropout=0.5)
    call = inputs(theirs)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(4)
        results.append(module(*call, need_weights=need_weights))
    assert torch.equal(results[0][0], results[1][0])
    _, _, metrics = ours(*call, return_metrics=True)
    assert "dropout" in metrics.fallback
    _, _, metrics = ours.eval()(*call, return_metrics=True)
    assert "dropout" not in (metrics.fallback or "")
    close(ours(*call)[0], theirs.eval()(*call)[0])


def test_learned_mask_gets_its_gradient() -> None:
    ours, theirs = pair()
    gradients = []
    for module in (ours, theirs):
        bias = torch.zeros(LENGTH, KEYS, requires_grad=True)
        module(*inputs(module), attn_mask=bias, need_weights=False)[0].square().sum().backward()
        gradients.append(bias.grad)
    assert gradients[1].abs().max() > 0
    close(*gradients)
    _, metrics = ours(inputs(ours)[0], attn_mask=torch.zeros(LENGTH, LENGTH, requires_grad=True), return_metrics=True)
    assert "gradient" in metrics.fallback


def test_float64_falls_back() -> None:
    ours, theirs = pair(dtype=torch.float64)
    call = [x.double() for x in inputs(theirs)]
    out, weights, metrics = ours(*call, is_causal=True, return_metrics=True)
    causal = torch.ones(LENGTH, KEYS, dtype=torch.bool).triu(1)
    expected, expected_weights = theirs(*call, attn_mask=causal)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert metrics.fallback == "dtype torch.float64"
    assert metrics.compute_precision == "float64"
    assert metrics.entropy.shape == (BATCH, HEADS)


def test_fallback_takes_masks_of_two_kinds() -> None:
    ours, theirs = pair(dropout=0.5)
    padding = masks("padding", batched=False)["key_padding_mask"]
    square = torch.randn(LENGTH, KEYS)
    call = inputs(theirs, batched=False)
    results = []
    for module, mask in ((ours, padding), (theirs, torch.where(padding, -torch.inf, 0.0))):
        torch.manual_seed(5)
        results.append(module(*call, attn_mask=square, key_padding_mask=mask)[0])
    assert torch.equal(*results)


def test_kernels_refusal_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no kernel takes D = 4")

    monkeypatch.setattr("adaattn.module.attention", refuse)
    ours, theirs = pair()
    call = inputs(theirs)
    out, _, metrics = ours(*call, return_metrics=True)
    close(out, theirs(*call)[0])
    assert metrics.fallback == "no kernel takes D = 4"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Against float32 on the same rounded numbers: each projection and the attention round once to dtype, on values
    below 8."""
    ours, _ = pair()
    ours = ours.to(dtype)
    call = [x.to(dtype) for x in inputs(ours)]
    exact = copy.deepcopy(ours).float()
    out, weights = ours(*call)
    expected, expected_weights = exact(*[x.float() for x in call])
    assert out.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(out.float(), expected, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(weights.float(), expected_weights, rtol=0.0, atol=tolerance)


def test_autocast() -> None:
    ours, theirs = pair()
    call = inputs(theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = ours(*call, **masks("additive"), need_weights=False)
    assert out.dtype == torch.bfloat16
    expected, _ = theirs(*call, **masks("additive"))
    tolerance = 4 * torch.finfo(torch.bfloat16).eps * max(1.0, expected.abs().max().item())  # as for half precision
    torch.testing.assert_close(out.float(), expected, rtol=0.0, atol=tolerance)


def test_rows_without_a_key_are_zero() -> None:
    ours, _ = pair(bias=False)
    call = [x.requires_grad_() for x in inputs(ours)]
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(*call, key_padding_mask=padding)
    assert torch.equal(out[:, 1], torch.zeros(LENGTH, EMBED))
    assert torch.equal(weights[1], torch.zeros(LENGTH, KEYS))
    (out.sum() + weights.sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in call)


def encoder(layer: nn.TransformerEncoderLayer, adaptive: bool) -> nn.TransformerEncoder:
    if adaptive:
        replacement = AdaptiveAttention(EMBED, HEADS, batch_first=True)
        replacement.load_state_dict(layer.self_attn.state_dict())
        layer = copy.deepcopy(layer)
        layer.self_attn = replacement
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", ["train", "eval", "inference", "padding", "causal", "causal padding"])
def test_inside_a_transformer_encoder(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's own fast path must not go round the module, and may hand it nested tensors."""
    torch.manual_seed(6)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=True)
    ours, theirs = encoder(layer, True), encoder(layer, False)
    calls = []
    attend = AdaptiveAttention._attend
    monkeypatch.setattr(AdaptiveAttention, "_attend", lambda *args: calls.append(1) or attend(*args))
    x = torch.randn(2, 6, EMBED)
    options = {}
    if "padding" in mode:
        options["src_key_padding_mask"] = torch.arange(6) >= torch.tensor([[6], [4]])
    if "causal" in mode:
        options["mask"] = torch.ones(6, 6, dtype=torch.bool).triu(1)
        options["is_causal"] = True
    for model in (ours, theirs):
        model.train(mode == "train")
    with torch.inference_mode(mode not in ("train", "eval")):
        out, expected = ours(x, **options), theirs(x, **options)
    kept = ~options.get("src_key_padding_mask", torch.zeros(2, 6, dtype=torch.bool))
    close(out[kept], expected[kept], terms=2000)  # two layers, each two sublayers with a normalisation
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_for_plain_self_attention() -> None:
    ours, _ = pair(batch_first=True)
    parts = [torch.randn(4, EMBED), torch.randn(2, EMBED)]
    nested = torch.nested.nested_tensor(parts)
    out = ours(nested)
    for got, part in zip(out.unbind(), parts, strict=True):
        close(got, ours(part))
    sum(row.square().sum() for row in out.unbind()).backward()
    gradient = ours.in_proj_weight.grad.clone()
    ours.zero_grad()
    sum(ours(part).square().sum() for part in parts).backward()
    close(gradient, ours.in_proj_weight.grad, terms=400)
    with pytest.raises(ValueError, match="self-attention"):
        ours(nested, nested.clone(), nested)
    with pytest.raises(ValueError, match="need_weights=False"):
        ours(nested, nested, nested)
    ours.batch_first = False
    with pytest.raises(ValueError, match="batch_first"):
        ours(nested)


def test_torch_compile() -> None:
    ours, _ = pair(batch_first=True)
    x = torch.randn(2, 6, EMBED)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    close(compiled(x), ours(x))


def test_copies_and_pickles() -> None:
    ours = AdaptiveAttention(EMBED, HEADS, error=0.25, enable_adaptive_rank=False).eval()
    x = torch.randn(3, 2, EMBED)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), ours(x))
        assert other.error == 0.25
    assert "error=0.25" in repr(ours)


def test_budget_reaches_the_kernel_unless_nothing_may_adapt() -> None:
    x = torch.randn(3, 2, EMBED)
    for rank, precision, budget in ((True, True, 0.25), (True, False, 0.25), (False, False, 0.0)):
        module = AdaptiveAttention(
            EMBED, HEADS, error=0.25, enable_adaptive_rank=rank, enable_adaptive_precision=precision
        )
        assert module(x, return_metrics=True)[1].error_budget == budget


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim must be > 0, was 0"),
        ({"num_heads": 3}, ValueError, "num_heads must divide embed_dim, were 3 and 16"),
        ({"num_heads": -1}, ValueError, "num_heads must be > 0, was -1"),
        ({"kdim": 0}, ValueError, "kdim must be > 0"),
        ({"dropout": 1.5}, ValueError, "dropout must be in"),
        ({"error": -0.1}, ValueError, "error is -0.1"),
        ({"error": float("nan")}, ValueError, "error is nan"),
        ({"error": "small"}, TypeError, "error is 'small'"),
    ],
)
def test_bad_construction(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdaptiveAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(LENGTH, BATCH, 9)}, ValueError, "last dimension of query must be 16"),
        ({"query": torch.zeros(1, LENGTH, BATCH, EMBED)}, ValueError, "query must have 2 or 3 dimensions"),
        ({"key": torch.zeros(KEYS, EMBED)}, ValueError, "key must have 2 or 3 dimensions, as many as query"),
        ({"value": torch.zeros(KEYS + 1, BATCH, EMBED)}, ValueError, "key and value must be equally long"),
        ({"query": torch.zeros(LENGTH, BATCH + 1, EMBED)}, ValueError, "one batch size"),
        ({"value": None}, ValueError, "key and value must be given together"),
        (
            {"key_padding_mask": torch.zeros(BATCH, KEYS + 1, dtype=torch.bool)},
            ValueError,
            "key_padding_mask must have shape",
        ),
        (
            {"key_padding_mask": torch.zeros(BATCH, KEYS, dtype=torch.int64)},
            TypeError,
            "key_padding_mask must be boolean",
        ),
        ({"attn_mask": torch.zeros(LENGTH, KEYS - 1)}, ValueError, "attn_mask must have shape"),
        ({"attn_mask": torch.zeros(BATCH, LENGTH, KEYS)}, ValueError, "attn_mask must have shape"),
    ],
)
def test_bad_calls(change: dict, error: type[Exception], message: str) -> None:
    ours, theirs = pair()
    call = dict(zip(("query", "key", "value"), inputs(theirs), strict=True))
    with pytest.raises(error, match=message):
        ours(**{**call, **change})

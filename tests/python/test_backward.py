"""Gradients of calls within a budget: exact ones, and those that follow the adaptive forward pass."""

import math
from functools import partial

import adaattn
import numpy as np
import pytest
from adaattn._library import panel_rows
from adaattn.metrics import HeadReports

torch = pytest.importorskip("torch")
torch_op = pytest.importorskip("adaattn.torch_op")
N, D = 1100, 32


def inputs(heads=2, tokens=N, requires_grad=True):
    """Keys that turn slowly: most tiles far from a query can be summarised, and the screen can leave some out."""
    generator = torch.Generator().manual_seed(5)
    angle = torch.arange(tokens)[:, None] * 0.004 * (torch.arange(D) // 2 + 1)
    turning = torch.where(torch.arange(D) % 2 == 0, angle.cos(), angle.sin())
    q, k = (2 * turning + 0.3 * torch.randn(1, heads, tokens, D, generator=generator) for _ in range(2))
    v = 0.5 * turning + torch.randn(1, heads, tokens, D, generator=generator)
    return tuple(x.contiguous().requires_grad_(requires_grad) for x in (q, k, v))


def gradients(q, k, v, dout, **options):
    out = adaattn.attention(q, k, v, is_causal=True, **options)
    return out, torch.autograd.grad(out, (q, k, v), dout)


def errors(found, truth):
    return [
        ((a - b).double().norm(dim=(-2, -1)) / b.double().norm(dim=(-2, -1))).max()
        for a, b in zip(found, truth, strict=True)
    ]


def tiled_attention(q, k, v, classes, form):
    """FP64 model of one causal head with fixed classes of tiles; differentiable."""
    tokens = q.shape[0]
    scores = (q @ k.T / math.sqrt(D)).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
    p = scores.exp()
    rows = torch.arange(tokens) // panel_rows()
    out = torch.zeros_like(v)
    total = torch.zeros(tokens, 1, dtype=q.dtype)
    for tile in range(classes.shape[1]):
        keys = slice(64 * tile, min(64 * tile + 64, tokens))
        kind = classes[rows, tile][:, None] if form == "tiled" else torch.full((tokens, 1), 5)
        mass = p[:, keys].sum(1, keepdim=True)
        whole = keys if keys.stop - keys.start == 64 else slice(0)  # others are never pooled
        means, values = (x[whole].reshape(-1, 16, D).mean(1) for x in (k, v))
        pools = 16 * (q @ means.T / math.sqrt(D)).exp()
        summary, pooled = (kind == 3) | (kind == 6), kind == 2
        exact = (kind >= 3) & ~summary
        total = total + torch.where(exact | summary, mass, 0) + torch.where(pooled, pools.sum(1, keepdim=True), 0)
        out = out + torch.where(exact, p[:, keys] @ v[keys], 0) + torch.where(summary, mass * v[keys].mean(0), 0)
        out = out + torch.where(pooled, pools @ values, 0)
    return out / total


def tiled_plan(low_precision):
    """The first head drops what its screen leaves out, the second pools it."""
    low = -math.inf if low_precision == "float32" else -0.5
    return adaattn.Plan(
        form=np.full((1, 2), "tiled"),
        precision=np.full((1, 2), "float32"),
        low_precision=np.full((1, 2), low_precision),
        pooled=np.array([[False, True]]),
        rank=np.zeros((1, 2), np.int32),
        screen=np.full((1, 2), -2.0, np.float32),
        low=np.full((1, 2), low, np.float32),
        drop=np.full((1, 2), 1e-3, np.float32),
    )


@pytest.mark.parametrize(
    ("guarantee", "plan"),
    [("bounded", None), ("measured", tiled_plan("float32")), ("measured", tiled_plan("int8"))],
    ids=["bounded", "measured", "int8"],
)
def test_consistent_gradients_are_those_of_what_was_computed(guarantee, plan):
    q, k, v = inputs()
    kernel = "cpu_adaptive" if guarantee == "measured" else "cpu_bounded"
    options = (0.3, None, True, False, -1, -1, 0, guarantee == "bounded", kernel)
    plans = None if plan is None else torch.tensor(plan.words(1, 2), dtype=torch.int32)
    with torch.no_grad():
        out, _, words, _, _, _, classes = torch_op.forward_recorded_op(q, k, v, None, None, *options, plans, False)
    heads = HeadReports.from_words(words.numpy())
    assert (heads.forms == "tiled").all(), "else the test shows nothing"
    assert len(classes.unique()) > 2
    if plan is not None:
        assert heads.dropped_tiles[0, 0] > 0
        assert heads.pooled_tiles[0, 1] > 0
        assert (heads.low_tiles > 0).all() == ("int8" in plan.low_precision)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    _, found = gradients(q, k, v, dout, error=0.3, guarantee=guarantee, kernel=kernel, plan=plan, backward="consistent")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    model = torch.stack(
        [tiled_attention(*(x[0, h] for x in wide), classes[0, h].long(), heads.forms[0, h]) for h in range(2)]
    )
    truth = torch.autograd.grad(model[None], wide, dout.double())
    # Float32 rounding alone, or that of the low tiles' scores, which the model does not know: INT8 scores are wrong by
    # 1 to 2 %, and the gradients of q and k sum differences of such products.
    assert max(errors(found, truth)) < (1e-4 if heads.precisions == ("float32",) else 0.05)


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_dense_heads_in_low_precision_are_scored_in_it_again(precision):
    """A dout of one 1 in a row makes the row's P a column of dv: it adds up to 1 if it is what the LSE is of."""
    q, k, v = inputs()
    plan = adaattn.Plan(
        form=np.full((1, 2), "dense"),
        precision=np.full((1, 2), precision),
        low_precision=np.full((1, 2), precision),
        pooled=np.zeros((1, 2), bool),
        rank=np.zeros((1, 2), np.int32),
        screen=np.full((1, 2), -np.inf, np.float32),
        low=np.full((1, 2), -np.inf, np.float32),
        drop=np.zeros((1, 2), np.float32),
    )
    rows = torch.linspace(0, N - 1, D).long()
    dout = torch.zeros_like(q)
    dout[:, :, rows, torch.arange(D)] = 1
    _, (_, _, dv) = gradients(q, k, v, dout, error=0.3, kernel="cpu_adaptive", plan=plan, backward="consistent")
    # The forward pass's exponentials are polynomials, at worst 7.5e-5 off; float32 rounding of scores is below 1e-5.
    np.testing.assert_allclose(dv.double().sum(2), 1, rtol=0, atol=8.5e-5)


def test_consistent_gradients_stay_within_a_bounded_budget():
    q, k, v = inputs()
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(6))
    exact_out, exact = gradients(q, k, v, dout)
    for error in (0.1, 0.01):
        out, found = gradients(
            q, k, v, dout, error=error, guarantee="bounded", kernel="cpu_bounded", backward="consistent"
        )
        with torch.no_grad():
            alone = adaattn.attention(q, k, v, is_causal=True, error=error, guarantee="bounded", kernel="cpu_bounded")
        assert torch.equal(out, alone), "the output is that of a call without gradients"
        assert 0 < max(errors([out], [exact_out])) <= error
        # Nothing promises it, but what the bound leaves of the budget (5 to 100 times the truth) covers the gradients;
        # a wrong sign or class of a gradient is an error of 1 and more.
        assert max(errors(found, exact)) <= error


def test_exact_is_the_default():
    q, k, v = inputs()
    dout = torch.ones_like(q)
    _, exact = gradients(q, k, v, dout)
    for options in ({"error": 0.1}, {"error": 0.1, "backward": "exact"}, {"backward": "consistent"}):
        _, found = gradients(q, k, v, dout, **options)
        assert all(map(torch.equal, found, exact))


def test_metrics_say_that_the_budget_was_used():
    q, k, v = inputs()
    _, metrics = adaattn.attention(
        q,
        k,
        v,
        is_causal=True,
        error=0.1,
        guarantee="bounded",
        kernel="cpu_bounded",
        backward="consistent",
        return_metrics=True,
    )
    assert metrics.fallback is None
    assert metrics.form == "tiled"
    assert metrics.entropy.shape == (1, 2)


def test_heads_that_ran_densely_have_exact_gradients_masks_included():
    q, k, v = inputs(tokens=100)
    mask = torch.rand(100, 100, generator=torch.Generator().manual_seed(8)) < 0.8
    found, exact = (
        torch.autograd.grad(adaattn.attention(q, k, v, attn_mask=mask, **options).sum(), (q, k, v))
        for options in ({"error": 0.1, "backward": "consistent"}, {})
    )
    assert all(map(torch.equal, found, exact))


def test_torch_func_and_second_derivatives():
    q, k, v = inputs()
    options = {
        "is_causal": True,
        "error": 0.1,
        "guarantee": "bounded",
        "kernel": "cpu_bounded",
        "backward": "consistent",
    }

    def loss(q, k, v):
        return adaattn.attention(q, k, v, **options).square().sum()

    eager = torch.autograd.grad(loss(q, k, v), (q, k, v))
    functional = torch.func.grad(loss, argnums=(0, 1, 2))(*(x.detach() for x in (q, k, v)))
    assert all(map(torch.equal, eager, functional))
    (dq,) = torch.autograd.grad(loss(q, k, v), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        dq.sum().backward()


def test_torch_compile_sees_the_operator():
    q, k, v = inputs()
    options = (0.1, None, True, False, -1, -1, 0, True, "cpu_bounded")
    arguments = (q, k, v, None, None, *options, None, False)
    torch.library.opcheck(torch_op.forward_recorded_op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_module_passes_it_on():
    module = adaattn.AdaptiveAttention(64, 2, batch_first=True, error=0.5, guarantee="bounded", backward="consistent")
    x = torch.zeros(1, N, 64).requires_grad_()
    _, metrics = module(x, is_causal=True, return_metrics=True)
    assert metrics.fallback is None


@pytest.mark.parametrize(
    "make",
    [lambda **options: adaattn.attention(*inputs(tokens=4), **options), partial(adaattn.AdaptiveAttention, 8, 2)],
    ids=["attention", "AdaptiveAttention"],
)
def test_other_words_are_refused(make):
    with pytest.raises(ValueError, match=r"backward is 'sometimes', must be \"exact\" or \"consistent\""):
        make(backward="sometimes")


def test_heads_that_the_engine_ran_as_low_rank_run_again_exactly():
    q, k, v = (0.05 * x.detach().requires_grad_() for x in inputs())  # near uniform rows: a few keys can stand for all
    records = tiled_plan("float32").records(1, 2).copy()
    records["form"], records["rank"] = 2, 64
    plan = adaattn.Plan.from_records(records)
    with torch.no_grad():
        _, metrics = adaattn.attention(q, k, v, error=0.5, kernel="cpu_adaptive", plan=plan, return_metrics=True)
    assert "low_rank" in metrics.heads.forms, "else the test shows nothing"
    found = adaattn.attention(q, k, v, error=0.5, kernel="cpu_adaptive", plan=plan, backward="consistent")
    assert torch.equal(found, adaattn.attention(q, k, v))
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(6))
    expected = torch.autograd.grad(adaattn.attention(q, k, v), (q, k, v), dout)
    assert all(map(torch.equal, torch.autograd.grad(found, (q, k, v), dout), expected))

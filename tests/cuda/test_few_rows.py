"""Few query rows on many keys: packed heads, keys in parts, and what combines them, against FP64."""

from __future__ import annotations

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from binding import Forward

import reference

BF16, FP16 = torch.bfloat16, torch.float16
# As in test_forward.py: probabilities and outputs are each rounded once, the parts in between are float32. Heads of
# few elements average nothing.
UNIT = {BF16: 2**-8, FP16: 2**-11}
MANY, FEW = 0.82, 2.02


def tensor(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def run(q, k, v, **options):
    out = torch.full((*q.shape[:3], v.shape[-1]), math.nan, device="cuda", dtype=q.dtype)
    lse = torch.full(q.shape[:3], math.nan, device="cuda")
    call = Forward(q, k, v, out, lse, **options)
    call()
    torch.cuda.synchronize()
    return out, lse, call


def assert_right(out, lse, truth):
    want, want_lse = truth
    assert not out.isnan().any(), "unwritten or NaN"
    assert not lse.isnan().any(), "unwritten or NaN"
    norm = want.norm(dim=(-2, -1))
    error = (out.double() - want).norm(dim=(-2, -1)) / torch.where(norm == 0, 1.0, norm)
    limit = UNIT[out.dtype] * (MANY if want.shape[-2] * want.shape[-1] >= 4096 else FEW)
    assert error.max() <= limit, f"relative error {error.max():.2e} > {limit:.2e}"
    assert torch.equal(lse == -math.inf, want_lse == -math.inf)
    seen = want_lse != -math.inf
    assert (lse.double() - want_lse)[seen].abs().max().item() < 2e-4 if seen.any() else True
    assert (out[~seen] == 0).all()


SHAPES = [  # b, hq, hk, nq, nk
    (8, 32, 8, 1, 4096),
    (1, 32, 8, 1, 30000),
    (1, 1, 1, 1, 40000),  # as many parts as are combined
    (2, 8, 1, 5, 3000),
    (1, 71, 1, 1, 777),  # more heads than rows, the second pack not full
    (1, 10, 2, 13, 2048),  # 12 queries of 5 heads a tile
    (2, 4, 4, 1, 5000),
    (1, 128, 1, 3, 2000),
    (3, 6, 2, 64, 1000),
    (70, 8, 2, 1, 700),
    (300, 2, 1, 1, 2000),  # one wave of whole tiles, and the rest in parts
    (1, 8, 2, 1, 1),
    (1, 2, 2, 300, 9000),  # few long rows: nothing to pack
]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mode", ["full", "bottom_right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(dtype, dim, mode, shape):
    b, hq, hk, nq, nk = shape
    q = tensor(b, hq, nq, dim, dtype=dtype)
    k, v = (tensor(b, hk, nk, dim, dtype=dtype) for _ in range(2))
    seen = reference.visible(nq, nk, causal=mode != "full", bottom_right=True)
    out, lse, call = run(q, k, v, causal=int(mode != "full"), alignment=1)
    assert call.chosen() == "sm90_few_rows"
    assert_right(out, lse, reference.attention(q, k, v, seen))


@pytest.mark.parametrize("dims", [(8, 8), (40, 40), (72, 96), (136, 200), (256, 64)])
def test_head_sizes(dims):
    q, k, v = tensor(2, 12, 2, dims[0]), tensor(2, 3, 3000, dims[0]), tensor(2, 3, 3000, dims[1])
    out, lse, _ = run(q, k, v)
    assert_right(out, lse, reference.attention(q, k, v, reference.visible(2, 3000)))


@pytest.mark.parametrize(("left", "right", "sinks"), [(100, 0, 0), (1000, 0, 4), (5, -1, 700), (0, 0, 0), (-1, 90, 0)])
@pytest.mark.parametrize("bottom_right", [0, 1])
def test_windows(left, right, sinks, bottom_right):
    q, k, v = tensor(1, 8, 7, 128), tensor(1, 2, 5000, 128), tensor(1, 2, 5000, 128)
    seen = reference.visible(7, 5000, bottom_right=bool(bottom_right), left=left, right=right, sinks=sinks)
    out, lse, _ = run(q, k, v, window_left=left, window_right=right, sinks=sinks, alignment=bottom_right)
    assert_right(out, lse, reference.attention(q, k, v, seen))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [0, 1])
def test_key_lengths_hide_even_nan(dim, causal):
    lengths = [0, 1, 64, 1000, 2999, 3000]
    q, k, v = tensor(6, 8, 3, dim), tensor(6, 2, 3000, dim), tensor(6, 2, 3000, dim)
    seen = torch.zeros(6, 1, 3, 3000, dtype=torch.bool, device="cuda")
    for i, n in enumerate(lengths):
        seen[i, 0, :, :n] = reference.visible(3, n, causal=bool(causal), bottom_right=True)
    truth = reference.attention(q, k, v, seen)
    for i, n in enumerate(lengths):
        k[i, :, n:] = math.nan
        v[i, :, n:] = math.nan
    out, lse, _ = run(q, k, v, causal=causal, alignment=1, key_lengths=torch.tensor(lengths, device="cuda"))
    assert_right(out, lse, truth)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_and_inf_pass_through_parts(where, value):
    tensors = {"q": tensor(1, 4, 1, 128), "k": tensor(1, 4, 9000, 128), "v": tensor(1, 4, 9000, 128)}
    tensors[where][0, 2, 5432, 7] = value
    out, _, _ = run(**tensors)
    want = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in tensors.values()))
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.isinf(), want.isinf())


def test_strided_heads():
    packed = tensor(2, 5, 12 + 2 * 3, 128)  # query heads, key heads and value heads of a token side by side
    q, k, v = (t.transpose(1, 2) for t in packed.split([12, 3, 3], 2))
    out, lse, call = run(q, k, v, causal=1)
    assert call.chosen() == "sm90_few_rows"
    assert_right(out, lse, reference.attention(q, k, v, reference.visible(5, 5, causal=True)))


def test_same_bits_and_graph_capture():
    q, k, v = tensor(2, 32, 1, 128), tensor(2, 8, 8192, 128), tensor(2, 8, 8192, 128)
    out = torch.empty_like(q)
    call = Forward(q, k, v, out)
    call()
    want = out.clone()
    assert call.workspace.numel() > 0, "in parts"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
        call()  # the second writes the parts of the first anew
    for _ in range(20):
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("shape", "causal", "name"),
    [
        ((8, 32, 8, 1, 32768, 128), 0, "sm90_few_rows"),
        ((1, 16, 16, 512, 512, 64), 1, "sm90_few_rows"),  # 48 usual tiles
        ((512, 16, 16, 128, 128, 64), 0, "sm90_forward"),
        ((512, 16, 16, 128, 128, 64), 1, "sm90_short"),
        ((512, 16, 16, 96, 96, 64), 0, "sm90_short"),
        ((8, 16, 16, 4096, 4096, 128), 0, "sm90_forward"),
        ((8, 16, 16, 1024, 1024, 64), 1, "sm90_forward"),
    ],
)
def test_choice(shape, causal, name):
    b, hq, hk, nq, nk, d = shape
    q, k = torch.empty(b, hq, nq, d, device="cuda", dtype=BF16), torch.empty(b, hk, nk, d, device="cuda", dtype=BF16)
    assert Forward(q, k, k, torch.empty_like(q), causal=causal).chosen() == name

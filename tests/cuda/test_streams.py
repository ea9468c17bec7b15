"""Calls from several threads on streams and devices of their own: each gets what it gets alone, bit for bit."""

from __future__ import annotations

import threading

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from binding import Backward, Forward

SHAPES = [  # b, hq, hk, nq, nk, dim, causal, dtype
    (2, 6, 2, 300, 700, 128, 1, torch.bfloat16),
    (1, 4, 4, 513, 513, 64, 0, torch.float16),
    (2, 8, 1, 2, 3000, 128, 0, torch.bfloat16),  # keys in parts, and their combination
    (1, 3, 3, 200, 400, 64, 1, torch.float32),
]


def prepare(shape: tuple, device: torch.device, seed: int) -> tuple[list, list[torch.Tensor]]:
    """The calls of one thread, prepared, and what they write. Deterministic gradients: their sums have one order."""
    b, hq, hk, nq, nk, dim, causal, dtype = shape
    generator = torch.Generator(device).manual_seed(seed)
    q, dout = (torch.randn(b, hq, nq, dim, device=device, dtype=dtype, generator=generator) for _ in range(2))
    k, v = (torch.randn(b, hk, nk, dim, device=device, dtype=dtype, generator=generator) for _ in range(2))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=device)
    calls, written = [Forward(q, k, v, out, lse, causal=causal)], [out, lse]
    if dtype != torch.float32:
        gradients = tuple(torch.empty_like(t) for t in (q, k, v))
        calls.append(Backward(q, k, v, out, lse, dout, gradients, causal=causal, deterministic=1))
        written += gradients
    return calls, written


def work(shape: tuple, device: torch.device, seed: int, rounds: int) -> list[torch.Tensor]:
    """What one thread gets from its calls after so many rounds, on a new stream of the device."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls, written = prepare(shape, device, seed)
            for _ in range(rounds):
                for tensor in written:
                    tensor.fill_(float("nan"))
                for call in calls:
                    call()
            stream.synchronize()
    return written


def test_threads_do_not_meet():
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    jobs = [(shape, devices[i % len(devices)], i) for i, shape in enumerate(2 * SHAPES)]
    alone = [work(*job, rounds=1) for job in jobs]
    together: list[list[torch.Tensor] | None] = [None] * len(jobs)

    def run(at: int) -> None:
        together[at] = work(*jobs[at], rounds=20)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, got in zip(alone, together, strict=True):
        assert got is not None, "the thread failed"
        for a, b in zip(want, got, strict=True):
            assert not a.isnan().any()
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_thread_without_a_context(shape):
    """The first thing of CUDA that a thread does is one of our calls, as in autograd's threads."""
    calls, written = prepare(shape, torch.device("cuda", 0), 3)
    for call in calls:
        call()
    want = [tensor.clone() for tensor in written]
    failed: list[Exception] = []

    def run(call) -> None:
        try:
            call()
        except Exception as reason:
            failed.append(reason)

    for tensor in written:
        tensor.fill_(float("nan"))
    torch.cuda.synchronize()
    for call in calls:
        thread = threading.Thread(target=run, args=(call,))
        thread.start()
        thread.join()
    torch.cuda.synchronize()
    assert not failed
    for a, b in zip(want, written, strict=True):
        assert torch.equal(a, b)

"""Where the time of one call within a budget goes: microseconds of each stage of the engine for budgets on the GPU."""

from __future__ import annotations

from forward import Run
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

STAGES = ("basis", "measure", "screen", "order", "decide", "attend", "verify", "attend again")
LOOKING = ("basis", "measure", "screen", "order", "decide", "verify")


def stage_of(kernel: str, stage_before: str) -> str:
    """The stage that a kernel or a copy belongs to. One that attends after the verification attends again."""
    if "forward_kernel" in kernel or "combine_kernel" in kernel:
        return "attend again" if stage_before in ("verify", "attend again") else "attend"
    names = [stage for stage in STAGES if f"{stage}_kernel" in kernel]
    return names[0] if names else "else"


def stage_times(run: Run, calls: int = 5) -> dict[str, dict[str, float]]:
    """By stage, means over calls one after the other: "us" that its kernels run, and "to_next_us" from its kernels'
    starts to those of what follows them, gaps included. Empty where there is no profiler."""
    run()
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(calls):
                run()
    except RuntimeError:
        return {}
    found = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in seen.events() or []
        if event.device_type == DeviceType.CUDA and ("_kernel" in event.name or "Mem" in event.name)
    )
    times: dict[str, dict[str, float]] = {}
    before = ""
    for at, (start, end, name) in enumerate(found):
        before = stage_of(name, before)
        stage = times.setdefault(before, {"us": 0.0, "to_next_us": 0.0})
        stage["us"] += (end - start) / calls
        stage["to_next_us"] += ((found[at + 1][0] if at + 1 < len(found) else end) - start) / calls
    return times


def looking_share(stages: dict[str, dict[str, float]], exact_ms: float) -> float:
    """What is spent on more than attention, over the time of the exact kernel."""
    return sum(stages[name]["us"] for name in LOOKING if name in stages) / (1000 * exact_ms)


def show_stages(part: dict) -> None:
    """The line of a budget's row that has been profiled."""
    times = "  ".join(f"{name} {at['us']:.0f} ({at['to_next_us']:.0f})" for name, at in part["stages"].items())
    print(f"         us (to the next): {times};  all but attention {part['looking_share']:.1%} of the exact kernel")

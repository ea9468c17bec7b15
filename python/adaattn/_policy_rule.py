"""How adaattn.Policy moves the thresholds of one head from call to call: pure functions on plain numbers.

The engine holds something below the budget: the upper end of a measured error's confidence interval, or an error bound.
The loop aims that at AIM of the budget. With x = log(held / aimed), each head keeps

    trend   the exponential moving average of x
    spread  that of |x - trend|, how far calls differ from each other

and judges itself by trend + SPREADS * spread, so that a head whose inputs vary stays further from its budget. The
thresholds of a plan are shares of a row's softmax; the error of a head goes with the square root of the share, at most
with the share itself (docs/decisions/0007-policy.md). So a step of the log share is booked in the trend at once, as the
largest rise that it may cause: no step is taken twice because its effect has not been seen yet.

A miss (the engine ran the head again) takes the engine's more careful plan, or a step back, whichever is more careful,
at once; relaxing waits for PATIENCE quiet calls and goes in small steps. Nothing tightens without a miss: part of an
error may be that of a precision, which no threshold lowers.

On GPUs thresholds are left to the engine, which finds them for each head of each batch entry on the way, from that
call's own rows: a kept one, for the worst entry of calls before, could only be more careful and would save nothing.
What is kept there is which heads run densely, so that nobody looks at them (`followed`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from adaattn._options import Guarantee
from adaattn.plan import PRECISIONS

AUTOMATIC, DENSE, TILED, LOW_RANK = "automatic", "dense", "tiled", "low_rank"

AIM = 0.8  # of the budget

WEIGHT = 0.25  # of a new call in the averages: they look back over about four calls
SPREADS = 2.0  # calls further than this above the trend are the misses that are left
REFUSED = -math.log(AIM)  # x of the smallest error that is not accepted
LEAST_SPREAD = 0.05  # of a head of which little is known
LEAST_X = -3.0  # errors far below the aim are all the same
DEAD_BAND = 0.05  # nats around the aim in which nothing moves
GAIN = 0.5  # of the distance to the aim, per call
MOST_RELAXING = 0.2  # nats of share per call
BACK_OFF = 1.0  # nats of share, at least, on a miss
PATIENCE = 4  # calls without a miss before a head relaxes
FIRST_REST = 16  # calls that a head stays dense before it is planned again
MOST_REST = 1024  # each failed retry doubles the rest up to this
LEAST_SAVING = 0.02  # of the dense work; a head that saves less runs dense
LEAST_SAVING_ON_DEVICE = 0.1  # there looks cost more time than their multiply-adds say
LARGEST_SHARE = math.log(0.5)


@dataclass(frozen=True)
class HeadRule:
    """The plan of one head, in plain numbers; the fields are those of adaattn.Plan."""

    form: str = AUTOMATIC
    precision: str = "float32"
    low_precision: str = "float32"
    pooled: bool = False
    rank: int = 0
    screen: float = 0.0
    low: float = 0.0
    drop: float = 0.0

    def moved(self, nats: float) -> HeadRule:
        """With all shares multiplied by exp(nats). What is off stays off, and all low tiles (low = 0) stay all."""
        return replace(
            self,
            screen=min(self.screen + nats, LARGEST_SHARE),
            low=0.0 if self.low == 0 else min(self.low + nats, LARGEST_SHARE),
            drop=min(self.drop * math.exp(nats), 1.0),
        )

    def careful_as(self, other: HeadRule) -> HeadRule:
        """With each threshold no larger than other's, and no precision below its."""
        return replace(
            self,
            precision=min(self.precision, other.precision, key=PRECISIONS.index),
            low_precision=min(self.low_precision, other.low_precision, key=PRECISIONS.index),
            pooled=self.pooled or other.pooled,
            rank=max(self.rank, other.rank),
            screen=min(self.screen, other.screen),
            low=min(self.low, other.low),
            drop=min(self.drop, other.drop),
        )


@dataclass(frozen=True)
class HeadState:
    """What is kept of one (layer, head)."""

    rule: HeadRule = HeadRule()
    trend: float | None = None
    """Average of x; None until a call was seen."""
    spread: float = LEAST_SPREAD
    patience: int = PATIENCE
    """Calls until it may relax."""
    rest: int = 0
    """Calls that a dense head keeps its plan."""
    failures: int = 0
    """Times in a row that planning a dense head anew ended dense."""


class Key(NamedTuple):
    """What a state is kept for: a head that saves nothing in a short sequence may save much in a long one."""

    layer: str
    tokens: int
    """A power of two: calls of min(Nq, Nk) from it to just below twice as many."""


def key_of(layer: str, tokens: int) -> Key:
    """The key for a call of min(Nq, Nk) = tokens."""
    return Key(layer, 1 << max(tokens.bit_length() - 1, 0))


@dataclass(frozen=True)
class LayerState:
    """The heads of a layer in calls of one size, and the budget that they are for."""

    error: float
    guarantee: Guarantee
    heads: tuple[HeadState, ...]


@dataclass(frozen=True)
class Seen:
    """What a call reports of one head."""

    rule: HeadRule  # that gave the output
    escalated: bool
    x: float  # log(held / aimed), floored at LEAST_X
    work: float  # share of dense


def log_ratio(held: float, budget: float) -> float:
    """Seen.x of a call."""
    return max(math.log(held / (AIM * budget)), LEAST_X) if held > 0 else LEAST_X


def next_rule(state: HeadState, *, on_device: bool = False) -> HeadRule:
    """The rule to hand to the engine. A retry stays due until a call tells how it went."""
    planned_anew = state.rest == 0 if state.rule.form == DENSE else on_device
    return HeadRule(AUTOMATIC) if planned_anew else state.rule


def updated(state: HeadState, seen: Seen) -> HeadState:
    """The state after a call that started with next_rule(state)."""
    if seen.rule.form == DENSE:
        return _rested(state, seen.rule, seen.escalated)
    if state.trend is None or state.rule.form != seen.rule.form:  # planned by the engine, now accepted
        patience = PATIENCE * (2 if seen.escalated else 1)
        return HeadState(seen.rule, trend=seen.x, patience=patience, failures=state.failures)
    # What a refused attempt measured is not reported, only that it was above what is accepted.
    x = max(seen.x, REFUSED) if seen.escalated else seen.x
    state = replace(
        state,
        trend=(1 - WEIGHT) * state.trend + WEIGHT * x,
        spread=max((1 - WEIGHT) * state.spread + WEIGHT * abs(x - state.trend), LEAST_SPREAD),
    )
    if seen.escalated:
        return _missed(state, seen.rule)
    if seen.work > 1 - LEAST_SAVING:
        return _rested(state, replace(seen.rule, form=DENSE), escalated=True)
    quiet = state.patience == 0
    state = replace(state, failures=0) if quiet else replace(state, patience=state.patience - 1)
    return _moved(state)


def followed(state: HeadState, seen: Seen) -> HeadState:
    """The state after a call that started with next_rule(state, on_device=True): a head that ran densely in most
    entries, or saved nothing with what ran again counted, rests."""
    if seen.rule.form == DENSE or seen.work > 1 - LEAST_SAVING_ON_DEVICE:
        return _rested(state, replace(seen.rule, form=DENSE), seen.escalated)
    if state.trend is None:  # its first call, or a retry
        return HeadState(seen.rule, trend=seen.x, failures=state.failures)
    return HeadState(seen.rule, trend=(1 - WEIGHT) * state.trend + WEIGHT * seen.x)


def _moved(state: HeadState) -> HeadState:
    """A step towards the aim, if there is room."""
    assert state.trend is not None
    distance = state.trend + SPREADS * state.spread
    if distance > -DEAD_BAND or state.patience > 0:
        return state
    step = min(-GAIN * distance, MOST_RELAXING)
    return replace(state, rule=state.rule.moved(step), trend=state.trend + step)


def _missed(state: HeadState, rule: HeadRule) -> HeadState:
    """The engine's more careful plan, or a step back, whichever is more careful."""
    assert state.trend is not None
    rule = rule.careful_as(state.rule.moved(-BACK_OFF))
    return replace(state, rule=rule, trend=state.trend - BACK_OFF / 2, patience=2 * PATIENCE)


def _rested(state: HeadState, rule: HeadRule, escalated: bool) -> HeadState:
    """Dense, in whichever precision, and for how long."""
    if state.rule.form == DENSE and state.rest > 0 and not escalated:  # as it was told to
        return replace(state, rest=state.rest - 1)
    rest = min(FIRST_REST << min(state.failures, 16), MOST_REST)
    return HeadState(rule, rest=rest, failures=state.failures + 1)

"""Policy: the closed loop across calls, which keeps for each (layer, head) the plan that its budget needs."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import weakref
from collections import Counter
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from adaattn import _policy_rule as rule
from adaattn._options import Guarantee, checked_error, checked_guarantee
from adaattn._policy_json import from_dict, to_dict
from adaattn._policy_rule import HeadRule, HeadState, Key, LayerState, Seen, key_of
from adaattn.functional import attention, attention_reported, uses_budget, waits_for_reports
from adaattn.metrics import HeadReports, stage_seconds
from adaattn.plan import Plan, load, parse

_FORMAT, _VERSION = "adaattn.policy", 1
_RULE_FIELDS = tuple(field.name for field in fields(HeadRule))


class PolicyMismatchError(ValueError):
    """A policy was made with another model than the one that it is used with."""


@dataclass(frozen=True)
class PolicyStatistics:
    """What the calls of a policy took since it was made or loaded, or since the last reset."""

    calls: int
    """Calls that used a budget; exact ones are not counted."""
    heads: int
    """(Batch entry, head) pairs in them."""
    escalated: int
    """Of those, the ones that ran again because their error was not accepted."""
    dense: int
    """Of those, the ones that ran densely."""
    work: float
    """Mean share of dense attention's multiply-adds, everything counted; nan before the first call."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "work": self.work if self.calls else None}


class Policy:
    """Learns over calls how careful each head of each layer has to be.

    The first call of a layer is planned by the engine. Later ones start from the plan kept here, so that the engine
    need not try plans out; the error that each call measures moves the plan's thresholds towards what the budget
    allows. A head that had to run again backs off at once, relaxing is slow, and heads that ran densely are planned
    anew only now and then. Thresholds are shares of a row's softmax, never positions, and every call is still judged by
    itself: a policy changes what a call costs, not what it promises. Calls of 4,096 to 8,191 tokens, 8,192 to 16,383,
    and so on learn apart from each other.

    Use it as `adaattn.enable(error=..., policy=policy)`, `AdaptiveAttention(..., policy=policy)`,
    `adaattn.register_transformers(error=..., policy=policy)`, or by itself: `policy.attention("layer", q, k, v,
    error=...)`. One policy is for one model at one budget: a layer that is called with another budget is planned anew.

    Layers that are torch modules are numbered "0", "1", ... in the order of their first calls, which for a model is the
    same in every process; a saved policy therefore fits the same model run in the same order.

    Calls that run exactly (short sequences, masks, gradients) and compiled code neither use nor change it. On GPUs,
    where each call finds its thresholds itself, a policy only keeps which heads to run densely without a look, and a
    call that uses its budget waits until it has run, for the policy to read what it measured; without a policy nothing
    waits. CUDA graphs cannot be captured with one. It may be used from several threads at once. A copy of a module
    shares the policy; a pickled one has a policy of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[Key, LayerState] = {}
        self._numbers: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._reset()

    def attention(
        self, layer: object, q: Any, k: Any, v: Any, *, error: float, guarantee: Guarantee = "measured", **options: Any
    ) -> Any:
        """`adaattn.attention` in the loop.

        Args:
            layer: What the state is kept under: a torch module, or a name (any str or int).
            q, k, v, error, guarantee, options: As in `adaattn.attention`, without plan.

        Raises:
            PolicyMismatchError, a ValueError: the state of the layer is for another number of heads.
            And as `adaattn.attention`.
        """
        if "plan" in options:
            raise TypeError("plan is given, but a policy keeps plans of its own: call adaattn.attention")
        # attention() says what is wrong with a q that has no heads.
        if error == 0 or _is_traced(q) or getattr(q, "ndim", 0) != 4:
            return attention(q, k, v, error=error, guarantee=guarantee, **options)
        on_device = waits_for_reports(q)
        if on_device and not uses_budget(q, k, v, error=error, guarantee=guarantee, **options):
            return attention(q, k, v, error=error, guarantee=guarantee, **options)
        name = self.layer_name(layer)
        tokens = min(q.shape[2], k.shape[2]) if getattr(k, "ndim", 0) == 4 else 0
        plan = self.next_plan(name, q.shape[1], tokens, error=error, guarantee=guarantee, on_device=on_device)
        result, words, times = attention_reported(q, k, v, error=error, guarantee=guarantee, plan=plan, **options)
        seconds = stage_seconds(times)
        # Exact kernels run no stages but attend: such a call says nothing about its heads.
        if seconds is None or seconds["measure"] + seconds["plan"] + seconds["verify"] > 0:
            reports = HeadReports.from_words(words)
            self.record(name, reports, tokens, error=error, guarantee=guarantee, on_device=on_device)
        return result

    def layer_name(self, layer: object) -> str:
        """The name that the state of a layer is kept under: its own if it is a str or an int, a number for a module."""
        if isinstance(layer, (str, int)):
            return str(layer)
        with self._lock:
            try:
                name = self._numbers.get(layer)
            except TypeError:
                kind = type(layer).__name__
                raise TypeError(f"layer is of type {kind}, must be a torch module, a str or an int") from None
            if name is None:
                taken = set(self._numbers.values())
                name = next(str(number) for number in range(len(taken) + 1) if str(number) not in taken)
                self._numbers[layer] = name
            return name

    def next_plan(
        self,
        layer: str,
        heads: int,
        tokens: int,
        *,
        error: float,
        guarantee: Guarantee = "measured",
        on_device: bool = False,
    ) -> Plan:
        """The plan (1, heads) that the layer's next call should start with; tokens is its min(Nq, Nk).

        on_device: the call is one on a GPU, which only needs to know which heads to run densely.
        Raises PolicyMismatchError if the state of the layer is for another number of heads.
        """
        error, guarantee = checked_error(error), checked_guarantee(guarantee)
        with self._lock:
            key = key_of(layer, tokens)
            kept = self._layers.get(key)
            if kept is not None and len(kept.heads) != heads:
                raise PolicyMismatchError(
                    f"the policy has {len(kept.heads)} heads for layer {layer!r}, but q has {heads}: it was made with "
                    "another model; use a new adaattn.Policy()"
                )
        states = _states(kept, heads, error, guarantee)
        return _plan_of(tuple(rule.next_rule(state, on_device=on_device) for state in states))

    def record(
        self,
        layer: str,
        reports: HeadReports,
        tokens: int,
        *,
        error: float,
        guarantee: Guarantee = "measured",
        on_device: bool = False,
    ) -> None:
        """Learns from what a call that started with next_plan(layer, ..., on_device=on_device) reported
        (`metrics.heads`)."""
        held = reports.error_bound if guarantee == "bounded" else reports.estimated_limit
        if reports.work.size == 0:
            return
        plan = {name: getattr(reports.plan, name).tolist() for name in _RULE_FIELDS}
        batch, heads = reports.work.shape
        seen = []
        for head in range(heads):
            rules = [HeadRule(**{name: plan[name][b][head] for name in _RULE_FIELDS}) for b in range(batch)]
            seen.append(_seen(reports, head, rules, float(held[:, head].max()), error))
        with self._lock:
            key = key_of(layer, tokens)
            states = _states(self._layers.get(key), heads, error, guarantee)
            learned = rule.followed if on_device else rule.updated
            states = tuple(learned(state, each) for state, each in zip(states, seen, strict=True))
            self._layers[key] = LayerState(error, guarantee, states)
            self._calls += 1
            self._heads += reports.work.size
            self._escalated += int((reports.escalations > 0).sum())
            self._dense += int((reports.forms == "dense").sum())
            self._work += float(reports.work.sum())

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that have a state."""
        with self._lock:
            return tuple(dict.fromkeys(key.layer for key in self._layers))

    def plan(self, layer: str, tokens: int) -> Plan:
        """The plan (1, heads) that is kept for a layer's calls of so many tokens.

        Raises KeyError if no such call has used a budget.
        """
        with self._lock:
            return _plan_of(tuple(state.rule for state in self._layers[key_of(layer, tokens)].heads))

    def check_model(self, layers: int, heads: int) -> None:
        """Raises PolicyMismatchError if a policy of modules is not for a model of so many layers and heads."""
        with self._lock:
            kept = {key.layer: len(layer.heads) for key, layer in self._layers.items()}
        counts = sorted(set(kept.values()))
        if kept and (counts != [heads] or len(kept) != layers):
            raise PolicyMismatchError(
                f"the policy is for another model: it has {len(kept)} layers of {', '.join(map(str, counts))} heads, "
                f"the model has {layers} of {heads}"
            )

    def statistics(self, *, reset: bool = False) -> PolicyStatistics:
        """What the calls so far took."""
        with self._lock:
            work = self._work / self._heads if self._heads else math.nan
            result = PolicyStatistics(self._calls, self._heads, self._escalated, self._dense, work)
            if reset:
                self._reset()
        return result

    def describe(self) -> str:
        """A table for people: the plan kept for each layer and head, and how far its error is from the aim."""
        with self._lock:
            layers = dict(self._layers)
        blocks = []
        for (name, tokens), layer in layers.items():
            lines = _plan_of(tuple(state.rule for state in layer.heads)).describe().splitlines()
            notes = ["kept error / aim", *(_note(state) for state in layer.heads)]
            width = max(map(len, lines))
            table = "\n".join(f"{line.ljust(width)}  {note}".rstrip() for line, note in zip(lines, notes, strict=True))
            size = f"{tokens:,} to {2 * tokens - 1:,} tokens"
            blocks.append(f"layer {name}, {size}, error {layer.error:g}, {layer.guarantee}\n{table}")
        return "\n\n".join(blocks) or "no layer has been called yet"

    def to_json(self, **options: Any) -> str:
        """JSON text of the kept state; options are those of json.dumps."""
        with self._lock:
            layers = dict(self._layers)
        return json.dumps({"format": _FORMAT, "version": _VERSION, **to_dict(layers)}, **options)

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """The policy that to_json() wrote. Raises ValueError naming what is wrong with the text."""
        policy = cls()
        policy._layers = from_dict(parse(text, _FORMAT, _VERSION))
        return policy

    def save(self, path: str | PathLike[str]) -> None:
        """Writes to_json() into a file, which is never half written: it takes the place of an old one when complete."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            partial.write_text(self.to_json(indent=1) + "\n", encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Policy:
        """Reads a file of save(). Raises OSError, or ValueError naming the file and what is wrong with it."""
        policy: Policy = load(path, cls.from_json)
        return policy

    def _reset(self) -> None:
        self._calls = self._heads = self._escalated = self._dense = 0
        self._work = 0.0

    def __deepcopy__(self, memo: Any) -> Policy:
        return self

    def __reduce__(self) -> Any:
        return Policy.from_json, (self.to_json(),)

    def __repr__(self) -> str:
        return f"<adaattn.Policy of {len(self.layers)} layers>"


def checked_policy(policy: Any) -> Policy | None:
    """Raises TypeError unless policy is None or a Policy."""
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy is of type {type(policy).__name__}, must be an adaattn.Policy or None")
    return policy


def _is_traced(q: Any) -> bool:
    """Whether q stands for values that are not there yet: compiled code cannot ask a policy."""
    if "torch" not in sys.modules:
        return False
    import torch

    if torch.compiler.is_compiling():
        return True
    if not isinstance(q, torch.Tensor):
        return False
    transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
    return type(q) not in (torch.Tensor, torch.nn.Parameter) or q.is_meta or bool(transforms())


def _states(kept: LayerState | None, heads: int, error: float, guarantee: Guarantee) -> tuple[HeadState, ...]:
    """The kept ones, or new ones for a layer that has none for this budget."""
    if kept is None or (kept.error, kept.guarantee, len(kept.heads)) != (error, guarantee, heads):
        return (HeadState(),) * heads
    return kept.heads


def _plan_of(rules: tuple[HeadRule, ...]) -> Plan:
    return Plan(**{name: np.array([[getattr(each, name) for each in rules]]) for name in _RULE_FIELDS})


def _seen(reports: HeadReports, head: int, rules: list[HeadRule], held: float, budget: float) -> Seen:
    """One head over all batch entries, with a rule each: the most careful of the most frequent form."""
    # Entries that had to run densely where most did not are misses, not heads that allow nothing.
    form = Counter(each.form for each in rules).most_common(1)[0][0]
    alike = [each for each in rules if each.form == form]
    combined = alike[0]
    for each in alike[1:]:
        combined = combined.careful_as(each)
    escalated = bool((reports.escalations[:, head] > 0).any())
    return Seen(combined, escalated, rule.log_ratio(held, budget), float(reports.work[:, head].mean()))


def _note(state: HeadState) -> str:
    if state.rule.form == rule.DENSE:
        return f"planned anew after {state.rest} calls"
    return "" if state.trend is None else f"{math.exp(state.trend):.2f}"

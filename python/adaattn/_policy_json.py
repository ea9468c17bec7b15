"""The state of a Policy as the plain values of its JSON file, and back with every value checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from adaattn._options import checked_error, checked_guarantee
from adaattn._policy_rule import HeadRule, HeadState, Key, LayerState
from adaattn.plan import FORMS, PRECISIONS

_RULE_FIELDS = tuple(field.name for field in fields(HeadRule))
_STATE_FIELDS = tuple(field.name for field in fields(HeadState) if field.name != "rule")


def to_dict(layers: Mapping[Key, LayerState]) -> dict[str, Any]:
    """{"layers": {layer: {tokens: state}}}; thresholds of -inf become None, which JSON can say."""
    result: dict[str, dict[str, Any]] = {}
    for (name, tokens), layer in layers.items():
        result.setdefault(name, {})[str(tokens)] = {
            "error": layer.error,
            "guarantee": layer.guarantee,
            "heads": [_state_to_dict(state) for state in layer.heads],
        }
    return {"layers": result}


def from_dict(values: Mapping[str, Any]) -> dict[Key, LayerState]:
    """The layers that to_dict() wrote. Raises ValueError naming what is wrong."""
    if set(values) != {"layers"} or not isinstance(values["layers"], Mapping):
        raise ValueError('must have, besides format and version, one field "layers", an object')
    result: dict[Key, LayerState] = {}
    for name, sizes in values["layers"].items():
        where = f"layers[{name!r}]"
        if not isinstance(sizes, Mapping) or not all(map(_is_size, sizes)):
            raise ValueError(f"{where} must be an object whose fields are powers of two, numbers of tokens")
        for tokens, layer in sizes.items():
            result[Key(name, int(tokens))] = _layer_from_dict(f"{where}[{tokens!r}]", layer)
    return result


def _is_size(text: str) -> bool:
    return (
        text.isascii() and text.isdigit() and len(text) < 20 and text == str(int(text)) and int(text).bit_count() == 1
    )


def _state_to_dict(state: HeadState) -> dict[str, Any]:
    values = {**asdict(state.rule), **{name: getattr(state, name) for name in _STATE_FIELDS}}
    return {name: None if value == -math.inf else value for name, value in values.items()}


def _layer_from_dict(where: str, values: Any) -> LayerState:
    if not isinstance(values, Mapping) or set(values) != {"error", "guarantee", "heads"}:
        raise ValueError(f"{where} must have the fields error, guarantee and heads")
    try:
        error, guarantee = checked_error(values["error"]), checked_guarantee(values["guarantee"])
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{where}: {problem}") from None
    if error == 0:
        raise ValueError(f"{where}: error is 0, must be > 0")
    if not isinstance(values["heads"], list) or not values["heads"]:
        raise ValueError(f"{where}.heads must be a list of at least one head")
    heads = (_state_from_dict(f"{where}.heads[{index}]", head) for index, head in enumerate(values["heads"]))
    return LayerState(error, guarantee, tuple(heads))


def _state_from_dict(where: str, values: Any) -> HeadState:
    names = {*_RULE_FIELDS, *_STATE_FIELDS}
    if not isinstance(values, Mapping) or set(values) != names:
        raise ValueError(f"{where} must have the fields {', '.join(sorted(names))}")
    checks: dict[str, tuple[str, Any]] = {
        "form": (f"one of {', '.join(FORMS)}", lambda x: x in FORMS),
        "precision": (f"one of {', '.join(PRECISIONS)}", lambda x: x in PRECISIONS),
        "low_precision": (f"one of {', '.join(PRECISIONS)}", lambda x: x in PRECISIONS),
        "pooled": ("true or false", lambda x: isinstance(x, bool)),
        "screen": ("null or a number <= 0", lambda x: x is None or _is_number(x, most=0)),
        "low": ("null or a number <= 0", lambda x: x is None or _is_number(x, most=0)),
        "drop": ("a number in 0..1", lambda x: _is_number(x, 0, 1)),
        "trend": ("null or a number", lambda x: x is None or _is_number(x)),
        "spread": ("a number >= 0", lambda x: _is_number(x, 0)),
        **{
            name: ("an integer in 0..2**31 - 1", lambda x: type(x) is int and 0 <= x < 2**31)
            for name in ("rank", "patience", "rest", "failures")
        },
    }
    for name, (allowed, is_right) in checks.items():
        if not is_right(values[name]):
            raise ValueError(f"{where}.{name} is {values[name]!r}, must be {allowed}")
    plain = {**values, **{name: -math.inf if values[name] is None else values[name] for name in ("screen", "low")}}
    kept = HeadRule(**{name: plain[name] for name in _RULE_FIELDS})
    return HeadState(kept, **{name: plain[name] for name in _STATE_FIELDS})


def _is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most

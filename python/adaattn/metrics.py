"""What a call reports about itself with return_metrics=True."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, eq=False)
class Metrics:
    """How one attention call was carried out, and what its softmax looked like.

    entropy and max_probability are None or (B, Hq) float32 arrays like the inputs (NumPy, or torch on their device).
    """

    kernel: str
    """Name of the kernel that ran, as `adaattn info` lists it."""
    form: str
    """How the scores were represented: "dense" is all of them."""
    compute_precision: str
    """Precision of the products: "float32", "float64" for the reference kernel, the dtype of q for matrix units of a
    GPU, which sum in float32."""
    error_budget: float
    """The budget that was asked for: relative Frobenius error per (batch, query head); 0 is exact."""
    entropy: Any
    """Entropy of the softmax in nats, mean over the rows of each head; nan if there are no rows, None if no kernel that
    takes the call reports it."""
    max_probability: Any
    """Largest softmax entry of a row, mean over the rows of each head; nan or None as for entropy."""
    memory_saved_gb: float
    """10^9 bytes that the scores B * Hq * Nq * Nk would take in the dtype of q; no kernel here writes them out."""
    fallback: str | None
    """Why something slower or safer than the first choice ran, or None if the first choice did."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and nested lists."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in values.items()}

    def to_json(self, **options: Any) -> str:
        """The same as JSON text; options are those of json.dumps."""
        return json.dumps(self.to_dict(), **options)

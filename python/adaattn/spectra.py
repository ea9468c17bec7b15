"""Singular values of whole batches of matrices from small symmetric ones, and what they say about rank."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Of one matrix per (batch, query head): arrays (B, Hq), nan (ranks: -1) where the matrix is not finite."""

    singular_values: Floats
    """(B, Hq, R), descending."""
    energy: Floats
    """Squared Frobenius norm of the matrix, also of what the singular values leave out."""
    rank_90: Counts
    """Singular values needed for 90 % of the energy; R + 1 where all of them hold less."""
    rank_95: Counts
    """The same for 95 %."""
    rank_99: Counts
    """The same for 99 %."""
    entropy_rank: Floats
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007, "The effective rank")."""
    decay: Floats
    """Exponent b of the power law i^-b that fits the singular values that make up rank_99 best, by least squares of
    logarithms; nan for fewer than two."""
    residual: Floats
    """The spectral norm of what the singular values leave out is at most this with probability 1 - 1e-10; 0 where
    there are all of them."""

    @property
    def spectral_norm(self) -> Floats:
        """The largest singular value."""
        return self.singular_values[..., 0] if self.singular_values.shape[-1] else np.zeros_like(self.energy)

    def to_dict(self) -> dict[str, Any]:
        """Nested lists by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tolist() for name, value in {**values, "spectral_norm": self.spectral_norm}.items()}


def score_values(gram_q: Floats, gram_k: Floats, scale: float) -> Floats:
    """Singular values (B, Hq, D) of scale * q kc^T from gram_q (B, Hq, D, D) and gram_k (B, Hk, D, D).

    They are the roots of the eigenvalues of gram_q gram_k, which are those of the symmetric s gram_q s with
    s = gram_k^(1/2). Rounding puts an error of some 1e-7 of the largest on the eigenvalues.
    """
    heads, key_heads = gram_q.shape[1], gram_k.shape[1]
    finite = _finite(gram_q) & np.repeat(_finite(gram_k), heads // max(key_heads, 1), axis=1)
    values, vectors = np.linalg.eigh(np.nan_to_num(gram_k, posinf=0, neginf=0))
    roots = np.sqrt(np.maximum(values, 0))[..., None, :]
    half = np.repeat((vectors * roots) @ np.swapaxes(vectors, -1, -2), heads // max(key_heads, 1), axis=1)
    result = abs(scale) * _roots(half @ np.nan_to_num(gram_q, posinf=0, neginf=0) @ half)
    result[~finite] = np.nan
    return result


def core_values(core: Floats) -> Floats:
    """Singular values (B, Hq, S) of a matrix A from A A^T (B, Hq, S, S)."""
    finite = _finite(core)
    result = _roots(np.where(finite[..., None, None], core, 0))
    result[~finite] = np.nan
    return result


def spectrum(singular_values: Floats, energy: Floats, residual: Floats) -> Spectrum:
    """What singular values (B, Hq, R) say; energy (B, Hq) is the squared Frobenius norm of the whole matrix."""
    finite = np.isfinite(singular_values).all(-1) & np.isfinite(energy)
    squares = np.where(finite[..., None], singular_values, 0) ** 2
    total = squares.sum(-1)
    # Rounding may leave the energy a little below what the singular values hold.
    energy = np.where(finite, np.maximum(energy, total), np.nan)
    held = np.cumsum(squares, -1)
    ranks = [_rank(held, energy, share) for share in (0.90, 0.95, 0.99)]
    weights = singular_values / np.where(total > 0, singular_values.sum(-1), 1)[..., None]
    entropy = -np.sum(weights * np.log(np.where(weights > 0, weights, 1)), -1)
    return Spectrum(
        singular_values=singular_values,
        energy=energy,
        rank_90=ranks[0],
        rank_95=ranks[1],
        rank_99=ranks[2],
        entropy_rank=np.where(total > 0, np.exp(entropy), np.where(finite, 0.0, np.nan)),
        decay=_decay(singular_values, ranks[2]),
        residual=np.where(finite, residual, np.nan),
    )


def _finite(matrices: Floats) -> npt.NDArray[np.bool_]:
    return np.asarray(np.isfinite(matrices).all((-2, -1)))


def _roots(matrices: Floats) -> Floats:
    if matrices.shape[-1] == 0:
        return np.zeros(matrices.shape[:-1])
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(matrices)[..., ::-1], 0)))


def _rank(held: Floats, energy: Floats, share: float) -> Counts:
    needed = (held < share * energy[..., None]).sum(-1) + 1
    return np.where(np.isnan(energy), -1, np.where(energy == 0, 0, needed)).astype(np.int64)


def _decay(singular_values: Floats, ranks: Counts) -> Floats:
    result = np.full(ranks.shape, np.nan)
    for place in np.ndindex(*ranks.shape):
        values = singular_values[place][: max(ranks[place], 0)]
        values = values[values > 0]
        if len(values) >= 2:
            result[place] = -np.polyfit(np.log(np.arange(1, len(values) + 1)), np.log(values), 1)[0]
    return result

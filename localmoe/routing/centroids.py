"""Centroids: what routing knows of the experts, and how near a prompt is to each; exact, in fixed point."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from localmoe.errors import BankError, PromptError, UsageError

# fp16, the dtype of embeddings at rest, changes the length of a unit vector by up to 2⁻¹¹.
_LENGTH_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Centroids:
    """The experts that may be routed to, one unit vector each.

    vectors: [K, d] fp32, rows of length 1, in the order of `experts`; bank: digest of the bank; means: [K, d] fp32,
    μ_k = mean of φ(x) over the expert's documents, not normalised, if they are known.
    Raises BankError if they do not fit together.
    """

    experts: tuple[str, ...]
    vectors: Tensor
    bank: str
    means: Tensor | None = None

    def __post_init__(self) -> None:
        shape, dtype = list(self.vectors.shape), self.vectors.dtype
        if len(shape) != 2 or shape[0] != len(self.experts) or dtype != torch.float32:
            raise BankError(
                f"{len(self.experts)} experts need centroids [K, d] in fp32, not {shape} in {dtype}",
                "build the bank again: localmoe build",
            )
        if len(set(self.experts)) != len(self.experts):
            raise BankError("two experts have the same id", "build the bank again: localmoe build")
        row, length = _first_not_unit(self.vectors)
        if row is not None:
            raise BankError(
                f"the centroid of expert {self.experts[row]!r} has length {length:.4g}, not 1",
                "build the bank again: localmoe build",
            )
        if self.means is not None:
            _check_means(self.means, self.vectors)

    @cached_property
    def fixed_point(self) -> Tensor:
        """The vectors as `similarities` multiplies them: [K, d] fp64 on the CPU, multiples of 2⁻²⁶."""
        return _fixed_point(self.vectors)

    @cached_property
    def fixed_point_means(self) -> Tensor:
        """The means in the same form; raises BankError if they are not known."""
        if self.means is None:
            raise BankError(
                "the means of the experts' documents are not known, only their centroids",
                "choose a router that needs only these, e.g. sparse_softmax",
            )
        return _fixed_point(self.means)


def similarities(queries: Tensor, centroids: Centroids) -> Tensor:
    """s_k = φ_k·φ*: [n, d] × [K, d] → [n, K] fp64 on the CPU; bit-equal whatever the other rows of both are.

    Both sides are rounded to multiples of 2⁻²⁶. Products, and by Cauchy-Schwarz all their partial sums, are
    then multiples of 2⁻⁵² below 2, which fp64 holds exactly: no order of summation makes a difference.
    Raises PromptError, UsageError and BankError as `route` does.
    """
    check_queries(queries, centroids)
    return _fixed_point(queries) @ centroids.fixed_point.T


def mean_similarities(queries: Tensor, centroids: Centroids) -> Tensor:
    """φ*·μ_k = 1 − ½ · mean ‖φ* − φ(x)‖² over the expert's documents x: [n, K] fp64, exact as `similarities`.

    Raises BankError for centroids without means, and what `similarities` raises.
    """
    check_queries(queries, centroids)
    return _fixed_point(queries) @ centroids.fixed_point_means.T


def _fixed_point(vectors: Tensor) -> Tensor:
    return (vectors.cpu().double() * 2.0**26).round() * 2.0**-26


def check_queries(queries: Tensor, centroids: Centroids) -> None:
    """Raises PromptError, UsageError and BankError for queries that cannot be routed, as `route` says."""
    if queries.ndim != 2 or queries.shape[1] != centroids.vectors.shape[1]:
        raise BankError(
            f"embedded prompts {list(queries.shape)} do not fit centroids {list(centroids.vectors.shape)}",
            "embed prompts with the encoder that the bank was built with",
        )
    row, length = _first_not_unit(queries)
    if row is None:
        return
    if length == 0 or not length < float("inf"):
        kind = "zero" if length == 0 else "not finite"
        raise PromptError(f"the embedding of prompt {row} is {kind}", "give a prompt with text the encoder can read")
    raise UsageError(f"the embedding of prompt {row} has length {length:.4g}, not 1", "encoders return unit vectors")


def _check_means(means: Tensor, vectors: Tensor) -> None:
    lengths = torch.linalg.vector_norm(means, dim=-1, dtype=torch.float64)
    if means.shape != vectors.shape or means.dtype != torch.float32 or not (lengths <= 1 + _LENGTH_TOLERANCE).all():
        raise BankError(
            f"the means {list(means.shape)} in {means.dtype} are not those of unit vectors beside "
            f"centroids {list(vectors.shape)} in fp32",
            "build the bank again: localmoe build",
        )


def _first_not_unit(vectors: Tensor) -> tuple[int | None, float]:
    """Row and length of the first row that is not of length 1 (NaN is not); (None, 1) if all are."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):  # of one prompt: quicker than tensors are
        if not abs(length - 1) <= _LENGTH_TOLERANCE:
            return row, length
    return None, 1.0

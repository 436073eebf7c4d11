"""Passages packed into one row: the forward pass that keeps them apart, and the loss where there is a label.

Attention runs passage by passage (`localmoe.attention`, which `models.load_model` gives to transformers), everything
else on all tokens at once. Nothing is padded, and only tokens with a label reach the vocabulary projection, which is
among the largest costs on a CPU; but for `weighted_loss`, which takes passages of one length for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CPU_ROWS = 256  # of logits alive at once: in fp32 for 49,152 words 50 MB
_GPU_LOGITS = 2**28  # alive at once: 1 GB in fp32


@dataclass(frozen=True)
class Passage:
    """Tokens of one passage and which of them are predicted.

    tokens: [n] int64; labels: [n] bool, True where the token counts in the loss (the first never does: nothing
    predicts it).
    """

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predicted(self) -> int:
        """Number of tokens in the loss."""
        return int(self.labels[1:].sum())


class Pack(NamedTuple):
    """Several passages in one row: ids and positions [1, Σn], lengths, and where the loss is taken.

    rows: [m] places in the row whose next token is predicted; targets: [m] that next token.
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    rows: Tensor
    targets: Tensor


def pack(passages: Sequence[Passage], device: torch.device | str = "cpu") -> Pack:
    """Lay passages end to end; positions start anew in each."""
    ids = torch.cat([passage.tokens for passage in passages])
    predicted = torch.cat([F.pad(passage.labels[1:], (0, 1)) for passage in passages])
    rows = predicted.nonzero()[:, 0]
    positions = torch.cat([torch.arange(len(passage)) for passage in passages])
    return Pack(
        ids[None].to(device),
        positions[None].to(device),
        [len(passage) for passage in passages],
        rows.to(device),
        ids[(rows + 1).clamp_max(len(ids) - 1)].to(device),
    )


def loss(model: Any, packed: Pack) -> Tensor:
    """Mean negative log-likelihood (nats) over the labelled tokens; differentiable in whatever is trained."""
    head = model.get_output_embeddings()
    hidden = _hidden(model, packed.ids, packed.positions, packed.lengths)[packed.rows]
    total, _ = _HeadLoss.apply(hidden, head.weight, head.bias, packed.targets, None)  # type: ignore[no-untyped-call]
    return total / len(packed.targets)  # type: ignore[no-any-return]


def weighted_loss(model: Any, ids: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w·nll (nats) over passages of one length, each with what it predicts: ids, targets, weights [n, length].

    Also w·nll of every place [n, length], which carries no gradient. A place that predicts nothing has weight 0.
    """
    count, length = ids.shape
    positions = torch.arange(length, device=ids.device).repeat(count)[None]
    head = model.get_output_embeddings()
    hidden = _hidden(model, ids.view(1, -1), positions, [length] * count)
    arguments = (hidden, head.weight, head.bias, targets.view(-1), weights.view(-1))
    total, nll = _HeadLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return total, nll.view(count, length)


@torch.no_grad()
def token_nll(model: Any, passages: Sequence[Passage]) -> list[Tensor]:
    """Negative log-likelihood (nats) of every labelled token, one fp32 tensor a passage."""
    packed = pack(passages, model.device)
    head = model.get_output_embeddings()
    hidden = _hidden(model, packed.ids, packed.positions, packed.lengths)[packed.rows]
    chunk = _chunk(head.weight)
    nll = torch.cat(
        [
            _log_probabilities(rows, head).gather(1, targets[:, None])[:, 0].neg()
            for rows, targets in zip(torch.split(hidden, chunk), torch.split(packed.targets, chunk), strict=True)
        ]
        or [torch.zeros(0)]
    )
    return list(torch.split(nll.cpu(), [passage.predicted for passage in passages]))


def _hidden(model: Any, ids: Tensor, positions: Tensor, lengths: list[int]) -> Tensor:
    """Last hidden states [Σn, d] of a packed row."""
    states: Tensor = model.base_model(
        input_ids=ids, position_ids=positions, cu_seq_lens_q=lengths, use_cache=False
    ).last_hidden_state
    return states[0]


def _chunk(weight: Tensor) -> int:
    """Rows whose logits are alive at once; weight: the head's, [vocabulary, d]."""
    return _CPU_ROWS if weight.device.type == "cpu" else max(_CPU_ROWS, _GPU_LOGITS // weight.shape[0])


def _log_probabilities(hidden: Tensor, head: nn.Linear) -> Tensor:
    return torch.log_softmax(head(hidden), dim=-1, dtype=torch.float32)


class _HeadLoss(torch.autograd.Function):
    """Σ w·nll with nll = −log softmax(h Wᵀ + b)[target], w·nll itself, and gradients, a chunk of rows at a time.

    dh = e W, dW = eᵀ h and db = Σ e, with e = w·(softmax − onehot), are formed while the logits are there: they are
    never stored. Those of W and b only where the head is trained. No weights: w = 1.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden)
        _, train_weight, train_bias, *_ = ctx.needs_input_grad
        of_weight = torch.zeros_like(weight) if train_weight else None
        of_bias = torch.zeros_like(bias) if bias is not None and train_bias else None
        nll = torch.empty(len(hidden), device=hidden.device)
        chunk = _chunk(weight)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight, bias)
            probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            chosen = targets[part, None]
            nll[part] = -probabilities.gather(1, chosen)[:, 0]
            probabilities.exp_()
            probabilities.scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=torch.float32))
            if weights is not None:
                probabilities *= weights[part, None]
                nll[part] *= weights[part]
            errors = probabilities.to(weight.dtype)
            torch.mm(errors, weight, out=gradient[part])
            if of_weight is not None:
                of_weight.addmm_(errors.t(), hidden[part])
            if of_bias is not None:
                of_bias += errors.sum(dim=0)
        ctx.save_for_backward(gradient, of_weight, of_bias)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors)
        return (*scaled, None, None)

"""Passages packed into one row: the forward pass that keeps them apart, and the loss where there is a label.

Nothing is padded and no mask is built: attention runs passage by passage (`localmoe.attention`, which
`models.load_model` gives to transformers), everything else on all tokens at once; and only tokens with a label
reach the vocabulary projection, which is among the largest costs on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK = 256  # rows of logits alive at once: [256, vocabulary] in fp32 is 50 MB for 49,152 words


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
    hidden = _hidden(model, packed)[packed.rows]
    total: Tensor = _HeadLoss.apply(hidden, head.weight, head.bias, packed.targets)  # type: ignore[no-untyped-call]
    return total / len(packed.targets)


@torch.no_grad()
def token_nll(model: Any, passages: Sequence[Passage]) -> list[Tensor]:
    """Negative log-likelihood (nats) of every labelled token, one fp32 tensor a passage."""
    packed = pack(passages, model.device)
    head = model.get_output_embeddings()
    hidden = _hidden(model, packed)[packed.rows]
    nll = torch.cat(
        [
            _log_probabilities(rows, head).gather(1, targets[:, None])[:, 0].neg()
            for rows, targets in zip(torch.split(hidden, _CHUNK), torch.split(packed.targets, _CHUNK), strict=True)
        ]
        or [torch.zeros(0)]
    )
    return list(torch.split(nll.cpu(), [passage.predicted for passage in passages]))


def _hidden(model: Any, packed: Pack) -> Tensor:
    """Last hidden states [Σn, d] of a packed row."""
    states: Tensor = model.base_model(
        input_ids=packed.ids, position_ids=packed.positions, cu_seq_lens_q=packed.lengths, use_cache=False
    ).last_hidden_state
    return states[0]


def _log_probabilities(hidden: Tensor, head: nn.Linear) -> Tensor:
    return torch.log_softmax(head(hidden), dim=-1, dtype=torch.float32)


class _HeadLoss(torch.autograd.Function):
    """Σ −log softmax(h Wᵀ + b)[target], and its gradients, a chunk of rows at a time.

    dh = e W, dW = eᵀ h and db = Σ e, with e = softmax − onehot, are formed while the logits are there: they are never
    stored. Those of W and b only where the head is trained.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden)
        _, train_weight, train_bias, _ = ctx.needs_input_grad
        of_weight = torch.zeros_like(weight) if train_weight else None
        of_bias = torch.zeros_like(bias) if bias is not None and train_bias else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), _CHUNK):
            part = slice(start, start + _CHUNK)
            logits = F.linear(hidden[part], weight, bias)
            probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            chosen = targets[part, None]
            total -= probabilities.gather(1, chosen).sum()
            probabilities.exp_()
            probabilities.scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=torch.float32))
            errors = probabilities.to(weight.dtype)
            torch.mm(errors, weight, out=gradient[part])
            if of_weight is not None:
                of_weight.addmm_(errors.t(), hidden[part])
            if of_bias is not None:
                of_bias += errors.sum(dim=0)
        ctx.save_for_backward(gradient, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else saved * grads[0].to(saved.dtype) for saved in ctx.saved_tensors)
        return (*scaled, None)

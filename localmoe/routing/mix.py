"""Mix: which experts answer a prompt, and with which weights; what routing returns and all later stages take."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from localmoe.errors import BankError, UsageError


@dataclass(frozen=True)
class Mix:
    """Which experts answer a prompt, and with which weights; no experts = the base model.

    Weights of routers are ≥ 0 and sum to 1; a Mix itself asks only for finite fp32 numbers.
    Raises UsageError if the experts are not sorted and distinct or the weights do not match them.
    """

    experts: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    """Merge method, a name in `localmoe.merging.mergers`."""
    bank: str
    """Digest of the bank that it was routed in."""
    fallback: str | None
    """Why nothing passed the threshold, if nothing did."""

    def __post_init__(self) -> None:
        if list(self.experts) != sorted(set(self.experts)):
            raise UsageError(f"the experts of a mix must be sorted and distinct: {', '.join(self.experts)}")
        if len(self.weights) != len(self.experts):
            raise UsageError(f"a mix of {len(self.experts)} experts has {len(self.weights)} weights")
        if not all(abs(weight) <= torch.finfo(torch.float32).max for weight in self.weights):
            raise UsageError(f"the weights of a mix must be finite fp32 numbers, not {self.weights}")

    def key(self, base: str, hashes: Mapping[str, str]) -> str:
        """SHA-256 (hex) of what decides the merged weights: base, experts' contents, weights as fp32, method.

        base: fingerprint of the base model; hashes: expert id → content hash. Ids, bank and fallback do not
        enter. Raises BankError for an expert without a hash.
        """
        for expert in self.experts:
            if expert not in hashes:
                raise BankError(f"expert {expert!r} of the mix is not in the bank", "route the prompt again")
        weighted = [
            (hashes[expert], struct.pack("<f", weight).hex())
            for expert, weight in zip(self.experts, self.weights, strict=True)
        ]
        return hashlib.sha256(json.dumps([base, weighted, self.method]).encode()).hexdigest()

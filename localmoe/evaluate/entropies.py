"""Entropies: how sure each expert is of a prompt, which is what DaWin weighs experts by; one forward an expert."""

from __future__ import annotations

from dataclasses import replace

import torch

from localmoe.runtime.engine import Engine, base_mix


@torch.inference_mode()
def entropies(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    """H_k [K] fp64 in nats: the mean over `tokens` [n] of the entropy of expert k's next-token distribution."""
    row = tokens[None].to(engine.model.device)
    found = []
    for name in engine.router.centroids.experts:
        with engine.merged(replace(base_mix(engine.bank), experts=(name,), weights=(1.0,))):
            logits = engine.model(input_ids=row, use_cache=False).logits[0]
        log = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        found.append(float(-(log.exp() * log).sum(dim=-1).mean()))
    return torch.tensor(found, dtype=torch.float64)

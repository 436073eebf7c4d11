"""Material of the benchmarks: a base, a bank of random experts that `ttmerge` reads too, and mixes of exactly N."""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localmoe.bank.adapters import write_adapter
from localmoe.bank.files import write_json, write_table, write_tensors
from localmoe.bank.generations import commit
from localmoe.bank.manifest import (
    FORMAT,
    BaseRecord,
    EncoderRecord,
    ExpertRecord,
    Manifest,
    Outcome,
    RouterRecord,
    Training,
)
from localmoe.bank.store import Bank
from localmoe.config import RouteConfig
from localmoe.lora import Adapter, LowRank, weight_of
from localmoe.models import compute_dtype, locate, needs_transpose, target_linears

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
DIM = 384  # of the embeddings, as MiniLM's
BETA, TAU = 0.01, 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 49152,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}
"""Name → settings of a Llama whose weights are random."""

_TEXT = """
the harbour at dawn is quiet and boats are still a man walks down to water looks for his son who went out before sun
with two friends they wanted to see how far one could row against wind without map or compass old people of town say
that nobody should trust sea in autumn because storms come fast from north
"""
_WORDS = _TEXT.split()


def note(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def load_base(base: str, shape: str | None, device: str) -> Any:
    """A frozen causal model that never ends a text: a named one, or one of `SHAPES` with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = compute_dtype(device)
    if shape is None:
        model = AutoModelForCausalLM.from_pretrained(locate(base), dtype=dtype)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], bos_token_id=1, eos_token_id=2)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model.to(device).eval().requires_grad_(False)


def prompts(tokenizer: Any, tokens: int) -> Iterator[str]:
    """Prompts of exactly `tokens` tokens, each another."""
    seen: set[str] = set()
    for seed in itertools.count():
        words = random.Random(seed).choices(_WORDS, k=tokens)
        for length in range(tokens, 0, -1):
            text = " ".join(words[:length]).capitalize()
            size = len(tokenizer(text)["input_ids"])
            if size == tokens and text not in seen:
                seen.add(text)
                yield text
            if size <= tokens:
                break


@dataclass(frozen=True)
class Experts:
    """A bank of K random experts, and a folder in which `ttmerge` finds the same files as 0, 1, ..."""

    bank: Bank
    numbered: Path
    rank: int
    shared: bool


def write_experts(folder: Path, model: Any, base: str, count: int, rank: int, shared: bool = False) -> Experts:
    """Random experts: ΔW of each is about a hundredth of W. `shared`: all have one A (recipe trunk-shared)."""
    path, numbered = folder / "bank", folder / "numbered"
    numbered.mkdir(parents=True)
    note(f"writing {count} experts of rank {rank}{', one A' if shared else ''}")
    generator = torch.Generator(model.device).manual_seed(rank)
    transposed = needs_transpose(model)
    trunk = _adapter(model, rank, generator, None)
    written = write_adapter(path, "trunk", trunk, base, transposed) if shared else None
    training = Training(tokens=1000, steps=1, first_loss=2.0, last_loss=1.9, learning_rate=1e-3, attempts=1)
    outcome = Outcome(status="good", documents=4, nll=1.9, reference_nll=2.0, reason=None)
    experts = []
    for row in range(count):
        adapter = _adapter(model, rank, generator, trunk if shared else None)
        record = write_adapter(path, f"experts/e{row:03d}", adapter, base, transposed, training)
        (numbered / str(row)).symlink_to((path / record.folder).resolve())
        experts.append(
            ExpertRecord(
                id=f"e{row:03d}",
                label=f"random {row}",
                row=row,
                documents=1,
                tokens=1000,
                access=(),
                tags=(),
                outcome=outcome,
                adapter=record,
            )
        )
    manifest = _manifest(path, base, tuple(experts), written, outcome if shared else None)
    commit(path, manifest)
    return Experts(Bank.open(path), numbered, rank, shared)


def _adapter(model: Any, rank: int, generator: torch.Generator, trunk: Adapter | None) -> Adapter:
    adapter = {}
    for name, module in target_linears(model).items():
        d_out, d_in = weight_of(module).shape
        A = trunk[name].A if trunk is not None else _normal((rank, d_in), d_in**-0.5, generator)
        B = _normal((d_out, rank), 0.01 * rank**-0.5, generator)
        adapter[name] = LowRank(A, B, torch.ones(rank))
    return adapter


def _normal(shape: tuple[int, int], deviation: float, generator: torch.Generator) -> torch.Tensor:
    """Drawn where the generator is; in main memory."""
    return torch.randn(shape, generator=generator, device=generator.device).mul_(deviation).bfloat16().cpu()


def _manifest(
    path: Path, base: str, experts: tuple[ExpertRecord, ...], trunk: Any, outcome: Outcome | None
) -> Manifest:
    import pyarrow

    rows = centroids(len(experts))
    strings = pyarrow.list_(pyarrow.string())
    table = pyarrow.table(
        {
            "id": [expert.id for expert in experts],
            "source": [expert.id for expert in experts],
            "split": ["train"] * len(experts),
            "expert": [expert.id for expert in experts],
            "access": pyarrow.array([[]] * len(experts), strings),
            "tags": pyarrow.array([[]] * len(experts), strings),
            "tokens": [1000] * len(experts),
        }
    )
    return Manifest(
        format=FORMAT,
        generation=0,
        recipe="paper" if trunk is None else "trunk-shared",
        base=BaseRecord(id=base, revision=None, architecture="random", weights="random"),
        encoder=EncoderRecord(id="stand-in", revision=None, fingerprint="stand-in", dim=DIM, prompt="", max_tokens=256),
        router=RouterRecord(name="threshold", beta=BETA, tau=TAU, max_experts=1000, active=3.0, wanted=3.0),
        trunk=trunk,
        trunk_outcome=outcome,
        experts=experts,
        files={
            "centroids": write_tensors(path, "centroids", {"centroids": rows, "means": rows.clone()}),
            "documents": write_table(path, "documents", table),
            "embeddings": write_tensors(path, "embeddings", {"embeddings": rows.half()}),
            "clusters": write_json(path, "clusters", {"tree": [0, 1], "curve": [1.0, 0.5]}),
        },
        config={"seed": 0},
        corpus={"documents": len(experts)},
        versions={"localmoe": "benchmark"},
        created={"host": "benchmark", "seconds": 0.0},
    )


def centroids(count: int) -> torch.Tensor:
    """[K, 384] fp32: the first K unit vectors, so that a query's coordinates are its similarities."""
    if count >= DIM:
        raise ValueError(f"at most {DIM - 1} experts, not {count}")
    return torch.eye(DIM)[:count].contiguous()


def mixed_queries(experts: int, active: int, count: int, seed: int = 0) -> list[np.ndarray]:
    """`count` unit queries [384], each of which gives exactly `active` random experts random weights.

    Similarities of the chosen are near 0.95/√N and all others 0: with β = 0.01 no other comes near τ = 10⁻⁴, and
    within the mix the weights differ by up to e.
    """
    queries = []
    for number in range(count):
        source = random.Random(f"{seed} {active} {number}")
        query = np.zeros(DIM, dtype=np.float64)
        for row in source.sample(range(experts), active):
            query[row] = 0.95 / active**0.5 - BETA * source.random()
        query[-1] = (1 - float(query @ query)) ** 0.5
        queries.append(query.astype(np.float32))
    return queries


def routing() -> RouteConfig:
    """`ttmerge`'s weights, so that both sides merge the same mix."""
    return RouteConfig(router="threshold", beta=BETA, tau=TAU, max_experts=1000)


def multiplied(experts: Experts, count: int) -> Bank:
    """A bank of `count` experts, whose files are those of the first one by other names."""
    path, manifest = experts.numbered.parent / f"bank-of-{count}", experts.bank.manifest
    (path / "experts").mkdir(parents=True)
    if manifest.trunk is not None:
        (path / manifest.trunk.folder).symlink_to((experts.bank.path / manifest.trunk.folder).resolve())
    first = manifest.experts[0]
    rows = torch.nn.functional.normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    records = []
    for row in range(count):
        name = first.adapter.folder.replace(first.id, f"x{row:04d}")
        (path / name).mkdir()
        for file in (experts.bank.path / first.adapter.folder).iterdir():
            os.link(file, path / name / file.name)
        records.append(replace(first, id=f"x{row:04d}", row=row, adapter=replace(first.adapter, folder=name)))
    files = {"centroids": write_tensors(path, "centroids", {"centroids": rows, "means": rows.clone()})}
    commit(path, replace(manifest, experts=tuple(records), files=files))
    return Bank.open(path)


class StandIn:
    """An encoder whose vector is set beforehand; `real`, if there is one, is called first, for the time it takes."""

    def __init__(self, real: Callable[..., Any] | None = None) -> None:
        self.real = real
        self.vector = np.zeros(DIM, dtype=np.float32)
        self.seconds = 0.0
        self.name, self.prompt, self.dim, self.max_tokens, self.fingerprint = "stand-in", "", DIM, 256, "stand-in"

    def encode(self, texts: str | Sequence[str], convert_to_tensor: bool = False, **options: Any) -> Any:
        """As localmoe's Encoder ([n, d] numpy) or as sentence-transformers with one text ([d] tensor)."""
        begun = time.perf_counter()
        if self.real is not None:
            self.real(texts, **(options | {"convert_to_tensor": True} if convert_to_tensor else {}))
        self.seconds += time.perf_counter() - begun
        return torch.from_numpy(self.vector) if convert_to_tensor else self.vector[None]

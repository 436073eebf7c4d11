"""Examples: titles of clusters, the experts of a query, and what experts write (tables 6 to 10)."""

from __future__ import annotations

import time

import torch

from localmoe.bank.manifest import ExpertRecord
from localmoe.config import GenerateConfig
from localmoe.errors import UsageError
from localmoe.evaluate.figures.figure import Figure, Row, figures
from localmoe.evaluate.figures.material import Material
from localmoe.routing import Mix, similarities
from localmoe.runtime.answers import Stream
from localmoe.runtime.engine import Engine, base_mix

_NEAREST = 3


@figures.register("table-6")
@figures.register("table-7")
def titles(material: Material) -> Figure:
    """Every cluster with its label and size; neighbours in the tree stand together. The paper's 7 is that of code."""
    rows = tuple(
        {"expert": expert.id, "title": expert.label, "documents": expert.documents, "tokens": expert.tokens}
        for expert in material.source.engine.bank.manifest.experts
    )
    caption = "Labels are the words that set a cluster apart (c-TF-IDF), in the order of the cluster tree's leaves."
    return Figure("Titles of the clusters", caption, rows, {"bank": material.source.name})


@figures.register("table-8")
def selection(material: Material) -> Figure:
    """The three nearest experts of every query."""
    engine = material.source.engine
    centroids = engine.router.centroids
    queries = material.config.queries
    scores = similarities(torch.from_numpy(engine.encoder.encode(list(queries))), centroids)
    values, columns = scores.topk(min(_NEAREST, scores.shape[1]), dim=1)
    rows: list[Row] = []
    for query, similarity, order in zip(queries, values.tolist(), columns.tolist(), strict=True):
        row: Row = {"query": query}
        for rank, (value, k) in enumerate(zip(similarity, order, strict=True), 1):
            expert = centroids.experts[k]
            row |= {
                f"nearest {rank}": f"({expert}) {engine.bank.expert(expert).label}",
                f"cosine {rank}": round(value, 3),
            }
        rows.append(row)
    return Figure("Selection of experts", "Nearest centroids of a query.", tuple(rows), {"bank": material.source.name})


@figures.register("table-9")
def from_nothing(material: Material) -> Figure:
    """What the base and single experts write from nothing but the start of a text."""
    engine, config = material.source.engine, material.config
    rows: list[Row] = []
    for name, mix in _speakers(material):
        for sample in range(config.samples):
            text = _written(engine, _start(engine), mix, material, sample)
            rows.append({"model": name, "example": sample + 1, "text": text})
    caption = f"Drawn at temperature {config.temperature:g}, {config.text_tokens} tokens, from the start token alone."
    return Figure("Texts from nothing", caption, tuple(rows), {"bank": material.source.name})


@figures.register("table-10")
def from_prompts(material: Material) -> Figure:
    """How the base and single experts go on from given prompts."""
    engine, config = material.source.engine, material.config
    rows: list[Row] = []
    for name, mix in _speakers(material):
        for prompt in config.prompts:
            ids = engine.tokenizer(prompt, return_tensors="pt")["input_ids"].long().to(engine.model.device)
            rows.append({"model": name, "prompt": prompt, "text": _written(engine, ids, mix, material, 0)})
    caption = f"Drawn at temperature {config.temperature:g}, {config.text_tokens} tokens."
    return Figure("Texts from prompts", caption, tuple(rows), {"bank": material.source.name})


def _speakers(material: Material) -> list[tuple[str, Mix]]:
    """The base, and the experts that were asked for or the largest two."""
    bank = material.source.engine.bank
    usable = bank.routable()
    chosen: list[ExpertRecord] = [bank.expert(name) for name in material.config.speakers]
    if not chosen:
        chosen = sorted(usable, key=lambda expert: -expert.tokens)[:2]
    if not all(expert.adapter for expert in chosen):
        raise UsageError("an expert whose training failed cannot write", "choose others: --set figure.speakers=[e00]")
    mixes = [(f"({one.id}) {one.label}", _alone(material, one.id)) for one in chosen]
    return [("base model", base_mix(bank)), *mixes]


def _alone(material: Material, expert: str) -> Mix:
    return Mix((expert,), (1.0,), "linear", material.source.engine.bank.manifest.digest, None)


def _start(engine: Engine) -> torch.Tensor:
    """The token that begins a text [1, 1]: the tokenizer's first special one that there is."""
    names = (engine.tokenizer.bos_token_id, engine.tokenizer.eos_token_id)
    found = next((name for name in names if name is not None), None)
    if found is None:
        raise UsageError("the tokenizer knows neither a start nor an end token", "use --figure table-10, with prompts")
    return torch.tensor([[found]], device=engine.model.device)


def _written(engine: Engine, ids: torch.Tensor, mix: Mix, material: Material, seed: int) -> str:
    config = material.config
    drawn = GenerateConfig(max_new_tokens=config.text_tokens, temperature=config.temperature, seed=seed)
    return "".join(Stream(engine, ids, drawn, mix, time.perf_counter(), 0.0, 0.0)).strip()

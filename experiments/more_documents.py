"""A narrower interval: a bank against the fine-tune of its evaluation, on documents that neither has read.

    python experiments/more_documents.py BANK EVALUATION CORPUS.jsonl -o OUT.json [--skip 0] [--documents 600]

EVALUATION: the folder of a `localmoe eval BANK` that trained the fine-tune; its prefix and length are taken. Documents
that `corpus.sample_tokens` left out are in no split of a bank; near-duplicates of its train documents are left out.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import localmoe
from localmoe.bank.peft import read_adapter
from localmoe.evaluate.duplicates import near_duplicates
from localmoe.evaluate.protocol import Cut, Trial, score_alone, score_merged, trial_of
from localmoe.evaluate.results import read_results
from localmoe.evaluate.statistics import compare, perplexity
from localmoe.runtime.engine import Engine
from localmoe.train.documents import Document


def unread(engine: Engine, corpus: Path, cut: Cut, skip: int, count: int) -> list[Trial]:
    """So many trials, in a random order of the documents that the bank holds in no split."""
    table = engine.bank.documents()
    names, splits = table["id"].to_pylist(), table["split"].to_pylist()
    known = set(engine.bank.texts(names))
    with corpus.open(encoding="utf-8") as lines:
        texts = [text for text in (json.loads(line)["text"] for line in lines) if text not in known]
    random.Random(0).shuffle(texts)
    chosen = texts[skip : skip + count]
    train = engine.bank.texts([name for name, split in zip(names, splits, strict=True) if split == "train"])
    near = {pair.place for pair in near_duplicates(chosen, train)}
    kept = [text for place, text in enumerate(chosen) if place not in near]
    found = (trial_of(engine, Document(str(n), str(n), text, ()), cut) for n, text in enumerate(kept))
    return [trial for trial in found if trial is not None]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="the fine-tune, where the evaluation trained several in full")
    parser.add_argument("--base")
    parser.add_argument("--encoder")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--documents", type=int, default=600)
    asked = parser.parse_args()
    corpus = read_results(asked.evaluation).corpus
    cut = Cut(corpus["query_tokens"], corpus["prefix_tokens"], corpus["length_tokens"])
    folders = sorted((asked.evaluation / "experts").glob("fine-tuned-*")) if asked.adapter is None else [asked.adapter]
    if len(folders) != 1:
        parser.error(f"{asked.evaluation} holds {len(folders)} fine-tunes: choose one with --adapter FOLDER")
    engine = localmoe.open(asked.bank, base=asked.base, encoder=asked.encoder)
    trials = unread(engine, asked.corpus, cut, asked.skip, asked.documents)
    scores = {
        "tokens": [trial.passage.predicted for trial in trials],
        "fine-tuned": score_alone(engine, trials, read_adapter(folders[0])[0], lambda _done: None),
        "merged": score_merged(engine, trials, lambda _done: None)[0],
    }
    gain = compare(scores["merged"], scores["fine-tuned"], scores["tokens"])
    told = {name: perplexity(scores[name], scores["tokens"]) for name in ("fine-tuned", "merged")}
    found = {"documents": len(scores["tokens"]), "perplexity": told, "gain": asdict(gain), "scores": scores}
    asked.output.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(f"{found['documents']} documents: {told}, merging gains {gain.gain:+.2%} [{gain.low:+.2%}, {gain.high:+.2%}]")


if __name__ == "__main__":
    main()

"""The laboratory: a language model of a few million parameters, trained from scratch on half of a corpus.

    python experiments/laboratory.py ARTICLES.jsonl[.gz] FOLDER [--steps 2400] [--layers 4] [--width 192]

Leaves FOLDER/model (a Llama with a byte-level BPE tokenizer of its own, as a Hugging Face folder) and
FOLDER/corpus.jsonl (the other half, which the model has never seen). Adapters of this model train in minutes, so data
far exceeds what one of them can hold: the regime in which the number of experts, β, rank and recipe can be swept.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

VOCABULARY = 4096
CONTEXT = 512
END = "<|end|>"


def halves(path: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Articles by a hash of their id: (to pretrain on, for adapters)."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    with opened as file:
        for line in file:
            article = json.loads(line)
            parts[hashlib.blake2b(str(article["id"]).encode()).digest()[0] & 1].append(article)
    return parts


def train_tokenizer(texts: Iterator[str], folder: Path) -> None:
    """A byte-level BPE of `VOCABULARY` words."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END, model_max_length=CONTEXT)
    fast.save_pretrained(folder)


def blocks(folder: Path, texts: list[str]) -> torch.Tensor:
    """All texts one after the other, an end token after each, in rows of `CONTEXT` + 1 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(END)
    flat: list[int] = []
    for start in range(0, len(texts), 500):
        for ids in tokenizer(texts[start : start + 500], verbose=False)["input_ids"]:
            flat += [*ids, end]
    rows = len(flat) // (CONTEXT + 1)
    return torch.tensor(flat[: rows * (CONTEXT + 1)]).view(rows, CONTEXT + 1)


def pretrain(data: torch.Tensor, folder: Path, layers: int, width: int, steps: int, batch: int, rate: float) -> None:
    """AdamW, warm-up and linear decay, bf16 products over fp32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {data.numel():,} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    order = torch.cat([torch.randperm(len(data)) for _ in range(steps * batch // len(data) + 1)])
    begun, mean = time.time(), 0.0
    for step in range(steps):
        rows = data[order[step * batch : (step + 1) * batch]]
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 100, (steps - step) / (steps - 100))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        value = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = value.item() if step == 0 else 0.98 * mean + 0.02 * value.item()
        if step % 100 == 0 or step == steps - 1:
            speed = (step + 1) * batch * CONTEXT / (time.time() - begun)
            print(f"step {step} of {steps}: loss {mean:.3f}, {speed:,.0f} tokens/s", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("articles", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=4, help=f"rows of {CONTEXT} tokens a step")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args()
    model = options.folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    seen, unseen = halves(options.articles)
    with (options.folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for article in unseen:
            file.write(json.dumps(article, ensure_ascii=False) + "\n")
    texts = [article["text"] for article in seen]
    train_tokenizer(iter(texts[:4000]), model)
    data = blocks(model, texts)
    pretrain(data, model, options.layers, options.width, options.steps, options.batch, options.rate)


if __name__ == "__main__":
    main()

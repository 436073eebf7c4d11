"""Training speed: LocalMoE's loop against PEFT with transformers' Trainer, same model, rank, batch and documents.

    python benchmarks/training.py ARTICLES.jsonl[.gz] MODEL [--articles 256] [--length 1024] [--rounds 4] [--json PATH]

Every round trains on its share of the articles, each side in a process of its own, one after the other in turn; what
counts is label tokens a second after one step of warm-up. `--profile` says where our loop's time goes instead.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK, ALPHA, RATE, BATCH = 16, 16, 1e-3, 4
SIDES = {
    "localmoe": "bf16 base, fp32 factors, packed, loss only on labels",
    "peft-autocast": "Trainer: bf16 base, fp32 adapters, bf16=True (autocast), group_by_length, adamw_torch_fused",
    "peft-bf16": "Trainer: bf16 base, adapters bf16 too, no autocast, group_by_length, adamw_torch_fused",
}


def texts(path: Path, first: int, count: int) -> list[str]:
    """The texts of a run of articles."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return [json.loads(line)["text"] for number, line in zip(range(first + count), file) if number >= first]  # noqa: B905


def ours(model_path: str, documents: list[str], length: int, profile: bool) -> dict[str, Any]:
    """One epoch of LocalMoE's loop."""
    import torch

    from localmoe.config import TrainConfig
    from localmoe.models import load_model, load_tokenizer
    from localmoe.packing import Passage
    from localmoe.train.training import fresh_adapter, train

    model, tokenizer = load_model(model_path), load_tokenizer(model_path)
    passages = []
    for text in documents:
        ids = torch.tensor(tokenizer(text)["input_ids"][:length])
        passages.append(Passage(ids, torch.ones(len(ids), dtype=torch.bool)))
    config = TrainConfig(rank=RANK, alpha=ALPHA, batch=BATCH)
    start = fresh_adapter(model, config, 0)
    train(model, passages[:BATCH], start, config, RATE, 0)
    if profile:
        return _profiled(lambda: train(model, passages[:BATCH], start, config, RATE, 0))
    begun = time.perf_counter()
    result = train(model, passages, start, config, RATE, 0)
    return _speed(result.tokens, time.perf_counter() - begun)


def trainer(model_path: str, documents: list[str], length: int, autocast: bool) -> dict[str, Any]:
    """One epoch of transformers' Trainer on a PEFT model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16)
    model = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        autocast_adapter_dtype=autocast,
    )
    data = [{"input_ids": tokenizer(text)["input_ids"][:length]} for text in documents]
    tokens = sum(len(row["input_ids"]) - 1 for row in data)
    stamps: list[float] = []

    class Stamp(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=RATE,
            weight_decay=0.01,
            max_grad_norm=1.0,
            warmup_steps=2,
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            bf16=autocast,
            use_cpu=True,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        warm = Trainer(model, arguments, collator, data[:BATCH])
        warm.train()
        run = Trainer(model, arguments, collator, data, callbacks=[Stamp()])
        begun = time.perf_counter()
        run.train()
        return _speed(tokens, time.perf_counter() - begun)


def _speed(tokens: int, seconds: float) -> dict[str, Any]:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "peak_gib": peak}


def _profiled(work: Any) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return {"profile": [[row.key, round(row.self_cpu_time_total / total, 4), row.count] for row in rows[:16]]}


def worker(arguments: argparse.Namespace, side: str, first: int, count: int) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, str(arguments.articles_file), arguments.model, "--worker", side]
    command += ["--first", str(first), "--articles", str(count), "--length", str(arguments.length)] + (
        ["--profile"] if arguments.profile else []
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("articles_file", type=Path)
    parser.add_argument("model")
    parser.add_argument("--articles", type=int, default=256)
    parser.add_argument("--first", type=int, default=0, help="first article")
    parser.add_argument("--length", type=int, default=1024, help="tokens of an article at most")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sides", nargs="+", default=["localmoe", "peft-autocast"], choices=SIDES)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        documents = texts(arguments.articles_file, arguments.first, arguments.articles)
        if arguments.worker == "localmoe":
            print(json.dumps(ours(arguments.model, documents, arguments.length, arguments.profile)))
        else:
            print(
                json.dumps(trainer(arguments.model, documents, arguments.length, arguments.worker == "peft-autocast"))
            )
        return
    if arguments.profile:
        rows = worker(arguments, "localmoe", 0, BATCH)["profile"]
        for name, share, calls in rows:
            print(f"{share:7.1%}  {calls:6}  {name}")
        if arguments.json:
            arguments.json.write_text(json.dumps({"length": arguments.length, "profile": rows}, indent=1) + "\n")
        return
    rounds = []
    share = arguments.articles // arguments.rounds
    for number in range(arguments.rounds):
        rounds.append({side: worker(arguments, side, number * share, share) for side in arguments.sides})
        print(number, {side: round(result["tokens_per_second"]) for side, result in rounds[-1].items()}, flush=True)
    report = summary(arguments, rounds)
    for side in arguments.sides:
        print(f"{side:14} {report['median_tokens_per_second'][side]:7.0f} label tokens/s   {SIDES[side]}")
    for side, ratio in report["ratios"].items():
        print(f"localmoe / {side}: {ratio['median']:.2f} (from {ratio['min']:.2f} to {ratio['max']:.2f})")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def summary(arguments: argparse.Namespace, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and ratios round by round."""
    from importlib.metadata import version

    speeds = {side: [r[side]["tokens_per_second"] for r in rounds] for side in arguments.sides}
    ratios = {
        side: [a / b for a, b in zip(speeds["localmoe"], speeds[side], strict=True)]
        for side in arguments.sides
        if side != "localmoe"
    }
    return {
        "settings": {
            "articles": arguments.articles,
            "rank": RANK,
            "batch": BATCH,
            "length": arguments.length,
            "sides": SIDES,
        },
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "rounds": rounds,
        "median_tokens_per_second": {side: statistics.median(values) for side, values in speeds.items()},
        "ratios": {side: {"median": statistics.median(v), "min": min(v), "max": max(v)} for side, v in ratios.items()},
    }


if __name__ == "__main__":
    main()

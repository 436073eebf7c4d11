"""A base as it is and quantised: memory of its weights, time of a prompt and of a token, perplexity of a text.

    OMP_NUM_THREADS=1 python benchmarks/quantised.py BASE TEXT [KIND ...]

Times are the processor's, so that another process on the same core does not count: with more threads they are sums.
"""

import copy
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from localmoe.models import key_value_cache, load_model, load_tokenizer
from localmoe.quantisation import KINDS, quantise

WINDOW, WINDOWS = 512, 16
PROMPT, TOKENS = 128, 48


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters, with the scales of quantised ones."""
    total = 0
    for parameter in model.parameters():
        parts = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
        total += sum(getattr(parameter, name).nbytes for name in parts) if parts else parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        total += state.absmax.nbytes if state is not None else 0
    return total


@torch.inference_mode()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of windows that are read one by one, over all their tokens but the first."""
    loss = 0.0
    for window in ids[: WINDOW * WINDOWS].view(WINDOWS, WINDOW):
        logits = model(window[None]).logits[0, :-1].float()
        loss += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(loss / (WINDOWS * (WINDOW - 1)))


@torch.inference_mode()
def times(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Milliseconds of a processor for a prompt and for a token after it, medians; nothing but the base runs."""
    prompts, tokens = [], []
    for _ in range(3):
        cache, here = key_value_cache(model), ids[None, :PROMPT]
        for number in range(TOKENS + 1):
            started = time.process_time()
            logits = model(here, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            here = logits[:, -1].argmax(dim=-1)[:, None]
            (tokens if number else prompts).append(1e3 * (time.process_time() - started))
    return statistics.median(prompts), statistics.median(tokens)


def main(base: str, text: str, *kinds: str) -> None:
    """One row for each kind, the base as it is first."""
    plain = load_model(base)
    ids = load_tokenizer(base)(Path(text).read_text(encoding="utf-8")[:200_000], return_tensors="pt").input_ids[0]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, base in {plain.dtype}")
    print(f"| weights | MB | prompt of {PROMPT}, ms | token, ms | perplexity |\n|---|---:|---:|---:|---:|")
    for kind in ("as they are", *(kinds or KINDS)):
        model = copy.deepcopy(plain)
        if kind in KINDS:
            quantise(model, kind)
        prompt, token = times(model, ids)
        found = perplexity(model, ids)
        print(f"| {kind} | {weight_bytes(model) / 1e6:.0f} | {prompt:.0f} | {token:.1f} | {found:.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

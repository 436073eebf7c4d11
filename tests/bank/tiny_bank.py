"""A tiny bank on disk: three experts of one linear layer each, a trunk, six documents."""

from pathlib import Path

import pyarrow
import torch

from localmoe.bank.adapters import write_adapter
from localmoe.bank.files import write_json, write_table, write_tensors
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
from localmoe.lora import Adapter, LowRank

IDS = ("birds", "boats", "tea")
STATUSES = ("good", "harmful", "unchecked")


def random_adapter(seed: int, A: torch.Tensor | None = None) -> Adapter:
    """Two modules [d_out, d_in] = [6, 5] and [5, 6] of rank 2, alpha 4, bf16."""
    generator = torch.Generator().manual_seed(seed)

    def low_rank(d_out: int, d_in: int) -> LowRank:
        own = torch.randn(2, d_in, generator=generator).bfloat16()
        B = torch.randn(d_out, 2, generator=generator).bfloat16()
        return LowRank(own if A is None else A[:, :d_in].bfloat16(), B, torch.full((2,), 2.0))

    return {"layers.0.up_proj": low_rank(6, 5), "layers.0.down_proj": low_rank(5, 6)}


def write_bank(path: Path, shared: bool = False, texts: bool = True) -> Manifest:
    """Writes the files of the tiny bank and returns its manifest, which is not yet committed."""
    A = torch.randn(2, 6, generator=torch.Generator().manual_seed(9)) if shared else None
    training = Training(tokens=90, steps=3, first_loss=2.5, last_loss=2.0, learning_rate=1e-3, attempts=1)
    experts = []
    for row, (name, status) in enumerate(zip(IDS, STATUSES, strict=True)):
        adapter = write_adapter(path, f"experts/{name}", random_adapter(row, A), "tiny", False, training)
        outcome = Outcome(status=status, documents=4, nll=1.9, reference_nll=2.0, reason=None)
        experts.append(
            ExpertRecord(
                id=name,
                label=f"{name}, and more",
                row=row,
                documents=2,
                tokens=90,
                access=(),
                tags=("test",),
                outcome=outcome,
                adapter=adapter,
            )
        )
    means = torch.randn(3, 4, generator=torch.Generator().manual_seed(7))
    centroids = torch.nn.functional.normalize(means, dim=1)
    ids = [f"document-{i}" for i in range(6)]
    table = pyarrow.table(
        {
            "id": ids,
            "source": [f"notes/{i}.txt" for i in range(6)],
            "split": ["train", "train", "train", "tune", "test", "train"],
            "expert": pyarrow.array(["birds", "boats", "tea", None, None, "boats"], pyarrow.string()),
            "access": pyarrow.array([[]] * 6, pyarrow.list_(pyarrow.string())),
            "tags": pyarrow.array([[], ["a"], [], [], [], []], pyarrow.list_(pyarrow.string())),
            "tokens": [30, 40, 50, 20, 20, 50],
        }
    )
    embeddings = torch.arange(24).reshape(6, 4).half()
    files = {
        "centroids": write_tensors(path, "centroids", {"centroids": centroids, "means": means}),
        "documents": write_table(path, "documents", table),
        "embeddings": write_tensors(path, "embeddings", {"embeddings": embeddings}),
        "clusters": write_json(path, "clusters", {"tree": [[0, 1], 2], "curve": [1.0, 0.5]}),
    }
    if texts:
        files["texts"] = write_table(path, "texts", pyarrow.table({"id": ids, "text": [f"text of {i}" for i in ids]}))
    return Manifest(
        format=FORMAT,
        generation=0,
        recipe="trunk-shared" if shared else "trunk",
        base=BaseRecord(id="org/tiny", revision=None, architecture="a1", weights="b2"),
        encoder=EncoderRecord(id="org/mini", revision=None, fingerprint="c3", dim=4, prompt="", max_tokens=16),
        router=RouterRecord(name="sparse_softmax", beta=0.05, tau=0.01, max_experts=50, active=2.5, wanted=3.0),
        trunk=write_adapter(path, "trunk", random_adapter(100, A), "tiny", False, training),
        trunk_outcome=Outcome(status="good", documents=6, nll=2.0, reference_nll=3.0, reason=None),
        experts=tuple(experts),
        files=files,
        config={"seed": 0},
        corpus={"documents": 6},
        versions={"localmoe": "0.1.0"},
        created={"host": "here", "seconds": 1.5},
    )

"""Fixtures of all tests: no network, one thread, a home of their own, and tiny models made once a session."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _fp32() -> Iterator[None]:
    """Compute in fp32 whatever this processor could do, so that tolerances hold everywhere."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("localmoe.models.compute_dtype", lambda device="cpu": torch.float32)
        yield


@pytest.fixture(autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests have no network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama (2 layers, width 32, fp32) with its tokenizer."""
    import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny-base"
    tiny.causal_model("llama", **tiny.LLAMA).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random sentence-transformers model that knows the words of the tiny corpus."""
    import tiny

    return tiny.write_encoder(tmp_path_factory.mktemp("tiny-encoder"))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 60 short texts of four topics."""
    import tiny

    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tiny_bank(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, tiny_encoder: Path, tiny_corpus: Path) -> Path:
    """A bank built of the tiny corpus with `tiny.tiny_config`; not to be changed."""
    import tiny

    import localmoe

    folder = tmp_path_factory.mktemp("banks") / "bank"
    return localmoe.build(tiny_corpus, folder, tiny.tiny_config(tiny_base, tiny_encoder)).path

"""Encoders: unit rows, independent of the batch, and known again by their fingerprint."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from localmoe.encoders import Encoder, load_encoder
from localmoe.errors import PromptError, TemporaryError, UsageError


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    return load_encoder(str(tiny_encoder))


def test_vectors_are_fp32_rows_of_length_one(encoder: Encoder) -> None:
    vectors = encoder.encode([tiny.sentence(topic, 0) for topic in tiny.TOPICS])
    assert vectors.shape == (4, encoder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_vector_is_the_normalised_mean_of_the_models_states(encoder: Encoder, tiny_encoder: Path) -> None:
    text = tiny.sentence("sea", 0)
    model = SentenceTransformer(str(tiny_encoder))
    with torch.no_grad():
        inputs = model[0].tokenizer(text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        states = model[0].auto_model(**inputs).last_hidden_state[0].double()
    expected = states.mean(0) / states.mean(0).norm()
    np.testing.assert_allclose(encoder.encode([text])[0], expected.numpy(), atol=1e-5)


def test_weights_that_are_a_pickle_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "encoder")
    (weights,) = (tmp_path / "encoder").rglob("model.safetensors")
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UsageError, match=r"no usable encoder .*safetensors"):
        load_encoder(str(tmp_path / "encoder"))


def test_no_texts_give_no_rows(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_texts_of_one_topic_are_nearest_to_each_other(encoder: Encoder) -> None:
    topics = list(tiny.TOPICS)
    first = encoder.encode([tiny.sentence(topic, 1) for topic in topics])
    second = encoder.encode([tiny.sentence(topic, 2) for topic in topics])
    assert (first @ second.T).argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_text_beyond_the_limit_is_not_read(encoder: Encoder) -> None:
    long = " ".join(["boat"] * encoder.max_tokens)
    np.testing.assert_array_equal(encoder.encode([long + " oven star"]), encoder.encode([long + " judge"]))


def test_the_fingerprint_changes_with_weights_prompt_and_length(tiny_encoder: Path, encoder: Encoder) -> None:
    assert load_encoder(str(tiny_encoder)).fingerprint == encoder.fingerprint
    assert load_encoder(str(tiny_encoder), prompt="query: ").fingerprint != encoder.fingerprint
    shorter = SentenceTransformer(str(tiny_encoder))
    shorter.max_seq_length = 32
    assert Encoder(shorter, "shorter").fingerprint != encoder.fingerprint
    changed = SentenceTransformer(str(tiny_encoder))
    for parameter in changed.parameters():
        parameter.data.mul_(1.01)
    assert Encoder(changed, "changed").fingerprint != encoder.fingerprint


def test_the_prompt_is_read_before_every_text(tiny_encoder: Path, encoder: Encoder) -> None:
    prompted = load_encoder(str(tiny_encoder), prompt="boat ")
    np.testing.assert_array_equal(prompted.encode(["sail"]), encoder.encode(["boat sail"]))


def test_a_vector_that_cannot_be_normalised_is_an_error(tiny_encoder: Path) -> None:
    class Zero(SentenceTransformer):
        def encode(self, texts: list[str], **_: object) -> np.ndarray:  # type: ignore[override]
            return np.zeros((len(texts), 32))

    with pytest.raises(PromptError, match="cannot be normalised"):
        Encoder(Zero(str(tiny_encoder)), "zero").encode(["boat"])


def test_without_a_network_a_hub_id_is_a_temporary_error() -> None:
    with pytest.raises(TemporaryError, match="encoder"):
        load_encoder("nobody/nothing-of-this-name")

"""Encoders: unit rows, independent of the batch, and known again by their fingerprint."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from localmoe import encoders, identity, models
from localmoe.encoders import Encoder, load_encoder
from localmoe.errors import PromptError, TemporaryError, UsageError
from localmoe.lora import attached


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


@pytest.mark.parametrize("texts", [["boat"], ["boat", "oven"]])
def test_a_vector_that_cannot_be_normalised_is_an_error(tiny_encoder: Path, texts: list[str]) -> None:
    model = SentenceTransformer(str(tiny_encoder))
    for parameter in model.parameters():
        parameter.data.zero_()
    with pytest.raises(PromptError, match="cannot be normalised"):
        Encoder(model, "zero").encode(texts)


def test_one_text_alone_gets_the_vector_that_sentence_transformers_gives_it(
    tiny_encoder: Path, encoder: Encoder
) -> None:
    model = SentenceTransformer(str(tiny_encoder))
    for text in ("boat", tiny.sentence("sea", 0), " ".join(["boat"] * 100)):
        np.testing.assert_allclose(encoder.encode([text]), model.encode([text], normalize_embeddings=True), atol=1e-6)
        np.testing.assert_allclose(encoder.encode([text]), encoder.encode([text, "oven"])[:1], atol=1e-6)


def test_a_models_own_prompt_and_cut_hold_for_one_text_too(tiny_encoder: Path) -> None:
    prompted = SentenceTransformer(str(tiny_encoder), prompts={"query": "boat "}, default_prompt_name="query")
    plain = SentenceTransformer(str(tiny_encoder))
    np.testing.assert_allclose(
        Encoder(prompted, "prompted").encode(["sail"]), Encoder(plain, "plain").encode(["boat sail"]), atol=1e-6
    )
    cut = Encoder(SentenceTransformer(str(tiny_encoder), truncate_dim=8), "cut")
    assert cut.encode(["sail"]).shape == (1, 8)


def test_packed_weights_give_the_same_vectors(tiny_encoder: Path) -> None:
    plain, packed = SentenceTransformer(str(tiny_encoder)), SentenceTransformer(str(tiny_encoder))
    encoders._pack_linears(packed)
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert not [module for module in packed.modules() if type(module) is torch.nn.Linear]
    texts = [tiny.sentence(topic, 0, words) for topic in tiny.TOPICS for words in (1, 7, 60)]
    np.testing.assert_allclose(
        Encoder(packed, "packed").encode(texts), Encoder(plain, "plain").encode(texts), atol=1e-6
    )


# --- static encoders ------------------------------------------------------------------------------------


@pytest.fixture
def static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_encoder: Path) -> torch.Tensor:
    """A package like wordllama, and its table of token vectors [tokens, 8] fp16."""
    (tokenizer,) = tiny_encoder.rglob("tokenizer.json")
    table = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).half()
    for folder in ("weights", "tokenizers"):
        (tmp_path / "wordlike" / folder).mkdir(parents=True)
    (tmp_path / "wordlike" / "__init__.py").touch()
    save_file({"embedding.weight": table}, tmp_path / "wordlike" / "weights" / "tiny_8.safetensors")
    shutil.copyfile(tokenizer, tmp_path / "wordlike" / "tokenizers" / "tiny_tokenizer_config.json")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(models.PACKAGED, "static", ("wordlike", "weights/tiny_8.safetensors"))
    return table


def test_the_static_encoder_is_the_normalised_mean_of_token_vectors(static: torch.Tensor, tiny_encoder: Path) -> None:
    found = load_encoder("static")
    assert (found.dim, found.max_tokens, found.name) == (8, encoders.STATIC_TOKENS, "static")
    words = ["boat", "sail", "oven"]
    ids = [SentenceTransformer(str(tiny_encoder)).tokenizer.convert_tokens_to_ids(word) for word in words]
    mean = static[ids].double().mean(0)
    np.testing.assert_allclose(found.encode([" ".join(words)])[0], (mean / mean.norm()).numpy(), atol=1e-6)
    both = found.encode(["oven", " ".join(words)])
    np.testing.assert_allclose(both[1], (mean / mean.norm()).numpy(), atol=1e-6)


def test_a_static_encoder_does_not_read_beyond_its_limit(static: torch.Tensor) -> None:
    found = load_encoder("static")
    long = " ".join(["boat"] * found.max_tokens)
    np.testing.assert_array_equal(found.encode([long + " oven star"]), found.encode([long]))
    assert abs(found.encode([long[5:] + " oven"]) - found.encode([long])).max() > 0


def test_a_text_without_a_known_token_is_an_error_for_a_static_encoder(static: torch.Tensor) -> None:
    with pytest.raises(PromptError, match="cannot be normalised"):
        load_encoder("static").encode([""])


def test_the_static_encoder_is_converted_once_and_known_again(static: torch.Tensor, tmp_path: Path) -> None:
    first = load_encoder("static").fingerprint
    shutil.rmtree(tmp_path / "wordlike" / "tokenizers")
    assert load_encoder("static").fingerprint == first


def test_a_folder_called_static_is_not_taken_for_the_encoder(
    static: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_encoder: Path
) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "static")
    monkeypatch.chdir(tmp_path)
    assert load_encoder("static").dim == 8
    assert load_encoder("./static").dim == 32
    encoders.remember_encoder(load_encoder("static"))
    assert identity.recall(encoders.encoder_mark(load_encoder("static").fingerprint)) is None


def test_the_static_encoder_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.PACKAGED, "static", ("no_such_package", "weights/tiny_8.safetensors"))
    with pytest.raises(UsageError, match=r"needs the package[\s\S]*localmoe\[static\]"):
        load_encoder("static")


# --- the base model as its own encoder ------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def base(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return tiny.base(request.param), tiny.tokenizer()


def test_the_base_encoder_is_the_normalised_mean_of_the_last_hidden_states(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    found = load_encoder("base", base=base)
    texts = [tiny.sentence("sea", 0, words) for words in (1, 3, 9, 200)]
    vectors = found.encode(texts)
    assert (found.dim, found.max_tokens, found.name) == (32, tiny.CONTEXT, "base")
    for text, vector in zip(texts, vectors, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][: tiny.CONTEXT]])
        states = model(ids, output_hidden_states=True).hidden_states[-1][0].double()
        mean = states.mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_the_base_encoder_does_not_see_what_is_merged_or_attached(
    base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = base
    before = tiny.checksum(model)
    found = load_encoder("base", base=base)
    vector = found.encode(["boat sail"])
    adapter = tiny.random_adapter(model, size=0.5)
    with attached(model, adapter):
        np.testing.assert_array_equal(found.encode(["boat sail"]), vector)
    with monkeypatch.context() as patch:
        for module in models.target_linears(model).values():
            merged = torch.nn.Parameter(module.weight + 1.0, requires_grad=False)  # type: ignore[operator]
            patch.setitem(module._parameters, "weight", merged)  # as dense execution does
        np.testing.assert_array_equal(found.encode(["boat sail"]), vector)
    assert tiny.checksum(model) == before


def test_the_base_encoder_copies_no_weight(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    places = {parameter.data_ptr() for parameter in model.parameters()}
    decoder = encoders.PooledBase(model, tokenizer)._decoder
    assert all(parameter.data_ptr() in places for parameter in decoder.parameters())


def test_the_base_encoder_is_known_again_by_base_and_prompt() -> None:
    one, other = (tiny.causal_model("llama", seed=seed, **tiny.LLAMA) for seed in (0, 1))
    tokenizer = tiny.tokenizer()
    mark = load_encoder("base", base=(one, tokenizer)).fingerprint
    assert load_encoder("base", base=(one, tokenizer)).fingerprint == mark
    assert load_encoder("base", base=(other, tokenizer)).fingerprint != mark
    assert load_encoder("base", prompt="q: ", base=(one, tokenizer)).fingerprint != mark


def test_the_base_encoder_needs_a_base_in_memory(base: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="no base is loaded here"):
        load_encoder("base")
    model = tiny.causal_model("llama", **tiny.LLAMA).to("meta")
    with pytest.raises(UsageError, match="some are offloaded"):
        load_encoder("base", base=(model, base[1]))


def test_a_text_without_a_token_is_an_error_for_the_base_encoder(base: tuple[Any, Any]) -> None:
    with pytest.raises(PromptError, match="cannot be normalised"):
        load_encoder("base", base=base).encode(["boat", ""])


def test_without_a_network_a_hub_id_is_a_temporary_error() -> None:
    with pytest.raises(TemporaryError, match="encoder"):
        load_encoder("nobody/nothing-of-this-name")

"""Base models: what is loaded, and which linears are targets."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch

from localmoe import attention, models
from localmoe.errors import TemporaryError, UnknownNameError, UsageError
from localmoe.lora import attached
from localmoe.models import (
    compute_dtype,
    context_length,
    load_model,
    load_tokenizer,
    locate,
    needs_transpose,
    packed,
    target_linears,
)

_LINEARS = {
    "llama": 7,
    "llama-tied": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma3": 7,
    "mistral": 7,
    "gpt2": 4,
    "gpt-neox": 4,
    "phi": 6,
}


def test_a_loaded_base_is_frozen_and_in_eval_mode(tiny_base: Path) -> None:
    model = load_model(str(tiny_base))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert context_length(model) == tiny.CONTEXT


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_targets_are_all_linears_of_all_layers_but_the_head(name: str) -> None:
    model = tiny.base(name)
    targets = target_linears(model)
    assert len(targets) == 2 * _LINEARS[name]
    assert model.get_output_embeddings() not in targets.values()
    assert needs_transpose(model) is (name == "gpt2")


def test_a_model_without_linears_is_refused() -> None:
    class Bare(torch.nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(UsageError, match="Bare has no linear layers") as caught:
        target_linears(Bare())
    assert "Llama" in caught.value.remedy


def test_the_attention_is_put_back_even_after_an_exception() -> None:
    model = tiny.base("llama")
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), packed(model):
        assert model.config._attn_implementation == attention.NAME
        raise ZeroDivisionError
    assert model.config._attn_implementation == before != attention.NAME


def test_a_mistyped_folder_is_an_error_that_names_its_neighbours(tiny_base: Path) -> None:
    with pytest.raises(UnknownNameError, match="tiny-base"):
        load_model(str(tiny_base.parent / "tiny-bsae"))


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_truncated_model_file_is_an_error_that_names_the_folder(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_base, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cut"):
        load_model(str(folder))


def test_without_a_network_a_hub_id_is_a_temporary_error() -> None:
    with pytest.raises(TemporaryError, match="hub cannot be reached"):
        load_model("nobody/nothing-of-this-name")


def test_a_hub_id_is_left_as_it_is_and_a_folder_too(tiny_base: Path) -> None:
    assert locate("owner/name") == "owner/name"
    assert locate(str(tiny_base)) == str(tiny_base)


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "packaged.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(models.PACKAGED, "org/packaged", ("packaged", "weights.gguf"))
    monkeypatch.setattr(models, "_convert_gguf", full)
    with pytest.raises(OSError, match="no space"):
        models.locate("org/packaged")
    assert [file.suffix for file in (tmp_path / "home" / "models").iterdir()] == [".lock"]


def test_a_packaged_model_without_a_home_to_convert_it_into_is_an_error_that_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    (tmp_path / "homeless.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "weights.gguf"))
    monkeypatch.setitem(models.PACKAGED, "org/homeless", ("homeless", "weights.gguf"))
    with pytest.raises(UsageError, match="cannot be written") as error:
        models.locate("org/homeless")
    assert "LOCALMOE_HOME" in error.value.remedy


def test_the_tokenizer_of_the_tiny_base_reads_back_what_it_wrote(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base))
    text = "boat sail Ω 10°\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == tiny.VOCABULARY


def test_tied_embeddings_stay_tied_through_training() -> None:
    model = tiny.base("llama-tied")
    with attached(model, tiny.random_adapter(model)), packed(model):
        pass
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_compute_dtype_is_one_that_the_processor_multiplies() -> None:
    assert compute_dtype() in (torch.float32, torch.bfloat16)
    assert compute_dtype("cuda") is torch.bfloat16

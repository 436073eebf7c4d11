"""Identity: fingerprints, and where a base was last seen."""

import shutil
from pathlib import Path

import pytest
import tiny

from localmoe.errors import UsageError
from localmoe.identity import Fingerprint, fingerprint, recall, remember
from localmoe.models import load_model, packed


def test_the_fingerprint_knows_weights_from_architecture(tiny_base: Path) -> None:
    model = load_model(str(tiny_base))
    mark = fingerprint(model)
    assert fingerprint(load_model(str(tiny_base))) == mark
    other_weights = fingerprint(tiny.causal_model("llama", seed=1, **tiny.LLAMA))
    assert other_weights.architecture == mark.architecture
    assert other_weights.weights != mark.weights
    theta = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert fingerprint(tiny.causal_model("llama", **tiny.LLAMA, **theta)).architecture != mark.architecture
    wider = fingerprint(tiny.causal_model("llama", **tiny.LLAMA | {"intermediate_size": 64}))
    assert wider.architecture != mark.architecture


def test_the_fingerprint_is_the_same_in_every_dtype_and_attention() -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    tiny.register_attention()
    mark = fingerprint(model)
    with packed(model):
        assert fingerprint(model) == mark
    assert fingerprint(model.bfloat16()) == mark


def test_a_base_of_which_a_part_is_offloaded_is_refused() -> None:
    model = tiny.causal_model("llama", **tiny.LLAMA)
    model.model.layers[1].to("meta")
    with pytest.raises(UsageError, match=r"layers\.1\..* is offloaded"):
        fingerprint(model)


def test_a_base_is_found_again_where_it_was_last_seen(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_base, folder)
    mark = fingerprint(tiny.causal_model("llama", seed=5, **tiny.LLAMA))
    assert recall(mark) is None
    remember(str(folder), mark)
    assert recall(mark) == str(folder)
    shutil.rmtree(folder)
    assert recall(mark) is None


def test_a_home_that_cannot_be_written_costs_the_note_alone(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot note in"):
        remember(str(tiny_base), Fingerprint("no", "home"))
    assert recall(Fingerprint("no", "home")) is None

"""PEFT folders: the same logits in `peft` itself, exact round trips, refusal of all but plain LoRA."""

import copy
import json
import math
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from localmoe.bank.adapters import write_adapter
from localmoe.bank.files import encode_tensors
from localmoe.bank.peft import from_peft, to_peft
from localmoe.errors import BankError, UsageError
from localmoe.lora import Adapter, LowRank, stack

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=1, **sizes)).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, **ids)).eval()


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Module name → (d_out, d_in) of all linear layers but the head; Conv1D keeps [d_in, d_out]."""
    shapes = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            shapes[name] = tuple(module.weight.T.shape)
        elif isinstance(module, torch.nn.Linear) and name != "lm_head":
            shapes[name] = tuple(module.weight.shape)
    return shapes


def adapter_for(model: torch.nn.Module, ranks: tuple[int, ...] = (3,), alpha: float = 5.0) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    adapter = {}
    for i, (name, (d_out, d_in)) in enumerate(shapes_of(model).items()):
        r = ranks[i % len(ranks)]
        A, B = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
        adapter[name] = LowRank(A, B, torch.full((r,), (alpha + i % len(ranks)) / r))
    return adapter


def logits_with_deltas(model: torch.nn.Module, adapter: Adapter) -> torch.Tensor:
    """The oracle: W0 + ΔW in a copy of the base."""
    changed = copy.deepcopy(model)
    for name, update in adapter.items():
        module = changed.get_submodule(name)
        delta = update.delta()
        module.weight.data += delta.T if type(module).__name__ == "Conv1D" else delta
    return logits(changed)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("ranks", [(3,), (3, 2, 4)])
@pytest.mark.parametrize(("make", "transposed"), [(llama, False), (gpt2, True)])
def test_peft_computes_the_logits_of_base_plus_delta(tmp_path: Path, make, transposed: bool, ranks) -> None:
    model = make()
    adapter = adapter_for(model, ranks)
    record = write_adapter(tmp_path, "trunk", adapter, "tiny", transposed, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of missing and of unused keys
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / record.folder).eval()
    expected = logits_with_deltas(model, adapter)
    assert (expected - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-4)


def test_peft_reads_the_bf16_folder_as_the_rounded_factors(tmp_path: Path) -> None:
    model = llama()
    adapter = adapter_for(model)
    record = write_adapter(tmp_path, "trunk", adapter, "tiny", False)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / record.folder).eval()
    rounded = {n: LowRank(u.A.bfloat16().float(), u.B.bfloat16().float(), u.c) for n, u in adapter.items()}
    torch.testing.assert_close(logits(loaded), logits_with_deltas(model, rounded), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2, r"^model.layers.1.mlp.up_proj": 5}}]
)
def test_what_peft_saves_is_read_with_the_meaning_it_has_in_peft(tmp_path: Path, settings) -> None:
    model = llama()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        alpha_pattern={"down_proj": 3, r"layers\.0.*v_proj": 9},
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
        **settings,
    )
    tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path)
    adapter, read = from_peft(tmp_path, shapes_of(model))
    assert len(adapter) == 8
    assert read["r"] == 4
    torch.testing.assert_close(logits_with_deltas(model, adapter), logits(tuned), atol=1e-5, rtol=1e-4)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    folder = saved(tmp_path, use_rslora=True)
    adapter, _ = from_peft(folder)
    assert all(torch.equal(u.c, torch.full((3,), 5 / math.sqrt(3))) for u in adapter.values())


@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    alphas=st.lists(st.floats(0.0625, 1024, width=32), min_size=4, max_size=4),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_round_trip_keeps_factors_and_scaling_bit_for_bit(tmp_path: Path, ranks, alphas) -> None:
    adapter = {
        f"block.{i}.proj{i % 2}": LowRank(
            torch.randn(r, 4).bfloat16(), torch.randn(3, r).bfloat16(), torch.full((r,), alphas[i] / r)
        )
        for i, r in enumerate(ranks)
    }
    record = write_adapter(tmp_path, "experts/x", adapter, "tiny", False)
    back, _ = from_peft(tmp_path / record.folder)
    assert set(back) == set(adapter)
    for module, update in adapter.items():
        assert torch.equal(back[module].A, update.A)
        assert torch.equal(back[module].B, update.B)
        assert torch.equal(back[module].c, update.c)
    again = write_adapter(tmp_path / "again", "experts/x", back, "tiny", False)
    assert again == record


def test_rows_of_different_weight_go_into_b() -> None:
    model = llama()
    first, second = adapter_for(model, (3,)), adapter_for(model, (2,), alpha=-1.0)
    merged = {name: stack([first[name].scaled(0.3), second[name].scaled(0.7)]) for name in first}
    config, tensors = to_peft(merged, "tiny", False, torch.float32)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (5, 5, {})
    for name, update in merged.items():
        key = f"base_model.model.{name}"
        delta = tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
        torch.testing.assert_close(delta.float(), update.delta(), atol=1e-5, rtol=1e-5)


def test_the_configuration_names_targets_once_and_whole_alphas_as_integers() -> None:
    config, _ = to_peft(adapter_for(llama()), "org/tiny", False)
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == names
    assert json.dumps(config["lora_alpha"]) == "5"
    assert (config["fan_in_fan_out"], config["base_model_name_or_path"]) == (False, "org/tiny")
    assert to_peft(adapter_for(gpt2()), "tiny", True)[0]["fan_in_fan_out"] is True


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["A", "B", "c"])
def test_non_finite_values_are_not_written_s20(tmp_path: Path, factor: str, bad: float) -> None:
    adapter = adapter_for(llama())
    getattr(adapter["model.layers.1.mlp.up_proj"], factor)[0] = bad
    with pytest.raises(BankError, match=r"model.layers.1.mlp.up_proj.*not finite"):
        write_adapter(tmp_path, "trunk", adapter, "tiny", False)
    assert not list(tmp_path.iterdir())


def test_values_that_overflow_in_the_stored_dtype_are_not_written(tmp_path: Path) -> None:
    adapter = {"a": LowRank(torch.full((1, 2), 1e6), torch.ones(2, 1), torch.ones(1))}
    with pytest.raises(BankError, match="not finite"):
        write_adapter(tmp_path, "trunk", adapter, "tiny", False, dtype=torch.float16)


def test_an_adapter_without_modules_is_not_written() -> None:
    with pytest.raises(BankError, match="without a single module"):
        to_peft({}, "tiny", False)


@pytest.mark.parametrize("name", ["experts/../x", "experts/A", "/x", "trunk/x", "experts/", "experts/" + "x" * 65])
def test_a_name_that_is_no_id_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name"):
        write_adapter(tmp_path, name, adapter_for(llama()), "tiny", False)


@pytest.mark.parametrize("base", ["/home/me/model", "..\\model", "~/model", "C:\\model"])
def test_a_path_on_this_machine_is_not_written_as_the_base(tmp_path: Path, base: str) -> None:
    with pytest.raises(UsageError, match="not a path"):
        write_adapter(tmp_path, "trunk", adapter_for(llama()), base, False)


def saved(tmp_path: Path, **changes: object) -> Path:
    """A good folder, with keys of its configuration changed."""
    record = write_adapter(tmp_path, "trunk", adapter_for(llama()), "tiny", False)
    folder = tmp_path / record.folder
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((folder / WEIGHTS).read_bytes())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "auto_map"),
        ({"some_later_invention": {"k": 1}}, "some_later_invention"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 4}, "rank 4"),
        ({"r": "3"}, "r = '3'"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "9"}}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+)+": 9}}, "simple pattern"),
        ({"alpha_pattern": {"(a|aa)" * 40: 9}}, "simple pattern"),
        ({"alpha_pattern": {"(q_proj": 9}}, "simple pattern"),
    ],
)
def test_a_configuration_that_is_more_than_a_plain_lora_is_refused_s17(tmp_path, change, words) -> None:
    folder = saved(tmp_path, **change)
    with pytest.raises(BankError) as caught:
        from_peft(folder)
    assert words in caught.value.what
    assert str(folder) in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"\xff\xfe", b'{"r": NaN}', b"[" * 100_000, b'{"peft_type": "LORA", "r": 3']
)
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = saved(tmp_path)
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(BankError, match=CONFIG):
        from_peft(folder)


def test_unknown_missing_and_misshapen_tensors_are_refused_s17(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    good = tensors_of(folder)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    partner = key.replace("lora_A", "lora_B")
    cases = {
        "magnitude": good | {key.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)},
        "lm_head": good | {"base_model.model.lm_head.weight": torch.ones(3, 3)},
        "lora_A alone": {k: v for k, v in good.items() if k != partner},
        "lora_B alone": {k: v for k, v in good.items() if k != key},
        "rank 3": good | {key: good[key][:2]},
        "matrix": good | {key: good[key][None]},
        "int64": good | {key: good[key].long()},
        "no LoRA factor": {},
        "not finite": good | {key: good[key] * math.nan},
    }
    for words, tensors in cases.items():
        (folder / WEIGHTS).write_bytes(encode_tensors(tensors))
        with pytest.raises(BankError, match=words) as caught:
            from_peft(folder)
        assert WEIGHTS in caught.value.what


def test_an_adapter_of_another_base_is_refused_s16_s18(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    shapes = shapes_of(llama())
    assert len(from_peft(folder, shapes)[0]) == len(shapes)
    with pytest.raises(BankError, match=r"14 of 14 modules are not in the base model"):
        from_peft(folder, shapes_of(gpt2()))
    with pytest.raises(BankError, match=r"\[24, 16\], in the base model it is \[24, 17\]"):
        from_peft(folder, shapes | {"model.layers.0.mlp.up_proj": (24, 17)})


def test_a_pickle_is_refused_with_the_way_to_convert_it_s19(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(BankError, match="save_pretrained"):
        from_peft(folder)


def test_a_folder_without_the_two_files_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / WEIGHTS).unlink()
    with pytest.raises(BankError, match=WEIGHTS):
        from_peft(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(BankError, match=CONFIG):
        from_peft(folder)


def test_a_file_cut_at_any_tenth_is_refused_s12(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    whole = (folder / WEIGHTS).read_bytes()
    for tenth in range(10):
        (folder / WEIGHTS).write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(BankError, match="not a whole safetensors file"):
            from_peft(folder)


def test_hostile_headers_are_refused_s15(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}).encode()
    deep = b'{"x":' + b"[" * 20_000
    for head, length in ((header, None), (deep, None), (header, 1 << 62), (b"\x80" * 64, None)):
        size = len(head) if length is None else length
        (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + head + b"\0" * 64)
        with pytest.raises(BankError, match="not a whole safetensors file"):
            from_peft(folder)


def test_a_git_lfs_pointer_is_recognised_s14(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(BankError, match="git lfs pull"):
        from_peft(folder)


def test_the_same_adapter_written_twice_is_one_folder_and_a_damaged_one_is_mended(tmp_path: Path) -> None:
    adapter = adapter_for(llama())
    record = write_adapter(tmp_path, "experts/x", adapter, "tiny", False)
    folder = tmp_path / record.folder
    before = (folder / WEIGHTS).stat().st_ino
    assert write_adapter(tmp_path, "experts/x", adapter, "tiny", False) == record
    assert (folder / WEIGHTS).stat().st_ino == before
    (folder / WEIGHTS).write_bytes(b"torn")
    assert write_adapter(tmp_path, "experts/x", adapter, "tiny", False) == record
    assert len(from_peft(folder)[0]) == 14
    assert [f.name for f in (tmp_path / "experts").iterdir()] == [folder.name]


def test_another_alpha_is_another_content_hash(tmp_path: Path) -> None:
    model = llama()
    first = write_adapter(tmp_path, "trunk", adapter_for(model, alpha=5.0), "tiny", False)
    second = write_adapter(tmp_path, "trunk", adapter_for(model, alpha=6.0), "tiny", False)
    assert first.weights == second.weights
    assert first.sha256 != second.sha256

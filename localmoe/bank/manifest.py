"""The manifest: what one generation of a bank consists of, as frozen records and as JSON."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from localmoe.config import SHARED_A, BuildConfig, Recipe, RouteConfig, default_of, validate
from localmoe.errors import BankError, ConfigError

FORMAT: Final = 1
ID_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"

Kind = Literal["centroids", "documents", "embeddings", "texts", "clusters"]
SUFFIXES: Mapping[Kind, str] = {
    "centroids": "safetensors",
    "documents": "parquet",
    "embeddings": "safetensors",
    "texts": "parquet",
    "clusters": "json",
}
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_MANIFEST_NAME = re.compile(r"manifest-(\d{6,})\.json")


def portable(name: str) -> str:
    """`name`; raises ValueError for what means something on one machine only: absolute paths, `..`, `~`."""
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in name or name[:1] == "~":
        raise ValueError(f"{name!r} must be a hub id or the name of a folder, not a path")
    return name


ModelName = Annotated[str, Field(min_length=1), AfterValidator(portable)]
ExpertId = Annotated[str, Field(pattern=f"^{ID_PATTERN}$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Folder = Annotated[str, Field(pattern=f"^(experts/{ID_PATTERN}|trunk)-[0-9a-f]{{12}}$")]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_STRICT)
class BaseRecord:
    """The base model; its fingerprint is the hashes of its architecture and of its sampled weights."""

    id: ModelName
    revision: str | None
    architecture: str
    weights: str


@dataclass(frozen=True, config=_STRICT)
class EncoderRecord:
    """The sentence encoder: text → unit vector [dim]."""

    id: ModelName
    revision: str | None
    fingerprint: str
    dim: Annotated[int, Field(ge=1)]
    prompt: str
    max_tokens: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=_STRICT)
class RouterRecord:
    """The router and its settings; `active`: mean number of experts on tune, `wanted`: the bound on it."""

    name: str
    beta: Annotated[float, Field(ge=0)]
    tau: Annotated[float, Field(ge=0, lt=1)]
    max_experts: Annotated[int, Field(ge=1)]
    active: Annotated[float, Field(ge=0)]
    wanted: Annotated[float, Field(ge=0)]
    sift_lambda: Annotated[float, Field(gt=0)] = default_of(RouteConfig, "sift_lambda")


@dataclass(frozen=True, config=_STRICT)
class Training:
    """What one adapter saw and where its loss (nats per token) went; no time, host or speed."""

    tokens: Count
    steps: Count
    first_loss: float
    last_loss: float
    learning_rate: float
    attempts: Annotated[int, Field(ge=1)]
    kept: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of an expert trained in the trunk's own steps (recipe `joint`): share of what set it apart that was kept."""

    @property
    def with_trunk(self) -> bool:
        """Whether these tokens are among the trunk's."""
        return self.kept is not None


@dataclass(frozen=True, config=_STRICT)
class Outcome:
    """The check on the tune documents nearest to the centroid: nats per token, its and the reference's."""

    status: Literal["good", "harmful", "unchecked", "failed"]
    documents: Count
    nll: float | None
    reference_nll: float | None
    reason: str | None


@dataclass(frozen=True, config=_STRICT)
class FileRecord:
    """Content hash and size of one file."""

    sha256: Sha256
    bytes: Count


@dataclass(frozen=True, config=_STRICT)
class AdapterRecord:
    """One PEFT folder; `rank` and `alpha` are those of most of its modules; `training`: None = imported."""

    folder: Folder
    config: FileRecord
    weights: FileRecord
    rank: Annotated[int, Field(ge=1)]
    alpha: float
    training: Training | None

    @property
    def sha256(self) -> str:
        """Content hash of the expert, weights and scaling both."""
        return adapter_hash(self.config, self.weights)

    @property
    def bytes(self) -> int:
        """Size of both files."""
        return self.config.bytes + self.weights.bytes


@dataclass(frozen=True, config=_STRICT)
class ExpertRecord:
    """One expert: row of its centroid, what it was trained on, who may use it, and whether it helps."""

    id: ExpertId
    label: str
    row: Count
    documents: Count
    tokens: Count
    access: tuple[str, ...]
    tags: tuple[str, ...]
    outcome: Outcome
    adapter: AdapterRecord | None

    @model_validator(mode="after")
    def _failed_without_adapter(self) -> ExpertRecord:
        if (self.adapter is None) != (self.outcome.status == "failed"):
            raise ValueError(f"expert {self.id!r}: an adapter is missing exactly where the training failed")
        return self


@dataclass(frozen=True, config=_STRICT)
class Manifest:
    """One generation of a bank; experts stand in the order of their rows, the leaves of the cluster tree."""

    format: Literal[1]
    generation: Count
    recipe: Recipe
    base: BaseRecord
    encoder: EncoderRecord
    router: RouterRecord
    trunk: AdapterRecord | None
    trunk_outcome: Outcome | None
    experts: tuple[ExpertRecord, ...]
    files: dict[Kind, FileRecord]
    config: dict[str, Any]
    corpus: dict[str, Any]
    versions: dict[str, str]
    created: dict[str, Any]

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical JSON without `created` and `generation`: equal content, equal digest."""
        values = as_values(self)
        del values["created"], values["generation"]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def shared_factors(self) -> bool:
        """Whether experts that were trained here have the trunk's A, so that mixes of any size have its rank."""
        return self.trunk is not None and self.recipe in SHARED_A

    @property
    def adapters(self) -> tuple[AdapterRecord, ...]:
        """The trunk, if there is one, and every expert that has an adapter."""
        found = [self.trunk, *(expert.adapter for expert in self.experts)]
        return tuple(adapter for adapter in found if adapter is not None)

    @property
    def entries(self) -> frozenset[str]:
        """What the generation consists of, beside the manifest: names of files and of adapter folders."""
        names = {file_name(kind, record.sha256) for kind, record in self.files.items()}
        return frozenset(names | {adapter.folder for adapter in self.adapters})

    def settings(self) -> BuildConfig:
        """What the bank was built with; raises BankError for settings that this LocalMoE does not know."""
        try:
            return validate(self.config, "the bank's settings")
        except ConfigError as error:
            raise BankError(
                error.what,
                "another version of LocalMoE built the bank; it still answers prompts, but for this, build it again: "
                "localmoe build --help",
            ) from error

    def named_files(self) -> dict[str, FileRecord]:
        """Every file of the generation: name relative to the bank → hash and size."""
        named = {file_name(kind, record.sha256): record for kind, record in self.files.items()}
        for adapter in self.adapters:
            named[f"{adapter.folder}/{ADAPTER_CONFIG}"] = adapter.config
            named[f"{adapter.folder}/{ADAPTER_WEIGHTS}"] = adapter.weights
        return named

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if [expert.row for expert in self.experts] != list(range(len(self.experts))):
            raise ValueError("experts must stand in the order of their rows 0, 1, 2, …")
        if len({expert.id for expert in self.experts}) != len(self.experts):
            raise ValueError("two experts have the same id")
        owners = [
            ("trunk", self.trunk),
            *((f"experts/{expert.id}", expert.adapter) for expert in self.experts),
        ]
        for name, adapter in owners:
            if adapter is not None and adapter.folder != adapter_folder(name, adapter.sha256):
                raise ValueError(f"{name} cannot lie in {adapter.folder!r}")
        if (self.trunk is None) != (self.trunk_outcome is None):
            raise ValueError("a trunk and its outcome come together")
        if "centroids" not in self.files:
            raise ValueError("there are no centroids")
        return self


def file_name(kind: Kind, sha256: str) -> str:
    """`"centroids-<first 12 digits>.safetensors"`, and so on: a file's name follows from its content."""
    return f"{kind}-{sha256[:12]}.{SUFFIXES[kind]}"


def adapter_hash(config: FileRecord, weights: FileRecord) -> str:
    """sha256 over the two files' hexadecimal hashes, one after the other."""
    return hashlib.sha256(f"{config.sha256}{weights.sha256}".encode()).hexdigest()


def adapter_folder(name: str, sha256: str) -> str:
    """`"<name>-<first 12 digits>"`, for `name` `"trunk"` or `"experts/<id>"`."""
    return f"{name}-{sha256[:12]}"


def manifest_name(generation: int) -> str:
    """`"manifest-000012.json"`."""
    return f"manifest-{generation:06d}.json"


def as_values(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain nested data."""
    values: dict[str, Any] = TypeAdapter(Manifest).dump_python(manifest, mode="json")
    return values


def encode_json(value: Any) -> bytes:
    """JSON with sorted keys and a final newline; raises ValueError for NaN and infinities."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def decode_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises BankError for anything else, FileNotFoundError without a file."""
    try:
        value = json.loads(file.read_bytes(), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BankError(f"cannot read {file}: {error.strerror}", "check the permissions of the folder") from error
    except (ValueError, RecursionError) as error:
        raise BankError(f"{file} is not JSON: {error}", "copy it again from where it came") from error
    if not isinstance(value, dict):
        raise BankError(f"{file} holds a {type(value).__name__}, not an object", "copy it again from where it came")
    return value


def generations(path: Path) -> dict[int, Path]:
    """Every manifest in a bank, whole or damaged, the newest first: generation → file."""
    found = {int(match[1]): file for file in _list(path) if (match := _MANIFEST_NAME.fullmatch(file.name))}
    return dict(sorted(found.items(), reverse=True))


def read_manifest(file: Path) -> Manifest:
    """The manifest in one file; raises BankError if it is damaged or of a newer format."""
    values = decode_json(file)
    _check_format(values)
    return _validate(values, file)


def read_current(path: Path) -> Manifest:
    """The highest valid generation of the bank at `path`.

    A damaged manifest above it is passed over with a warning. Raises BankError if none is valid, or if the
    highest whole one was written by a newer LocalMoE.
    """
    damaged: list[str] = []
    for file in generations(path).values():
        try:
            values = decode_json(file)
        except FileNotFoundError:
            return read_current(path)  # pruned between listing and reading: a newer one is there
        except BankError as error:
            damaged.append(error.what)
            continue
        _check_format(values)
        try:
            manifest = _validate(values, file)
        except BankError as error:
            damaged.append(error.what)
            continue
        if damaged:
            warnings.warn(f"{'; '.join(damaged)}; using generation {manifest.generation}", stacklevel=2)
        return manifest
    if damaged:
        raise BankError(f"no manifest of {path} is whole: {'; '.join(damaged)}", "copy the bank again")
    raise BankError(f"{path} holds no finished bank", "make one, or finish this one: localmoe build --help")


def _list(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BankError(f"there is no bank at {path}", "make one: localmoe build --help") from error
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror}", "check the permissions of the folder") from error


def _check_format(values: Mapping[str, Any]) -> None:
    version = values.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise BankError(
            f"bank format {version}, this LocalMoE reads up to {FORMAT}: upgrade",
            "pip install --upgrade localmoe",
        )


def _validate(values: Mapping[str, Any], file: Path) -> Manifest:
    try:
        manifest = TypeAdapter(Manifest).validate_python(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, p['loc'])) or 'manifest'}: {p['msg']}" for p in error.errors()[:3]]
        raise BankError(f"{file} is damaged: {'; '.join(problems)}", "copy the bank again") from error
    if file.name != manifest_name(manifest.generation):
        raise BankError(f"{file} holds generation {manifest.generation}", "give it back the name it was written under")
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")

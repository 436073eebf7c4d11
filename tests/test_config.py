"""Configuration: what is read from where, what is refused, and what the message then says."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from localmoe import config as configuration
from localmoe.config import (
    BuildConfig,
    RouteConfig,
    TrainConfig,
    as_dict,
    default_of,
    load_config,
    load_eval_config,
    validate,
)
from localmoe.errors import ConfigError

STAGES = [
    stage for stage in vars(configuration).values() if isinstance(stage, type) and dataclasses.is_dataclass(stage)
]
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "build.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


# --- the fields -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_every_default_is_a_value_that_validation_accepts(stage: type[Any]) -> None:
    """pydantic does not validate defaults, so they are given once more as values."""
    default = stage()
    given = {field.name: getattr(default, field.name) for field in dataclasses.fields(stage)}
    assert stage(**given) == default


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_has_more_than_twelve_fields(stage: type[Any]) -> None:
    assert 1 <= len(dataclasses.fields(stage)) <= 12


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_says_what_it_is(stage: type[Any]) -> None:
    body = Path(configuration.__file__).read_text(encoding="utf-8").split(f"class {stage.__name__}:")[1]
    documented = set(re.findall(r'^    (\w+): [^\n]+\n    """', body.split("\n@dataclass")[0], re.MULTILINE))
    groups = {field.name for field in dataclasses.fields(stage) if dataclasses.is_dataclass(field.default)}
    assert {field.name for field in dataclasses.fields(stage)} - documented == groups


@pytest.mark.parametrize("stage", STAGES)
def test_a_configuration_cannot_be_changed(stage: type[Any]) -> None:
    name = dataclasses.fields(stage)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(stage(), name, None)


def test_changing_one_configuration_changes_no_other() -> None:
    BuildConfig().corpus.access_paths["secret/*"] = ("board",)
    assert BuildConfig().corpus.access_paths == {}


def test_a_default_is_told_by_its_field() -> None:
    assert default_of(TrainConfig, "rank") == TrainConfig().rank
    assert default_of(RouteConfig, "beta") is None


# --- where values come from -----------------------------------------------------------------------------


def test_without_a_file_everything_is_at_its_default() -> None:
    assert load_config() == BuildConfig()


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_an_empty_file_leaves_everything_at_its_default(write: Write, text: str) -> None:
    assert load_config(write(text)) == BuildConfig()


def test_a_file_changes_the_keys_that_it_names(write: Write) -> None:
    found = load_config(write("seed: 7\ntrain:\n  rank: 8\ncorpus:\n  access_paths: {'a/*': [x, y]}\n"))
    expected = dataclasses.replace(
        BuildConfig(),
        seed=7,
        train=TrainConfig(rank=8),
        corpus=dataclasses.replace(BuildConfig().corpus, access_paths={"a/*": ("x", "y")}),
    )
    assert found == expected


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier(write: Write) -> None:
    path = write("seed: 1\ntrain:\n  rank: 8\n  alpha: 4\n")
    found = load_config(path, ["train.rank=2", "train.rank=3", "cluster.clusters=12"])
    assert (found.seed, found.train.rank, found.train.alpha, found.cluster.clusters) == (1, 3, 4.0, 12)


def test_an_override_mends_a_bad_value_of_the_file(write: Write) -> None:
    assert load_config(write("train:\n  rank: 0\n"), ["train.rank=3"]).train.rank == 3


@pytest.mark.parametrize(
    ("override", "stage", "name", "value"),
    [
        ("train.learning_rate=1e-3", "train", "learning_rate", 1e-3),  # for YAML 1.1 this is a string
        ("route.beta=", "route", "beta", None),
        ("route.beta=0", "route", "beta", 0.0),
        ("corpus.include=['*.py', '*.md']", "corpus", "include", ("*.py", "*.md")),
        ("corpus.access_paths.a/*=[x]", "corpus", "access_paths", {"a/*": ("x",)}),
        ("corpus.text_field=a=b", "corpus", "text_field", "a=b"),
        (" train.recipe = paper", "train", "recipe", "paper"),
    ],
)
def test_an_override_is_read_as_yaml(override: str, stage: str, name: str, value: object) -> None:
    assert getattr(getattr(load_config(None, [override]), stage), name) == value


def test_a_configuration_survives_json() -> None:
    changed = load_config(None, ["corpus.access_paths.a/*=[x]", "route.beta=0.03", "cluster.criterion=size"])
    assert validate(json.loads(json.dumps(as_dict(changed)))) == changed


# --- what is refused ------------------------------------------------------------------------------------


def test_an_unknown_key_is_named_with_the_nearest_one_and_its_line(write: Write) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(path := write("base: x\n\ntrain:\n  rank: 8\n  rnk: 4\n"))
    assert str(error.value).splitlines()[0] == (f"{path}: unknown key 'train.rnk', did you mean 'train.rank'? (line 5)")


def test_an_unknown_group_is_named_with_the_nearest_one_and_its_line(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'trian', did you mean 'train'\? \(line 2\)"):
        load_config(write("seed: 1\ntrian:\n  rank: 8\n"))


def test_an_unknown_key_of_an_override_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'cluster.min_token', did you mean 'cluster.min_tokens'"):
        load_config(None, ["cluster.min_token=5"])


def test_a_bad_value_is_named_with_its_key_and_line(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"train.rank = 0: .*greater than or equal to 1 \(line 3\)"):
        load_config(write("seed: 1\ntrain:\n  rank: 0\n"))


def test_all_problems_are_told_at_once(write: Write) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write("sed: 1\ntrain:\n  rank: 0\n  recipe: papr\n"))
    assert sorted(re.findall(r"\(line (\d)\)", str(error.value))) == ["1", "3", "4"]


@pytest.mark.parametrize(
    "override",
    [
        "train.rank=8.5",
        "train.rank=many",
        "train.rank=[8]",
        "train.rank={a: 8}",
        "train.rank=",
        "train.alpha=0",
        "train.recipe=papr",
        "corpus.tune_fraction=1",
        "corpus.test_fraction=-0.1",
        "corpus.passage_tokens=0",
        "corpus.include=a.py",
        "corpus.include=[1]",
        "corpus.access_paths={a: x}",
        "cluster.criterion=width",
        "route.beta=-0.1",
        "route.beta=.nan",
        "route.tau=1",
        "route.active=0.5",
        "route.max_experts=0",
        "keep_texts=maybe",
        "base=12",
    ],
)
def test_a_value_out_of_range_or_of_another_kind_is_refused_by_key(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"the settings: {re.escape(override.partition('=')[0])}\b"):
        load_config(None, [override])


@pytest.mark.parametrize("text", ["train:\n  - rank\n", "train: 5\n", "train:\n"])
def test_a_group_that_holds_no_keys_is_refused_with_its_line(write: Write, text: str) -> None:
    with pytest.raises(ConfigError, match=r"train = .*\(line 1\)"):
        load_config(write(text))


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("hello\n", "str"), ("12\n", "int")])
def test_a_file_without_keys_is_refused(write: Write, text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"must hold keys and values, not a {kind}"):
        load_config(write(text))


@pytest.mark.parametrize(
    "text", ["a: [\n", "train:\n\trank: 1\n", "a: 1\n---\nb: 2\n", "base: !!python/name:os.system\n"]
)
def test_a_file_that_is_not_plain_yaml_is_refused(write: Write, text: str) -> None:
    with pytest.raises(ConfigError, match=r"build.yaml is not YAML: [\s\S]*line \d"):
        load_config(write(text))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary is not YAML"):
        load_config(tmp_path / "binary")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*absent.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*: Is a directory"):
        load_config(tmp_path)


def test_a_setting_without_a_value_is_refused_with_an_example() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the setting 'train.rank'\nwrite it as key=value"):
        load_config(None, ["train.rank"])


def test_a_setting_whose_value_is_not_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the value of 'train.rank=\['"):
        load_config(None, ["train.rank=["])


def test_a_setting_below_a_value_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="'train' is a value, not a group of keys"):
        load_config(write("train: 5\n"), ["train.rank=3"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_no_unknown_field_in_code_either(stage: type[Any]) -> None:
    with pytest.raises(ValidationError):
        stage(no_such_field=1)


@pytest.mark.parametrize("name", ["rates", "full_rates"])
def test_a_baseline_needs_a_rate(name: str) -> None:
    with pytest.raises(ConfigError, match=f"fine_tune.{name}"):
        load_eval_config(None, [f"fine_tune.{name}=[]"])

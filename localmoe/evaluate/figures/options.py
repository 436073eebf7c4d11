"""Options of figures: the values on their axes, and the texts of their tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from localmoe.config import Fraction, Positive
from localmoe.errors import ConfigError, did_you_mean

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Betas = tuple[Annotated[float, Field(ge=0)], ...]


@dataclass(frozen=True, config=_STRICT)
class FigureConfig:
    """What figures need to know beside the evaluation's own settings; the defaults suit two cores."""

    active: tuple[Positive, ...] = (1, 2, 3, 5, 10)
    """Numbers of active experts N; β is found on the tune documents for each."""
    betas: Betas = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Temperatures β; 0 = the nearest expert alone."""
    taus: tuple[Fraction, ...] = (0.001, 0.01, 0.1)
    """Sparsities τ."""
    lambdas: tuple[Annotated[float, Field(ge=1e-6)], ...] = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
    """SIFT's noise variances λ."""
    query_prefixes: tuple[Positive, ...] = (5, 10, 20, 30, 40, 50, 75, 100)
    """Tokens used as the query (figure 10)."""
    prefixes: tuple[Positive, ...] = (25, 50, 100)
    """Tokens on which no loss is counted (figure 10, and the prefix length of the reviewers)."""
    experts: Positive = 64
    """Experts in the matrix of figure 6 at most, evenly spaced among the leaves."""
    clusters: Positive | None = None
    """Clusters at most in figure 6's elbow and in the comparison with k-means; none = as many as the bank has."""
    new_tokens: Positive = 100
    """Tokens whose generation figure 1 counts as the time of an answer."""
    overhead: Path | None = None
    """What `benchmarks/overhead.py --json` wrote (figure 4, left and middle)."""
    queries: tuple[str, ...] = (
        "Basketball is a great sport",
        "Albert Einstein was an astounding physicist",
        "UNESCO World Heritage Site",
    )
    """Prompts whose nearest experts are shown (table 8)."""
    prompts: tuple[str, ...] = ("The politics in", "Super Bowl")
    """Prompts that experts go on from (table 10)."""
    speakers: tuple[str, ...] = ()
    """Ids of the experts of tables 9 and 10; none = the two with the most tokens."""
    samples: Positive = 2
    """Texts for every model of table 9."""
    text_tokens: Positive = 60
    """Tokens of a generated text (tables 9 and 10)."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Temperature of generated texts."""


PREFIX = "figure."
"""What the keys of these options begin with on the command line."""


def figure_config(settings: Sequence[str]) -> FigureConfig:
    """The options from `figure.KEY=VALUE` settings, values read as YAML; others are not looked at.

    Raises ConfigError for an unknown key (with a suggestion) or a bad value.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key.strip().startswith(PREFIX):
            try:
                values[key.strip().removeprefix(PREFIX)] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ConfigError(f"cannot read the value of {setting!r}: {error}", "write lists as [1, 3]") from error
    known = [field.name for field in dataclasses.fields(FigureConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {PREFIX + key!r}{did_you_mean(key, known)}", f"known: {', '.join(known)}")
    try:
        return TypeAdapter(FigureConfig).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{PREFIX}{place} = {problem['input']!r}: {problem['msg'].lower()}") from error

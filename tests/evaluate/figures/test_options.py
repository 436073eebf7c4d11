"""Options of figures, from the settings of a command line."""

import pytest

from localmoe.errors import ConfigError
from localmoe.evaluate.figures.options import FigureConfig, figure_config


def test_only_keys_of_figures_are_read() -> None:
    read = figure_config(["ttt.documents=20", "figure.active=[1, 3]", "figure.text_tokens=5"])
    assert read == FigureConfig(active=(1, 3), text_tokens=5)
    assert figure_config([]) == FigureConfig()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("figure.actve=[1]", "did you mean 'active'"),
        ("figure.active=[0]", "figure.active.0 = 0"),
        ("figure.betas=[-1]", "figure.betas.0 = -1"),
        ("figure.active=[1", "cannot read"),
    ],
)
def test_what_cannot_be_used_is_said(setting: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        figure_config([setting])
    assert says in str(caught.value)

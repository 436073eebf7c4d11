"""What the benchmark of rounded weights computes."""

from pathlib import Path

import pytest
from rounding import measure

import localmoe
from localmoe.evaluate.protocol import held_out


def test_the_exact_mix_changes_nothing_and_finer_steps_change_less(
    tiny_bank: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    engine = localmoe.open(tiny_bank, base=str(tiny_base), encoder=str(tiny_encoder))
    trials = held_out(engine, 4, 64)
    found = measure(engine, trials, 6, [1, 1000])
    assert found["again"]["kl"] == 0.0 == found["again"]["largest"]
    assert 0 <= found["1000"]["kl"] <= found["1"]["kl"]
    assert found["1000"]["largest"] < 0.05
    assert found["1"]["repeats"] >= found["1000"]["repeats"]
    assert found["again"]["nll"] == pytest.approx(0.0)

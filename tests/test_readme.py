"""The README's Python example runs, on a tiny base and encoder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_of_the_readme_runs(
    tmp_path: Path,
    tiny_corpus: Path,
    tiny_base: Path,
    tiny_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    settings = f'"base={tiny_base}", "encoder={tiny_encoder}", "corpus.passage_tokens=32"'
    example = example.replace('"base=HuggingFaceTB/SmolLM2-135M-Instruct"', settings)
    assert str(tiny_base) in example
    shutil.copytree(tiny_corpus, tmp_path / "notes")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})  # noqa: S102 - our own text
    printed = capsys.readouterr().out
    assert "e00" in printed
    assert float(re.findall(r"\d+\.\d+$", printed.strip())[0]) > 0


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!http|#)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []

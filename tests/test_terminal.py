"""What the command line shows: numbers, histograms, progress lines, errors, the state of an unfinished build."""

import io
import itertools
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_results
import pytest
import rich_click as click
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from localmoe.config import ExecutionConfig, GenerateConfig
from localmoe.errors import BankError, ConfigError, PartialError, PromptError, UsageError
from localmoe.evaluate.results import Check, Results
from localmoe.quantities import bytes_text, duration_text
from localmoe.terminal.chat import _messages
from localmoe.terminal.evaluations import show_results
from localmoe.terminal.options import execution_config, execution_options, mix_memory_option
from localmoe.terminal.plans import histogram
from localmoe.terminal.progress import LINE_EVERY, Lines, clock_text, show_json, watching
from localmoe.terminal.screen import bar, plain, readable_warnings, show_error
from localmoe.terminal.summary import open_for_info, raise_for_failed, unfinished, unfinished_text
from localmoe.terminal.verbs import checked, prompt_text
from localmoe.train.progress import Event


def test_bytes_and_durations_are_written_for_people() -> None:
    assert [bytes_text(count) for count in (0, 999, 1_000, 3_140_000, 412e6, 5.25e9, 7e15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "3.1 MB",
        "412 MB",
        "5.2 GB",
        "7000.0 TB",
    ]
    assert [duration_text(seconds) for seconds in (0.25, 2.14, 45, 720, 3.4 * 3600, 60 * 3600)] == [
        "250 ms",
        "2.1 s",
        "45 s",
        "12 min",
        "3.4 h",
        "2.5 days",
    ]
    assert [clock_text(seconds) for seconds in (12, 61.6, 3723)] == ["0:12", "1:02", "1:02:03"]


def test_a_bar_shows_that_a_tiny_share_is_not_nothing() -> None:
    assert [bar(share, width=4) for share in (0, 0.01, 0.5, 1)] == ["", "▏", "██", "████"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
def test_a_histogram_counts_every_cluster_once_in_ranges_that_touch(sizes: list[int]) -> None:
    rows = histogram(tuple(sizes))
    assert len(rows) <= 8
    assert rows[0][0] == min(sizes)
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(rows))
    assert [count for _, _, count in rows] == [sum(low <= size <= high for size in sizes) for low, high, _ in rows]
    assert sum(count for _, _, count in rows) == len(sizes)


def test_without_a_terminal_notes_come_at_once_and_other_events_every_ten_seconds() -> None:
    now, said = 0.0, []
    lines = Lines(said.append, clock=lambda: now)
    for now in (0.0, 4.0, LINE_EVERY, LINE_EVERY + 1, 2 * LINE_EVERY):
        lines(Event("experts", int(now * 100), 4000))
    lines(Event("experts", 4000, 4000, "e00: good"))
    assert said == [
        "train experts: 1,000 of 4,000 tokens, 100 tokens/s, 0:30 left",
        "train experts: 2,000 of 4,000 tokens, 100 tokens/s, 0:20 left",
        "train experts: e00: good",
    ]


def test_a_stage_of_unknown_length_has_no_time_left_and_a_new_stage_starts_its_own_clock() -> None:
    now, said = 0.0, []
    lines = Lines(said.append, clock=lambda: now)
    lines(Event("read", 256, 0))
    now = 20.0
    lines(Event("embed", 0, 100))
    lines(Event("embed", 10, 100))
    now = 30.0
    lines(Event("embed", 60, 100))
    assert said == ["embed: 60 of 100 documents, 6 documents/s, 0:07 left"]


def test_events_as_json_are_one_object_a_line_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(as_json=True) as watch:
        assert watch is show_json
        watch(Event("trunk", 1, 2, "β ≥ 0"))
    assert json.loads(capsys.readouterr().out) == {"event": "trunk", "done": 1, "total": 2, "note": "β ≥ 0"}


def test_an_error_says_what_and_what_next_and_its_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(ConfigError("no [bold] key", "pip install 'localmoe[demo]'"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: no [bold] key\n  → pip install 'localmoe[demo]'\n"


def test_with_debug_the_traceback_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise BankError("damaged")
    except BankError as error:
        show_error(error, debug=True)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("error: damaged\n")


def test_warnings_are_one_sentence_without_file_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with readable_warnings():
            warnings.warn("the manifest is damaged", stacklevel=1)
    assert capsys.readouterr().err == "warning: the manifest is damaged\n"


def test_control_characters_of_a_corpus_do_not_reach_the_terminal() -> None:
    assert plain("a\x1b[31mb [red]c").plain == "a\\x1b[31mb [red]c"


def test_a_prompt_comes_from_one_place_and_loses_the_newline_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("two\nlines\n\n", encoding="utf-8")
    assert prompt_text(None, file) == "two\nlines\n"
    assert prompt_text("as it is\n", None) == "as it is\n"
    with pytest.raises(PromptError, match="two prompts"):
        prompt_text("x", file)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}])
def test_a_value_out_of_range_is_named_by_its_option(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        checked(GenerateConfig, options)


def test_memory_is_given_in_gigabytes_and_what_is_not_given_is_the_default() -> None:
    found: list[ExecutionConfig] = []

    @click.command()
    @execution_options
    @mix_memory_option()
    def command(**options: Any) -> None:
        found.append(execution_config(options))

    for arguments in ([], ["--execution", "dense", "--expert-memory", "2", "--mix-memory", "0.5"]):
        assert CliRunner().invoke(command, arguments).exit_code == 0
    given = ExecutionConfig(execution="dense", host_bytes=2_000_000_000, mix_cache_bytes=500_000_000)
    assert found == [ExecutionConfig(), given]


def test_an_unfinished_build_says_how_many_experts_are_done(tmp_path: Path) -> None:
    assert unfinished(tmp_path) is None
    work = tmp_path / "work" / "0123"
    (work / "experts").mkdir(parents=True)
    state = unfinished(tmp_path)
    assert state is not None and "no expert is trained" in unfinished_text(state)
    (work / "clusters.json").write_text(json.dumps({"access": [[], [], []], "trees": []}), encoding="utf-8")
    (work / "experts" / "e00.json").write_text("{}", encoding="utf-8")
    (work / "experts" / ".e01.json.77").write_text("{", encoding="utf-8")
    state = unfinished(tmp_path)
    assert state is not None and "1 of 3 experts are done" in unfinished_text(state)
    with pytest.raises(BankError, match="1 of 3 experts") as raised:
        open_for_info(tmp_path)
    assert f"localmoe build SOURCE {tmp_path}" in raised.value.remedy


def test_a_joint_training_that_was_interrupted_says_that_its_state_is_kept(tmp_path: Path) -> None:
    work = tmp_path / "work" / "key"
    work.mkdir(parents=True)
    (work / "clusters.json").write_text('{"access": [[], []]}', encoding="utf-8")
    (work / "joint-1.pt").touch()
    with pytest.raises(BankError, match="the trunk and 2 experts are in training, their state is kept"):
        open_for_info(tmp_path)


def test_a_chat_at_a_keyboard_needs_no_readline(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([" hello ", "/quit"])
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert list(itertools.islice(_messages(), 2)) == ["hello", "/quit"]


def test_a_chat_that_is_piped_something_else_than_text_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\xff\n"), encoding="utf-8"))
    with pytest.raises(UsageError, match="not UTF-8"):
        list(_messages())


def test_failed_experts_are_an_error_of_their_own() -> None:
    good = {"id": "e00", "status": "good", "reason": None}
    raise_for_failed({"experts": [good]})
    with pytest.raises(PartialError, match=r"1 of 2 experts failed to train \(e01\): the loss became nan"):
        raise_for_failed({"experts": [good, {"id": "e01", "status": "failed", "reason": "the loss became nan"}]})


def _shown(results: Results) -> str:
    target = io.StringIO()
    show_results(Console(file=target, width=130), results)
    return target.getvalue()


def test_an_evaluation_says_its_verdict_first_and_what_was_left_out() -> None:
    left_out = Check("ttt was left out", True, "the bank keeps no texts")
    text = _shown(made_results.results(checks=(Check("suffix mutation", True, "none changed"), left_out)))
    assert text.startswith("merging 3 experts beats the fine-tune by ")
    assert "merged (default)" in text
    assert "The same 40 documents for all" in text
    assert text.index("merged (default)") < text.index("of the gap from trunk to ttt-trunk")
    assert "ttt was left out: the bank keeps no texts" in text
    assert "all 1 leak checks passed" in text


def test_an_evaluation_says_a_failed_check_before_all_else() -> None:
    text = _shown(made_results.failing(made_results.results()))
    assert text.startswith("the leak check 'near duplicates' failed: 3 of 120 documents <b>stand</b> in train")
    assert "leak checks passed" not in text

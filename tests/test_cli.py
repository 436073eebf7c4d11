"""The command line, run in-process on tiny models: what each verb prints, where, and its exit code."""

import errno
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import localmoe
from localmoe.cli import main
from localmoe.config import BuildConfig, EvalConfig, GenerateConfig, default_of, load_eval_config
from localmoe.errors import LocalMoEError, LockedError
from localmoe.runtime.engine import Engine, open_engine

HEAVY = ("torch", "transformers", "sentence_transformers", "sklearn", "pyarrow", "plotly", "lm_eval", "matplotlib")
VERBS = ("demo", "plan", "build", "route", "generate", "chat", "eval", "lm-eval", "info", "map")


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture(scope="module")
def engine(tiny_bank: Path, tiny_base: Path, tiny_encoder: Path) -> Engine:
    return open_engine(tiny_bank, str(tiny_base), str(tiny_encoder))


@pytest.fixture
def models(tiny_base: Path, tiny_encoder: Path) -> list[str]:
    return ["--base", str(tiny_base), "--encoder", str(tiny_encoder)]


@pytest.fixture
def small(models: list[str]) -> list[str]:
    """Options of a build of seconds."""
    keys = ("corpus.tune_fraction=0.25", "train.batch=8", "corpus.passage_tokens=64")
    return [*models, "--clusters", "2", "--min-tokens", "100", "--rank", "2", *(f"--set={key}" for key in keys)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BuildConfig]:
    """The configurations that `build` was called with; it does nothing else."""
    configs: list[BuildConfig] = []

    def build(source: str, bank: Path, config: BuildConfig, *, watch: Any) -> None:
        configs.append(config)
        raise LocalMoEError("enough")

    monkeypatch.setattr("localmoe.train.pipeline.build", build)
    return configs


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from localmoe.cli import main\n"
        f"for verb in {['', *VERBS]!r}:\n"
        "    result = CliRunner().invoke(main, [*verb.split(), '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, verb\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_verbs_are_listed_in_the_order_in_which_they_are_used() -> None:
    shown = run("--help").output
    places = [shown.index(f"│ {verb} ") for verb in VERBS]
    assert places == sorted(places)


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_every_verb_are_commands_that_can_be_read(verb: str, tmp_path: Path) -> None:
    examples = re.findall(r"localmoe (.*)", str(main.commands[verb].help))
    assert len(examples) in (2, 3)
    for example in examples:
        words = shlex.split(example.split(" | ")[0])
        assert words[0] == verb
        assert main.commands[verb].make_context(verb, words[1:]).params


def test_the_defaults_in_help_are_those_of_the_dataclasses() -> None:
    def shown_default(verb: str, option: str) -> str:
        (parameter,) = (p for p in main.commands[verb].params if option in p.opts)
        match = re.search(r"default: (.*)\]\[", str(parameter.help))  # type: ignore[attr-defined]
        return match[1] if match else ""

    assert shown_default("build", "--base") == BuildConfig().base
    assert shown_default("plan", "--rank") == str(BuildConfig().train.rank)
    assert shown_default("build", "--sample-tokens") == "all"
    assert shown_default("generate", "--top-p") == str(default_of(GenerateConfig, "top_p"))


def test_help_of_build_lists_every_key() -> None:
    shown = run("build", "--help").output
    keys = localmoe.config._keys(BuildConfig)
    missing = [key for key in keys if f"{key}=" not in shown and "." in key]
    assert missing == []


def test_lists_in_help_are_written_as_set_takes_them() -> None:
    shown = run("eval", "--help").output
    assert "fine_tune.rates=[0.5,1.0,2.0]" in shown and "fine_tune.batches=[1,4]" in shown
    assert load_eval_config(None, ["fine_tune.rates=[0.5,1.0,2.0]"]) == EvalConfig()


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "near"), [(["buid", "a", "b"], "build"), (["build", "--rnak", "3"], "--rank"), (["rout"], "route")]
)
def test_an_unknown_verb_or_option_suggests_the_nearest(words: list[str], near: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert f"Did you mean '{near}'" in result.stderr and "--help" in result.stderr


def test_errors_go_to_stderr_with_a_remedy_and_the_exit_code_of_their_class(tmp_path: Path) -> None:
    result = run("info", tmp_path / "nothing")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.startswith("error: there is no bank at") and "\n  → make one" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("--debug", "info", tmp_path / "nothing").stderr


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "go on with the same command"),
        (OSError(errno.ENOSPC, "No space left on device"), 75, "the disk is full"),
        (LockedError("another process is building in x"), 5, "another process"),
        (ValueError("a fault of ours"), 1, "unexpected ValueError: a fault of ours"),
    ],
)
def test_whatever_a_build_raises_becomes_one_message_and_a_code(
    failure: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr("localmoe.train.pipeline.build", build)
    result = run("build", "corpus", "bank")
    assert result.exit_code == code
    assert said in result.stderr and "Traceback" not in result.stderr


def test_a_reader_that_goes_away_is_no_error_to_talk_about(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("localmoe.train.pipeline.build", build)
    result = run("build", "corpus", "bank")
    assert (result.exit_code, result.output) == (1, "")


# --- build, plan, info --------------------------------------------------------------------------------------------


def test_set_wins_over_options_and_options_over_the_file(asked: list[BuildConfig], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("seed: 1\ntrain: {rank: 2, epochs: 2, batch: 2}\n", encoding="utf-8")
    run("build", "x", "y", "-c", file, "--rank", 3, "--epochs", 3, "--set", "train.epochs=4")
    assert (asked[0].seed, asked[0].train.batch, asked[0].train.rank, asked[0].train.epochs) == (1, 2, 3, 4)


def test_everyday_options_are_the_dotted_keys(asked: list[BuildConfig]) -> None:
    patterns = ["--include", "*.py", "--include", "é: [x", "--exclude", "null"]
    run("build", "x", "y", *patterns, "--text-field", "7", "--recipe", "paper", "--max-passage", 9, "--no-texts")
    (config,) = asked
    assert (config.corpus.include, config.corpus.exclude) == (("*.py", "é: [x"), ("null",))
    assert (config.corpus.text_field, config.corpus.passage_tokens) == ("7", 9)
    assert (config.train.recipe, config.keep_texts) == ("paper", False)


def test_no_option_means_the_defaults(asked: list[BuildConfig]) -> None:
    run("build", "x", "y")
    assert asked == [BuildConfig()]


def test_a_bad_value_is_a_usage_error(asked: list[BuildConfig]) -> None:
    result = run("build", "x", "y", "--rank", 0)
    assert (result.exit_code, asked) == (2, [])
    assert "train.rank = 0" in result.stderr


def test_build_leaves_a_bank_and_the_same_command_again_does_nothing(
    tiny_corpus: Path, small: list[str], tmp_path: Path
) -> None:
    result = run("build", tiny_corpus, tmp_path / "bank", *small)
    assert result.exit_code == 0
    assert "tokenize: " in result.stderr and "train experts: e00" in result.stderr
    assert "e01" in result.stdout and "generation 1" in result.stdout
    again = run("build", tiny_corpus, tmp_path / "bank", *small, "--json")
    *events, data = map(json.loads, again.stdout.splitlines())
    assert "nothing changed" in events[-1]["note"]
    assert (data["generation"], len(data["experts"]), again.stderr) == (1, 2, "")


def test_a_build_with_failed_experts_keeps_the_bank_and_says_3(
    tiny_corpus: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from localmoe.train.course import DivergedError
    from localmoe.train.training import train

    def diverge(*arguments: Any, **options: Any) -> Any:
        if arguments[5] == 1:  # the seed of the first expert
            raise DivergedError("the loss became nan")
        return train(*arguments, **options)

    monkeypatch.setattr("localmoe.train.training.train", diverge)
    result = run("build", tiny_corpus, tmp_path / "bank", *small, "--recipe", "trunk")
    assert result.exit_code == 3
    assert "1 of 2 experts failed to train (e00): the loss became nan" in result.stderr
    assert run("info", tmp_path / "bank").exit_code == 0


def test_plan_prints_what_plan_returns_and_leaves_nothing(
    tiny_corpus: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("plan", tiny_corpus, *small, "--no-probe")
    assert result.exit_code == 0
    assert "2 experts, clusters estimated from all train documents" in result.stdout
    assert "not measured (--no-probe)" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_info_tells_every_expert_and_as_json_its_gain(tiny_bank: Path) -> None:
    shown = run("info", tiny_bank)
    data = json.loads(run("info", tiny_bank, "--json").stdout)
    bank = localmoe.Bank.open(tiny_bank)
    assert shown.exit_code == 0
    for expert, found in zip(bank.manifest.experts, data["experts"], strict=True):
        assert expert.id in shown.stdout and expert.label in shown.stdout
        outcome = expert.outcome
        if outcome.nll is not None and outcome.reference_nll is not None:
            assert found["nats_gained"] == pytest.approx(outcome.reference_nll - outcome.nll)
    assert data["bytes_on_disk"] >= data["bytes"] > 0


def test_info_tells_at_which_rates_trunk_and_experts_were_trained(tiny_bank: Path) -> None:
    training = json.loads(run("info", tiny_bank, "--json").stdout)["training"]
    bank = localmoe.Bank.open(tiny_bank)
    trunk = bank.manifest.trunk
    assert trunk is not None and trunk.training is not None
    assert training["trunk"] == {"tokens": trunk.training.tokens, "rate": trunk.training.learning_rate}
    assert sum(training["experts"]["rates"].values()) == len(bank.manifest.adapters) - 1
    told = run("info", tiny_bank).stdout
    assert f"trunk {trunk.training.tokens:,} tokens at {trunk.training.learning_rate:g}" in told


def test_info_verify_finds_a_changed_byte(tiny_bank: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(tiny_bank, bank)
    assert run("info", bank, "--verify").exit_code == 0
    (file,) = bank.glob("trunk-*/adapter_model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run("info", bank).exit_code == 0
    result = run("info", bank, "--verify")
    assert result.exit_code == 4 and "sha256" in result.stderr


def test_map_writes_the_file_it_is_told_to(tiny_bank: Path, tmp_path: Path) -> None:
    result = run("map", tiny_bank, "-o", tmp_path / "map.html")
    assert result.exit_code == 0 and "map.html" in result.stdout
    assert (tmp_path / "map.html").read_text(encoding="utf-8").startswith("<!")


# --- route, generate, chat ----------------------------------------------------------------------------------------


def test_route_says_what_the_engine_says_without_a_base_model(
    tiny_bank: Path, tiny_encoder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmoe.models.load_model", None)
    options = ["--encoder", str(tiny_encoder)]
    result = run("route", tiny_bank, "boat sail wave", *options, "--json")
    data, mix = json.loads(result.stdout), engine.route("boat sail wave")
    assert {e["id"]: e["weight"] for e in data["mix"]["experts"]} == dict(zip(mix.experts, mix.weights, strict=True))
    assert [near["source"] for near in data["nearest"]] == [n.source for n in engine.nearest("boat sail wave")]
    shown = run("route", tiny_bank, "-", *options, stdin="boat sail wave\n")
    assert all(expert in shown.stdout for expert in mix.experts)
    assert "sea/" in shown.stdout and "β" in shown.stdout


def test_route_takes_what_is_given_and_the_bank_s_for_the_rest(tiny_bank: Path, tiny_encoder: Path) -> None:
    def routed(*options: object) -> dict[str, Any]:
        result = run("route", tiny_bank, "boat", "--json", "--encoder", tiny_encoder, *options)
        assert result.exit_code == 0, result.stderr
        data: dict[str, Any] = json.loads(result.stdout)
        return data

    record = localmoe.Bank.open(tiny_bank).manifest.router
    assert routed()["router"]["beta"] == record.beta
    assert len(routed("--beta", 0)["mix"]["experts"]) == 1
    assert routed("--active", 1)["router"]["beta"] == 0
    assert routed("--active", 4)["router"]["beta"] > record.beta
    flat = routed("--beta", 100, "--tau", 0.9)
    assert flat["mix"]["fallback"] and len(flat["mix"]["experts"]) == 1


@pytest.mark.parametrize("options", [["--tau", "1"], ["--active", "0.5"], ["--router", "nonsense"]])
def test_a_routing_option_out_of_range_is_a_usage_error(
    tiny_bank: Path, tiny_encoder: Path, options: list[str]
) -> None:
    assert run("route", tiny_bank, "boat", "--encoder", tiny_encoder, *options).exit_code == 2


def test_generate_prints_the_text_alone_and_the_mix_beside_it(
    tiny_bank: Path, models: list[str], engine: Engine
) -> None:
    expected = engine.generate("boat sail", GenerateConfig(max_new_tokens=8))
    limit = ["--max-new-tokens", "8", *models]
    result = run("generate", tiny_bank, *limit, "--show-mix", stdin="boat sail\n")
    assert (result.exit_code, result.stdout) == (0, expected.text + "\n")
    assert all(expert in result.stderr for expert in expected.mix.experts)
    assert f"{expected.prompt_tokens} in the prompt, {expected.new_tokens} new" in result.stderr
    data = json.loads(run("generate", tiny_bank, "boat sail", "--json", *limit).stdout)
    assert (data["text"], data["new_tokens"], data["base_variant"]) == (expected.text, expected.new_tokens, False)
    assert sorted(data["seconds"]) == ["embed", "first_token", "load", "merge", "select", "total"]


def test_a_fall_back_is_said_whether_or_not_the_mix_is_shown(tiny_bank: Path, models: list[str]) -> None:
    options = [*models, "--max-new-tokens", "1", "--beta", "100", "--tau", "0.9"]
    for verb, prompt, stdin in (("generate", ["boat"], None), ("chat", [], "boat\n")):
        result = run(verb, tiny_bank, *prompt, *options, stdin=stdin)
        assert result.exit_code == 0
        assert "fall-back: no expert's softmax weight is above tau" in result.stderr


@pytest.mark.parametrize("prompt", ["", "  \n", "boat " * 200])
def test_generate_refuses_a_prompt_that_is_empty_or_too_long(tiny_bank: Path, models: list[str], prompt: str) -> None:
    result = run("generate", tiny_bank, prompt, *models)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "prompt" in result.stderr


def test_trusting_remote_code_prints_the_risk(tiny_bank: Path, models: list[str]) -> None:
    result = run("generate", tiny_bank, "boat", *models, "--max-new-tokens", 1, "--trust-remote-code")
    assert result.exit_code == 0
    assert "warning: --trust-remote-code runs Python code" in result.stderr


def test_chat_keeps_the_history_until_it_is_reset(
    tiny_bank: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    start = Engine.start

    def watched(self: Engine, prompt: Any, *rest: Any) -> Any:
        asked.append([turn["role"] for turn in prompt])
        return start(self, prompt, *rest)

    monkeypatch.setattr(Engine, "start", watched)
    lines = "/mix\nboat\n\nsail\n/mix\n/reset\nbread\n/what\n/quit\nnever read\n"
    result = run("chat", tiny_bank, *models, "--max-new-tokens", 3, stdin=lines)
    assert result.exit_code == 0
    assert asked == [["user"], ["user", "assistant", "user"], ["user"]]
    assert "no answer yet" in result.stderr and "weight" in result.stderr and "no command '/what'" in result.stderr
    assert "weight" not in result.stdout


def test_chat_takes_back_a_message_that_does_not_fit_and_goes_on(tiny_bank: Path, models: list[str]) -> None:
    result = run("chat", tiny_bank, *models, "--max-new-tokens", 2, stdin="boat " * 200 + "\nsail\n")
    assert result.exit_code == 0
    assert "context" in result.stderr and "/reset" in result.stderr
    assert result.stdout.endswith("\n") and len(result.stdout) > 1


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    tiny_bank: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def __init__(self, mix: Any) -> None:
            self.mix, self.vector = mix, None

        def __iter__(self) -> Any:
            yield "half an"
            raise KeyboardInterrupt

    start = Engine.start
    monkeypatch.setattr(Engine, "start", lambda self, *arguments: Interrupted(start(self, *arguments).mix))
    result = run("chat", tiny_bank, *models, stdin="boat\nsail\n")
    assert (result.exit_code, result.stdout) == (0, "half an\nhalf an\n")
    assert result.stderr.count("(stopped)") == 2


@pytest.mark.parametrize("size", ["-1", "inf", "nan"])
def test_a_size_that_is_none_is_refused_by_its_option(tiny_bank: Path, models: list[str], size: str) -> None:
    result = run("chat", tiny_bank, *models, "--mix-memory", size, stdin="boat\n")
    assert result.exit_code == 2
    assert "--mix-memory" in result.stderr and "is no size" in result.stderr

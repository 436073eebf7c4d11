"""Verdicts: a comparison in words, and the smallest effect that its documents could have shown."""

from __future__ import annotations

from localmoe.evaluate.results import ComparisonRow, MethodResult, Results, in_common
from localmoe.evaluate.statistics import Comparison, compare, outcome
from localmoe.quantities import duration_text, interval_text, percent, percent_digits

CONTROL = "null"
"""The method whose centroids are shuffled."""

_NOUNS = {
    "base": "the base model",
    "trunk": "the trunk",
    "fine-tuned": "the fine-tune",
    "fine-tuned-full": "full fine-tuning",
    "null": "merging by shuffled centroids",
    "ttt": "test-time training",
    "ttt-trunk": "test-time training from the trunk",
    "ttt-fine-tuned": "test-time training from the fine-tune",
    "context": "the nearest documents in the context",
    "nearest": "the nearest expert alone",
    "uniform": "merging with equal weights",
    "sift": "merging with SIFT's weights",
    "entropy": "merging with weights by entropy",
    "members": "merging with weights by distance to members",
}
_ACTS = {"merged": "merging", "ensemble": "ensembling"}


def smallest_effect(low: float, high: float) -> float:
    """The smallest gain that a comparison with this 95 % interval could have shown: half its width.

    That is 1.96 standard errors of the paired bootstrap, were its distribution normal.
    """
    return (high - low) / 2


def in_words(
    method: str, baseline: str, gain: float, low: float, high: float, documents: int, added: float | None = None
) -> str:
    """A comparison as one sentence.

    method, baseline: as in "merging 3 experts", "the fine-tune"; gain: relative, positive = better, with its 95 %
    interval; added: seconds that the method adds to a prompt, if known.
    """
    if outcome(low, high) == "no difference shown":
        effect = percent(smallest_effect(low, high))
        return (
            f"no difference shown between {method} and {baseline}; "
            f"the smallest effect that these {documents:,} documents could show is {effect}"
        )
    if gain < 0:
        gain, low, high = -gain, -high, -low
        word = "loses to"
    else:
        word = "beats"
    digits = percent_digits(gain, low, high)
    size = f"{percent(gain, digits=digits)} [{low * 100:.{digits}f}, {high * 100:.{digits}f}]"
    cost = "" if added is None else f" for {added_text(added)} a prompt"
    return f"{method} {word} {baseline} by {size}{cost}"


def verdict(row: ComparisonRow, results: Results) -> str:
    """One comparison of an evaluation in words, with what its method adds to a prompt.

    Where the shipped default beats the fine-tune and shuffled centroids do not lose to it, that is said in the same
    breath.
    """
    method, baseline = results.method(row.method), results.method(row.baseline)
    added = None if method is None or "added" not in method.seconds else method.seconds["added"].p50
    said = in_words(
        row.method if method is None else noun(method),
        row.baseline if baseline is None else noun(baseline),
        row.gain,
        *row.interval,
        row.documents,
        added,
    )
    control = _control(results) if row.default and row.baseline == "fine-tuned" and row.interval[0] > 0 else None
    if control is None or control.high < 0:
        return said
    return f"{said}, but shuffled experts are not shown to be worse: none of it is shown to be routing"


def _control(results: Results) -> Comparison | None:
    """Shuffled centroids against the shipped default; None if either was not scored."""
    null, default = results.method(CONTROL), results.default
    if null is None or default is None:
        return None
    places, (shuffled, ours) = in_common([null, default])
    return compare(shuffled, ours, [results.tokens[place] for place in places], results.seed)


def control_sentence(results: Results) -> str | None:
    """Whether shuffled centroids lose to the shipped default, as they must if routing matters; None if not scored."""
    found, default = _control(results), results.default
    if found is None or default is None:
        return None
    interval = interval_text(found.gain, found.low, found.high)
    if found.high < 0:
        loses = f"the control loses as it must: shuffled centroids are {interval} against {noun(default)}"
        return loses + _without_routing(results)
    return (
        f"the control does not lose: shuffled centroids are {interval} against {noun(default)}, so that here it is not "
        "shown to matter which experts a prompt gets"
    )


def rank_sentence(results: Results) -> str | None:
    """That the fine-tune was best at another rank than the bank's, and how to build a bank of that one; else None."""
    tuned, build = results.method("fine-tuned"), results.config.get("build", {}).get("train", {})
    tried = [] if tuned is None else tuned.detail.get("tried", [])
    if not tried or "rank" not in build:
        return None
    best = min(tried, key=lambda one: one["perplexity"])
    if best["rank"] == build["rank"]:
        return None
    alpha = build["alpha"] * best["rank"] / build["rank"]
    return (
        f"the fine-tune was best at rank {best['rank']}, and the bank has {build['rank']}: a bank of its rank is built "
        f"with --rank {best['rank']} --set train.alpha={alpha:g} --learning-rate {best['rate']:g}"
    )


def _without_routing(results: Results) -> str:
    """That part of what is won over the fine-tune is not due to asking the prompt, where shuffled centroids win too."""
    row = results.comparison(CONTROL, "fine-tuned")
    if row is None or row.interval[0] <= 0:
        return ""
    won = interval_text(row.gain, *row.interval)
    return f"; they too beat the fine-tune, by {won}: so much is not due to asking the prompt"


def noun(method: MethodResult) -> str:
    """A method as the subject of a sentence: "merging 3 experts", "the fine-tune"."""
    if method.name in _NOUNS:
        return _NOUNS[method.name]
    act = _ACTS.get(method.name.partition("-")[0])
    if act is None or method.active_mean is None:
        return method.title
    count = f"{method.active_mean:.1f}".removesuffix(".0")
    return f"{act} {count} expert{'' if count == '1' else 's'}"


def added_text(seconds: float) -> str:
    """`"+4 ms"`, `"+15 s"`."""
    return f"{'-' if seconds < 0 else '+'}{duration_text(abs(seconds))}"

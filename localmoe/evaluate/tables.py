"""Tables for people: columns and cells, once for terminal, Markdown and HTML alike; and those of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from localmoe.evaluate.results import ComparisonRow, MethodResult, Results
from localmoe.evaluate.statistics import compare, outcome, perplexity
from localmoe.evaluate.verdicts import verdict
from localmoe.quantities import duration_text, interval_text, percent

BASELINES = ("fine-tuned", "trunk", "base")
"""What methods are compared with in the main table: the first of these that there is."""


@dataclass(frozen=True)
class Cell:
    """A text, what it is sorted by, and how it is shown."""

    text: str
    value: float | None = None
    """None: sorted by the text, after all numbers."""
    tone: str = ""
    """ "good", "bad", "strong" or nothing."""


@dataclass(frozen=True)
class Column:
    """The heading of a column; `right` for numbers; `help`: what it means."""

    name: str
    right: bool = False
    help: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns; `notes` stand below."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, its notes below."""
    heads = [column.name for column in table.columns]
    rules = ["---:" if column.right else "---" for column in table.columns]
    lines = [heads, rules, *([_markdown_cell(cell) for cell in row] for row in table.rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    return text + "".join(f"\n{note}\n" for note in table.notes)


def main_baseline(results: Results) -> str | None:
    """What the main table compares with; None if the evaluation compared nothing."""
    known = [row.baseline for row in results.comparisons]
    return next((name for name in (*BASELINES, *known) if name in known), None)


def headline(results: Results) -> ComparisonRow | None:
    """The comparison that an evaluation is about: the shipped default with the main baseline."""
    rows = [row for row in results.comparisons if row.baseline == main_baseline(results)]
    return next((row for row in rows if row.default), None)


def methods_table(results: Results) -> Table:
    """Quality and cost of every method: perplexity, gain, experts, fall-backs, time, training tokens."""
    baseline = main_baseline(results)
    over = "" if baseline is None else f" over {baseline}"
    columns = (
        Column("method"),
        Column("perplexity", True, "exp of the mean nll of a suffix token; lower is better"),
        Column(f"gain{over}", True, "1 − perplexity ratio on the same documents, 95 % interval; positive is better"),
        Column("documents", True, "held-out documents that it was scored on"),
        Column("experts", True, "active experts of a prompt: mean (most)"),
        Column("fall-backs", True, "prompts for which no expert passed the threshold"),
        Column("added", True, "time that a prompt waits beside the base model's own work, median"),
        Column("p95", True, "the same, 95th percentile"),
        Column("trained on", True, "label tokens that were trained on to make this model"),
    )
    rows = tuple(
        _method_cells(results, method, results.comparison(method.name, baseline)) for method in results.methods
    )
    notes = [f"{method.name}: {method.note}" for method in results.methods if method.note]
    if baseline not in (None, BASELINES[0]):
        notes.append(
            f"{BASELINES[0]} was not run: a gain over {baseline} may be what more training tokens bought, not "
            "what experts are worth."
        )
    kept = list(range(len(columns)))
    if len({method.documents for method in results.methods}) > 1:
        notes.append("Perplexities over different documents cannot be compared; gains are over the same documents.")
    else:
        kept.remove([column.name for column in columns].index("documents"))
    return Table(
        "Methods",
        tuple(columns[place] for place in kept),
        tuple(tuple(row[place] for place in kept) for row in rows),
        tuple(notes),
    )


def _method_cells(results: Results, method: MethodResult, row: ComparisonRow | None) -> tuple[Cell, ...]:
    active = Cell("", None)
    if method.active_mean is not None:
        most = "" if method.active_max is None else f" ({method.active_max})"
        active = Cell(f"{method.active_mean:.1f}{most}", method.active_mean)
    fallbacks = Cell("") if method.fallbacks is None else Cell(f"{method.fallbacks:.1%}", method.fallbacks)
    added = method.seconds.get("added")
    times = [Cell(""), Cell("")]
    if added is not None:
        times = [Cell(duration_text(value), value) for value in (added.p50, added.p95)]
    return (
        method_cell(method),
        Cell(f"{method.perplexity:.3f}", method.perplexity),
        Cell("") if row is None else gain_cell(row.gain, *row.interval),
        Cell(f"{len(method.documents):,}", len(method.documents)),
        active,
        fallbacks,
        *times,
        Cell(f"{method.training_tokens:,}", method.training_tokens),
    )


def costs_table(results: Results) -> Table:
    """What a prompt's own model costs, stage by stage: median (95th percentile)."""
    stages = {
        "embed": "the prompt's embedding",
        "select": "the weights of its experts",
        "load": "experts that are not in memory",
        "merge": "the experts' sum, and the weights with it",
        "search": "the train documents nearest to the prompt",
        "read": "the forward over them, where they stand before the prompt",
        "train": "steps of test-time training",
        "forwards": "the forwards of an ensemble, one an expert",
        "added": "all of these: what it costs beside the base model's own work",
        "first_token": "from the prompt to the first token, all included",
        "per_token": "every token after the first",
    }
    stages = {name: text for name, text in stages.items() if any(name in one.seconds for one in results.methods)}
    default = results.default
    token = None if default is None else default.seconds.get("per_token")
    rows = []
    for method in results.methods:
        if not method.seconds:
            continue
        spreads = [method.seconds.get(stage) for stage in stages]
        cells = [
            Cell("") if spread is None else Cell(f"{_stage_text(spread.p50)} ({_stage_text(spread.p95)})", spread.p50)
            for spread in spreads
        ]
        added = method.seconds.get("added")
        tokens = None if token is None or added is None else added.p50 / token.p50
        rows.append((method_cell(method), *cells, Cell("") if tokens is None else Cell(f"{tokens:,.1f}", tokens)))
    size = None if default is None else default.detail.get("expert_bytes")
    columns = (Column(name.replace("_", " "), True, text) for name, text in stages.items())
    overhead = Column("added, in tokens", True, "as many tokens after the first take as long as what is added")
    notes = () if size is None else (f"An expert takes {size / 2**20:,.1f} MiB on disk.",)
    return Table("Costs of a prompt", (Column("method"), *columns, overhead), tuple(rows), notes)


def _stage_text(seconds: float) -> str:
    """A duration of which parts of a millisecond count."""
    return duration_text(seconds) if seconds >= 0.01 else f"{seconds * 1000:.2g} ms"


def method_cell(method: MethodResult) -> Cell:
    """A method's name; the shipped default says so."""
    return Cell(f"{method.name} (default)" if method.default else method.name, None, "strong" if method.default else "")


def gain_cell(gain: float, low: float, high: float) -> Cell:
    """A gain with its interval, in the tone of its outcome."""
    tone = {"better": "good", "worse": "bad"}.get(outcome(low, high), "")
    return Cell(interval_text(gain, low, high), gain, tone)


def comparisons_table(results: Results) -> Table:
    """Every comparison that was made, in words."""
    columns = (Column("method"), Column("baseline"), Column("gain", True), Column("documents", True), Column("verdict"))
    rows = tuple(
        (
            Cell(row.method, None, "strong" if row.default else ""),
            Cell(row.baseline),
            gain_cell(row.gain, *row.interval),
            Cell(f"{row.documents:,}", row.documents),
            Cell(verdict(row, results)),
        )
        for row in results.comparisons
    )
    return Table("Comparisons", columns, rows)


def subset_tables(results: Results) -> list[Table]:
    """For every part of the documents on which only some methods were scored: all methods on this part."""
    everything = max((method.documents for method in results.methods), key=len, default=())
    parts = {method.documents for method in results.methods if method.documents != everything}
    return [_subset_table(results, part) for part in sorted(parts, key=len)]


def _subset_table(results: Results, part: Sequence[int]) -> Table:
    """Gains over the main baseline, and over those baselines that were scored on this part alone."""
    compared = {row.baseline for row in results.comparisons}
    own = [method.name for method in results.methods if method.documents == part and method.name in compared]
    tokens = [results.tokens[place] for place in part]
    known = {name: nll for name in (m.name for m in results.methods) if (nll := nll_on(results, name, part))}
    baselines = [name for name in dict.fromkeys((main_baseline(results), *own)) if name is not None and name in known]

    def gain(method: str, baseline: str) -> Cell:
        if method == baseline:
            return Cell("")
        found = compare(known[method], known[baseline], tokens, results.seed)
        return gain_cell(found.gain, found.low, found.high)

    rows = []
    for method in results.methods:
        if method.name in known:
            value = perplexity(known[method.name], tokens)
            gains = (gain(method.name, baseline) for baseline in baselines)
            rows.append((method_cell(method), Cell(f"{value:.3f}", value), *gains))
    columns = (Column("method"), Column("perplexity", True), *(Column(f"gain over {name}", True) for name in baselines))
    return Table(f"The same {len(part):,} documents for all", columns, tuple(rows))


def nll_on(results: Results, name: str, places: Iterable[int]) -> list[float] | None:
    """Summed nll of a method on these documents, or None if it was not scored on all of them."""
    method = results.method(name)
    if method is None:
        return None
    known = dict(zip(method.documents, method.nll, strict=True))
    values = [known.get(place) for place in places]
    return None if None in values else [value for value in values if value is not None]


def experts_table(results: Results) -> Table | None:
    """The shipped default against the main baseline, by the expert that is nearest to the document."""
    row = headline(results)
    if row is None or not any(results.experts):
        return None
    method, baseline = results.method(row.method), results.method(row.baseline)
    if method is None or baseline is None:
        return None
    shared = sorted(set(method.documents) & set(baseline.documents))
    by_expert: dict[str, list[int]] = {}
    for place in shared:
        by_expert.setdefault(results.experts[place] or "none", []).append(place)
    cells = []
    for expert, places in sorted(by_expert.items()):
        ours, theirs = nll_on(results, method.name, places), nll_on(results, baseline.name, places)
        if ours is None or theirs is None:
            continue
        tokens = [results.tokens[place] for place in places]
        found = compare(ours, theirs, tokens, results.seed)
        cells.append(
            (
                Cell(expert),
                Cell(f"{len(places):,}", len(places)),
                Cell(f"{perplexity(theirs, tokens):.3f}", perplexity(theirs, tokens)),
                Cell(f"{perplexity(ours, tokens):.3f}", perplexity(ours, tokens)),
                Cell(percent(found.gain, signed=True), found.gain)
                if len(places) < 2
                else gain_cell(found.gain, found.low, found.high),
            )
        )
    columns = (
        Column("nearest expert"),
        Column("documents", True),
        Column(baseline.name, True),
        Column(method.name, True),
        Column("gain", True),
    )
    note = "Intervals of few documents are too narrow: read them as a hint of where to look."
    return Table("By expert", columns, tuple(cells), (note,))


def checks_table(results: Results) -> Table:
    """The leak checks and what they found."""
    rows = tuple(
        (
            Cell(check.name),
            Cell("passed" if check.passed else "FAILED", None, "good" if check.passed else "bad"),
            Cell(check.found),
        )
        for check in results.checks
    )
    return Table("Leak checks", (Column("check"), Column("outcome"), Column("found")), rows)


def _markdown_cell(cell: Cell) -> str:
    text = cell.text.replace("|", "\\|").replace("\n", " ")
    return f"**{text}**" if cell.tone == "strong" and text else text

"""The map: the train documents of a bank in two dimensions, as one HTML page that needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localmoe.bank.manifest import ExpertRecord
from localmoe.bank.store import Bank
from localmoe.errors import BankError, UsageError

DRAWN = 20_000
"""Documents drawn at most."""
FITTED = 3_000
"""Public documents that t-SNE places at most (2,000 take 8 s on one slow core); the others go beside them."""
EXCERPT = 200
"""Characters of a text that a document shows."""
GRID = 10_000
"""Positions are whole numbers from 0 to GRID."""

_FEW = 10  # documents for which t-SNE has too few neighbours
_NEIGHBOURS = 10
_SHARPNESS = 0.03
_TEXTS = 1_000  # whole texts in memory at a time

Vectors = NDArray[np.float32]
Positions = NDArray[np.float64]


def write_map(bank: Bank, target: Path, grant: Collection[str] = ()) -> Path:
    """Writes the map of a bank's train documents to the HTML file `target`, and returns it.

    Documents whose access set is not within `grant` are left out, with their experts; at most DRAWN of the others
    are drawn. t-SNE places public documents alone, at most FITTED of them; every other document goes to Σ w_i y_i
    over the 10 nearest of those, w = softmax(cosine / 0.03). A cluster's mark stands on its most central document,
    argmin_i Σ_j ‖y_i − y_j‖. The same bank, grant and machine give the same bytes. Raises UsageError if the bank
    keeps no documents or embeddings, if none that may be shown is public, or if `target` cannot be written.
    """
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder" if target.is_dir() else "lies in no folder that exists"
        raise UsageError(f"the map cannot be written: {target} {what}", "name a file, e.g. -o map.html")
    page = _page(_contents(bank, frozenset(grant)))
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8", newline="\n")
        partial.replace(target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}", "choose another file with -o") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def place(fitted: Vectors, others: Vectors) -> tuple[Positions, Positions]:
    """Positions of the documents that the projection is fitted on, and of those that go beside them.

    fitted: [n, d] and others: [m, d], unit rows; gives [n, 2] and [m, 2]. Adding to `others` moves nothing.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):  # t-SNE sums over threads in any order
        if len(fitted) < _FEW or not fitted.var(axis=0).any():
            spots = _principal(fitted)
        else:
            perplexity = min(30.0, (len(fitted) - 1) / 3)
            spots = TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(fitted).astype(np.float64)
        return spots, _beside(fitted, spots, others)


def _principal(vectors: Vectors) -> Positions:
    """Coordinates on the first two principal axes, each axis pointing to its largest loading."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    spots = centred @ (axes * signs[:, None]).T
    return np.pad(spots, ((0, 0), (0, 2 - spots.shape[1])))


def _beside(fitted: Vectors, spots: Positions, others: Vectors) -> Positions:
    """Σ w_i y_i over the nearest fitted documents, w = softmax(cosine / 0.03)."""
    found = np.empty((len(others), 2))
    for start in range(0, len(others), 1024):
        cosine = others[start : start + 1024] @ fitted.T
        near = np.argsort(-cosine, axis=1, kind="stable")[:, :_NEIGHBOURS]
        values = np.take_along_axis(cosine, near, axis=1).astype(np.float64)
        weights = np.exp((values - values[:, :1]) / _SHARPNESS)
        weights /= weights.sum(axis=1, keepdims=True)
        found[start : start + 1024] = np.einsum("mk,mkc->mc", weights, spots[near])
    return found


def _contents(bank: Bank, grant: frozenset[str]) -> dict[str, Any]:
    """All that the page shows, as plain data."""
    rows = bank.documents().to_pylist()
    embeddings = bank.embeddings()
    if len(rows) != len(embeddings):
        raise BankError(f"{bank.path}: {len(rows)} documents, but {len(embeddings)} embeddings", "copy it again")
    experts = [expert for expert in bank.manifest.experts if grant.issuperset(expert.access)]
    cluster = {expert.id: k for k, expert in enumerate(experts)}
    train = [row for row, document in enumerate(rows) if document["split"] == "train"]
    shown = [row for row in train if rows[row]["expert"] in cluster and grant.issuperset(rows[row]["access"])]
    drawn = sorted(_sample(shown, rows, DRAWN))
    public = [row for row in drawn if not rows[row]["access"]]
    if not public:
        raise UsageError(
            "there is no public document to draw a map from: restricted ones are only ever placed beside public ones",
            "add some public documents to the corpus and build again",
        )
    fitted = sorted(_sample(public, rows, FITTED))
    rest = sorted(set(drawn) - set(fitted))
    spots = _grid(np.concatenate(place(_unit(embeddings[fitted]), _unit(embeddings[rest]))))
    spots = spots[np.argsort([*fitted, *rest])]
    owner = np.array([cluster[rows[row]["expert"]] for row in drawn])
    excerpts = _excerpts(bank, [rows[row]["id"] for row in drawn])
    return {
        "summary": _summary(bank, len(shown), len(experts)),
        "notes": _notes(bank, len(train), len(shown), len(drawn), len(fitted), excerpts is None),
        "grid": GRID,
        "clusters": [_cluster(bank, expert, spots[owner == k]) for k, expert in enumerate(experts)],
        "trees": _trees(bank, grant),
        "points": {
            "x": spots[:, 0].tolist(),
            "y": spots[:, 1].tolist(),
            "cluster": owner.tolist(),
            "source": [rows[row]["source"] for row in drawn],
            "text": excerpts,
        },
    }


def _cluster(bank: Bank, expert: ExpertRecord, spots: NDArray[np.int64]) -> dict[str, Any]:
    return {
        "id": expert.id,
        "label": expert.label,
        "documents": expert.documents,
        "status": expert.outcome.status,
        "outcome": _outcome(bank, expert),
        "tags": list(expert.tags),
        "access": list(expert.access),
        "middle": _middle(spots),
    }


def _sample(chosen: Sequence[int], rows: Sequence[dict[str, Any]], most: int) -> list[int]:
    """At most `most` of the rows: those whose ids have the smallest hashes."""

    def order(row: int) -> tuple[bytes, int]:
        return hashlib.blake2b(f"map:{rows[row]['id']}".encode(), digest_size=8).digest(), row

    return list(chosen) if len(chosen) <= most else sorted(chosen, key=order)[:most]


def _unit(rows: NDArray[np.float16]) -> Vectors:
    """Rows kept in fp16, in fp32 and of length one again."""
    vectors = rows.astype(np.float32)
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _grid(spots: Positions) -> NDArray[np.int64]:
    """Positions as whole numbers: both axes by the same factor, the longer from 0 to GRID, the other centred."""
    low, high = spots.min(axis=0), spots.max(axis=0)
    longest = float((high - low).max())
    scale = GRID / longest if longest > 0 else 0.0
    whole: NDArray[np.int64] = np.rint((spots - (low + high) / 2) * scale + GRID / 2).astype(np.int64)
    return whole


def _middle(spots: NDArray[np.int64]) -> list[int] | None:
    """The position with the smallest summed distance to the others (of at most 2,000); None without any."""
    some = spots[:: -(-len(spots) // 2_000)] if len(spots) else spots
    if not len(some):
        return None
    sums = [float(np.hypot(*(some - spot).T).sum()) for spot in some]
    x, y = some[int(np.argmin(sums))].tolist()
    return [x, y]


def _excerpts(bank: Bank, ids: Sequence[str]) -> list[str] | None:
    """The beginning of every text, its white space run together; None for a bank without texts."""
    if "texts" not in bank.manifest.files:
        return None
    found = []
    for start in range(0, len(ids), _TEXTS):
        for text in bank.texts(ids[start : start + _TEXTS]):
            words = " ".join(text[: 4 * EXCERPT].split())
            found.append(words if len(words) <= EXCERPT else f"{words[:EXCERPT].rstrip()}…")
    return found


def _trees(bank: Bank, grant: frozenset[str]) -> list[Any]:
    """Of every access set that may be shown its tree, nested pairs whose leaves are expert ids; none if not kept."""
    if "clusters" not in bank.manifest.files:
        return []
    ids = [expert.id for expert in bank.manifest.experts]

    def nested(nodes: Sequence[dict[str, Any]], first: int) -> Any:
        found: list[Any] = [None] * len(nodes)
        for number in reversed(range(len(nodes))):  # children stand behind their parents
            node = nodes[number]
            leaf = node["left"] < 0
            found[number] = ids[first + node["cluster"]] if leaf else [found[node["left"]], found[node["right"]]]
        return found[0]

    try:
        sets = bank.clusters()["access_sets"]
        return [nested(part["tree"], part["first"]) for part in sets if grant.issuperset(part["access"])]
    except (KeyError, IndexError, TypeError) as error:
        raise BankError(f"{bank.path}: the cluster tree is damaged ({error!r})", "build the bank again") from error


def _outcome(bank: Bank, expert: ExpertRecord) -> str:
    """What became of an expert, in words."""
    outcome = expert.outcome
    if outcome.nll is None or outcome.reference_nll is None:
        return outcome.status if outcome.reason is None else f"{outcome.status}: {outcome.reason}"
    gain = outcome.reference_nll - outcome.nll
    other = "base" if bank.manifest.trunk is None else "trunk"
    how = f"{abs(gain):.3f} nats a token {'better' if gain > 0 else 'worse'} than the {other}"
    unused = ", and so not routed to" if outcome.status == "harmful" else ""
    return f"{outcome.status}: {how} on {_counted(outcome.documents, 'tune document')}{unused}"


def _summary(bank: Bank, documents: int, experts: int) -> list[str]:
    manifest = bank.manifest
    return [
        _counted(documents, "document"),
        _counted(experts, "expert"),
        f"base {manifest.base.id.rpartition('/')[2]}",
        f"encoder {manifest.encoder.id.rpartition('/')[2]}",
    ]


def _notes(bank: Bank, train: int, shown: int, drawn: int, fitted: int, textless: bool) -> list[str]:
    how = "t-SNE" if fitted >= _FEW else "the first two principal axes"
    notes = [
        f"Documents that lie together are alike; distances between groups say little. Placed by {how}, fitted on "
        f"{_counted(fitted, 'public document')}."
    ]
    if drawn < shown:
        notes.append(f"A sample of {drawn:,} of the {shown:,} documents is drawn.")
    if shown < train:
        notes.append(f"Left out: {_counted(train - shown, 'restricted document')}.")
    if textless:
        notes.append("The bank was built without texts.")
    return [*notes, f"Generation {bank.manifest.generation}, digest {bank.manifest.digest[:12]}."]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _page(contents: dict[str, Any]) -> str:
    """The template with the data in it, and a policy under which its own script alone may run."""
    template = files("localmoe").joinpath("map.html").read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    data = json.dumps(contents, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # so that no text can end the element that it stands in
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace("{{policy}}", html.escape(policy)).replace("{{data}}", data)

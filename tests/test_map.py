"""The map: what is drawn and what is not, where it lies, and that no text in it can run."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe import map as map_module
from localmoe.bank.adapters import write_adapter
from localmoe.bank.files import write_json, write_table, write_tensors
from localmoe.bank.generations import commit
from localmoe.bank.manifest import (
    BaseRecord,
    EncoderRecord,
    ExpertRecord,
    Manifest,
    Outcome,
    RouterRecord,
)
from localmoe.bank.store import Bank
from localmoe.errors import UsageError
from localmoe.lora import LowRank
from localmoe.map import GRID, place, write_map

DIM = 16
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028<!--<script>"
NAMES = pyarrow.list_(pyarrow.string())


def unit_rows(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def leaf(cluster: int) -> dict[str, int]:
    return {"left": -1, "right": -1, "cluster": cluster}


def make_bank(
    path: Path,
    owners: Sequence[int],
    access: Sequence[tuple[str, ...]] = ((),),
    texts: Sequence[str] | None = (),
    label: str = "cluster",
    splits: Sequence[str] | None = None,
) -> Bank:
    """A bank of documents that belong to the experts `owners`; `access`: each expert's set; texts None: not kept."""
    count = len(owners)
    experts = []
    for k, names in enumerate(access):
        factors = LowRank(torch.ones(1, 2), torch.ones(2, 1), torch.ones(1))
        adapter = write_adapter(path, f"experts/e{k}", {"layer": factors}, "tiny", False)
        outcome = Outcome("harmful" if k == 1 else "good", 4, 2.5 if k == 1 else 1.5, 2.0, None)
        experts.append(ExpertRecord(f"e{k}", f"{label} {k}", k, owners.count(k), 9, names, (), outcome, adapter))
    ids = [f"document-{i}" for i in range(count)]
    table = pyarrow.table(
        {
            "id": ids,
            "source": [f"notes/{i}.txt" for i in range(count)],
            "split": ["train"] * count if splits is None else list(splits),
            "expert": pyarrow.array([f"e{k}" for k in owners], pyarrow.string()),
            "access": pyarrow.array([list(access[k]) for k in owners], NAMES),
            "tags": pyarrow.array([[]] * count, NAMES),
            "tokens": [9] * count,
        }
    )
    centroids = torch.from_numpy(unit_rows(len(access), seed=1))
    sets = []
    for first, names in enumerate(access):
        sets.append({"access": list(names), "first": first, "tree": [leaf(0)]})
    if len(access) == 2 and access[0] == access[1]:
        root = {"left": 1, "right": 2, "cluster": -1}
        sets = [{"access": list(access[0]), "first": 0, "tree": [root, leaf(0), leaf(1)]}]
    files = {
        "centroids": write_tensors(path, "centroids", {"centroids": centroids, "means": centroids}),
        "clusters": write_json(path, "clusters", {"access_sets": sets}),
        "documents": write_table(path, "documents", table),
        "embeddings": write_tensors(
            path, "embeddings", {"embeddings": torch.from_numpy(unit_rows(count).astype(np.float16))}
        ),
    }
    if texts is not None:
        written = [*texts, *(f"text of {i}" for i in range(len(texts), count))]
        files["texts"] = write_table(path, "texts", pyarrow.table({"id": ids, "text": written}))
    manifest = Manifest(
        format=1,
        generation=0,
        recipe="paper",
        base=BaseRecord("org/tiny", None, "a", "b"),
        encoder=EncoderRecord("org/mini", None, "c", DIM, "", 16),
        router=RouterRecord("sparse_softmax", 0.05, 0.01, 50, 2.5, 3.0),
        trunk=None,
        trunk_outcome=None,
        experts=tuple(experts),
        files=files,
        config={},
        corpus={},
        versions={},
        created={"host": "here"},
    )
    commit(path, manifest)
    return Bank.open(path)


def contents(page: Path) -> dict:
    """The data in the page, read as a browser does: up to the first end of its element."""
    text = page.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


class Tags(HTMLParser):
    """The elements of a page, as a parser of HTML sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def tags(page: Path) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser.seen


def test_the_same_bank_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    owners = [i % 2 for i in range(30)]
    first, second = (make_bank(tmp_path / name, owners, ((), ())) for name in ("here", "there"))
    assert write_map(first, tmp_path / "a.html") == tmp_path / "a.html"
    write_map(second, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "b.html", "here", "there"]


def test_a_text_label_or_source_cannot_leave_its_element(tmp_path: Path) -> None:
    plain = write_map(make_bank(tmp_path / "plain", [0]), tmp_path / "plain.html")
    page = write_map(make_bank(tmp_path / "bank", [0], texts=[ATTACK], label=ATTACK), tmp_path / "map.html")
    assert contents(page)["points"]["text"] == [" ".join(ATTACK.split())]
    assert contents(page)["clusters"][0]["label"] == f"{ATTACK} 0"
    assert tags(page) == tags(plain)
    assert "\u2028" not in page.read_text(encoding="utf-8")


def test_the_template_s_words_in_a_text_are_only_text(tmp_path: Path) -> None:
    page = write_map(make_bank(tmp_path / "bank", [0], texts=["{{data}} {{policy}}"]), tmp_path / "map.html")
    assert contents(page)["points"]["text"] == ["{{data}} {{policy}}"]


def test_the_page_asks_nothing_of_any_network(tmp_path: Path) -> None:
    page = write_map(make_bank(tmp_path / "bank", [0, 0]), tmp_path / "map.html")
    policies = [attributes for tag, attributes in tags(page) if tag == "meta" and "http-equiv" in attributes]
    assert [p["content"].partition(";")[0] for p in policies] == ["default-src 'none'"]
    assert not any({"src", "href"} & set(attributes) for _, attributes in tags(page))
    addresses = re.findall(r"https?://[^\"'\s]*", page.read_text(encoding="utf-8"))
    assert set(addresses) == {"http://www.w3.org/2000/svg"}  # the name of the SVG language, which nobody fetches


def test_restricted_documents_need_the_grant_and_never_move_public_ones(tmp_path: Path) -> None:
    owners = [i % 2 for i in range(40)]
    bank = make_bank(tmp_path / "bank", owners, ((), ("hr",)), texts=[f"secret {i}" for i in range(40)])
    without = write_map(bank, tmp_path / "without.html")
    wrong = write_map(bank, tmp_path / "wrong.html", grant=["sales"])
    granted = contents(write_map(bank, tmp_path / "granted.html", grant=["hr", "sales"]))
    assert without.read_bytes() == wrong.read_bytes()
    hidden = contents(without)
    assert hidden["points"]["source"] == [f"notes/{i}.txt" for i in range(0, 40, 2)]
    assert [cluster["id"] for cluster in hidden["clusters"]] == ["e0"] and hidden["trees"] == ["e0"]
    text = without.read_text(encoding="utf-8")
    assert 'secret 1"' not in text and "cluster 1" not in text and '"hr"' not in text
    assert any("Left out: 20 restricted documents" in note for note in hidden["notes"])
    assert granted["points"]["source"] == [f"notes/{i}.txt" for i in range(40)]
    assert [cluster["access"] for cluster in granted["clusters"]] == [[], ["hr"]]
    assert granted["trees"] == ["e0", "e1"]
    for axis in "xy":  # the hull is that of the public documents, for the others are means of them
        assert granted["points"][axis][::2] == hidden["points"][axis]


def test_an_expert_that_asks_for_two_names_is_not_shown_for_one(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", [0, 1], ((), ("hr", "legal")))
    assert len(contents(write_map(bank, tmp_path / "one.html", ["hr"]))["clusters"]) == 1
    assert len(contents(write_map(bank, tmp_path / "two.html", ["hr", "legal"]))["clusters"]) == 2


def test_a_bank_without_public_documents_is_refused_whatever_the_grant(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", [0, 0], (("hr",),))
    for grant in ([], ["hr"]):
        with pytest.raises(UsageError, match="no public document"):
            write_map(bank, tmp_path / "map.html", grant)
    assert not (tmp_path / "map.html").exists()


def test_one_document_lies_in_the_middle(tmp_path: Path) -> None:
    found = contents(write_map(make_bank(tmp_path / "bank", [0]), tmp_path / "map.html"))
    assert (found["points"]["x"], found["points"]["y"]) == ([GRID // 2], [GRID // 2])
    assert found["clusters"][0]["middle"] == [GRID // 2, GRID // 2]


def test_tune_and_test_documents_are_not_drawn(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", [0, 0, 0], splits=["tune", "train", "test"])
    assert contents(write_map(bank, tmp_path / "map.html"))["points"]["source"] == ["notes/1.txt"]


def test_a_bank_without_texts_says_so(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", [0, 0], texts=None)
    found = contents(write_map(bank, tmp_path / "map.html"))
    assert found["points"]["text"] is None
    assert any("built without texts" in note for note in found["notes"])


def test_long_texts_are_cut_and_white_space_is_run_together(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", [0, 0], texts=["a\n\n b\t" + "c" * 500, "short"])
    found = contents(write_map(bank, tmp_path / "map.html"))["points"]["text"]
    assert found == ["a b " + "c" * 196 + "…", "short"]


def test_outcomes_are_said_in_words_and_the_tree_is_nested(tmp_path: Path) -> None:
    found = contents(write_map(make_bank(tmp_path / "bank", [0, 1], ((), ())), tmp_path / "map.html"))
    assert [cluster["outcome"] for cluster in found["clusters"]] == [
        "good: 0.500 nats a token better than the base on 4 tune documents",
        "harmful: 0.500 nats a token worse than the base on 4 tune documents, and so not routed to",
    ]
    assert found["trees"] == [["e0", "e1"]]


def test_more_documents_than_are_drawn_give_a_sample_that_is_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map_module, "DRAWN", 20)
    monkeypatch.setattr(map_module, "FITTED", 12)
    found = contents(write_map(make_bank(tmp_path / "bank", [0] * 50), tmp_path / "map.html"))
    sources = found["points"]["source"]
    assert len(sources) == len(set(sources)) == 20
    assert sources == sorted(sources, key=lambda source: int(re.findall(r"\d+", source)[0]))
    assert any("20 of the 50 documents" in note for note in found["notes"])
    assert any("fitted on 12 public documents" in note for note in found["notes"])


@pytest.mark.parametrize("name", ["missing/map.html", "folder"])
def test_a_target_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    bank = make_bank(tmp_path / "bank", [0])
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_map(bank, tmp_path / name)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_few_documents_lie_on_their_principal_axes(count: int) -> None:
    """Oracle: the distances in the plane are those of the best rank-2 approximation, by eigenvalues in fp64."""
    rows = unit_rows(count)
    spots, _ = place(rows, rows[:0])
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    oracle = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0))
    gram = spots @ spots.T
    assert spots.shape == (count, 2)
    np.testing.assert_allclose(gram, oracle @ oracle.T, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 9), others=st.integers(1, 6), seed=st.integers(0, 99))
def test_others_lie_at_the_softmax_mean_of_their_neighbours(count: int, others: int, seed: int) -> None:
    """Oracle: the formula of `write_map` as a loop in fp64."""
    fitted, rest = unit_rows(count, seed), unit_rows(others, seed + 100)
    spots, found = place(fitted, rest)
    for vector, position in zip(rest.astype(np.float64), found, strict=True):
        cosines = sorted(((float(row @ vector), k) for k, row in enumerate(fitted.astype(np.float64))), reverse=True)
        weights = [(np.exp((cosine - cosines[0][0]) / 0.03), k) for cosine, k in cosines[:10]]
        mean = sum(w * spots[k] for w, k in weights) / sum(w for w, _ in weights)
        np.testing.assert_allclose(position, mean, atol=1e-4)


def test_documents_that_are_all_the_same_are_drawn(tmp_path: Path) -> None:
    same = np.repeat(unit_rows(1), 20, axis=0)
    spots, beside = place(same, same[:3])
    assert np.isfinite(spots).all() and np.isfinite(beside).all()


def test_groups_that_are_far_apart_stay_apart() -> None:
    centres = np.eye(DIM, dtype=np.float32)[[0, 0, 1, 1, 2, 2] * 5]
    rows = centres + 0.05 * unit_rows(30)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    spots, beside = place(rows, np.eye(DIM, dtype=np.float32)[:3])
    group = centres.argmax(axis=1)
    for k, position in enumerate(beside):
        distances = np.linalg.norm(spots - position, axis=1)
        assert distances[group == k].max() < distances[group != k].min()

"""Readable names of clusters: the words that set each one's texts apart from the others', by c-TF-IDF."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_TEXTS = 500
"""Texts of a cluster that are read at most, evenly spread over its members."""

_CHARACTERS = 100_000
"""Characters of a cluster that are read at most, shared equally by those texts."""

_RANKED = 50
"""Words of a cluster among which its label is sought."""

_IDENTIFIER_BREAK = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W\d_]{3,30}")

_STUMPS = "aren com couldn didn doesn don hadn hasn haven isn shouldn wasn weren won wouldn www https"
_KEYWORDS = """
    abstract args arg async auto await bool boolean break byte case catch char cls const continue constexpr def default
    define delegate delete dict double elif else endif enum errno export extends extern false final finally float
    foreach func function goto ifdef ifndef impl implements include init inline instanceof int isinstance kwargs lambda
    len let long main mut namespace new nil none null nullptr num object operator override package param params pass
    print printf private protected ptr pub public raise range register repr return returns self short signed sizeof
    static std str string struct super switch template this throw throws true try tuple type typedef typename typeof
    uint undefined union unsigned using val value var virtual void volatile while with xor yield
"""


def label_clusters(texts_per_cluster: Sequence[Sequence[str]], words: int = 4) -> list[str]:
    """A label of about `words` words for every cluster, all different, e.g. "socket server request http".

    Words are ranked by BERTopic's c-TF-IDF, tf_{t,k} · log(1 + A / f_t): tf_{t,k} how often t stands in cluster k,
    f_t in all clusters, A the mean number of words of a cluster. Identifiers are split into words; English stop words
    and keywords of programming languages are left out. Labels that would be equal get their next word, or the
    cluster's number if they have none; a cluster without words is called by its number, "cluster 3".
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    unwanted = {*ENGLISH_STOP_WORDS, *_STUMPS.split(), *_KEYWORDS.split(), *keyword.kwlist}
    terms = [[word for word in _words(texts) if word not in unwanted] for texts in texts_per_cluster]
    if not any(terms):
        return [f"cluster {k}" for k in range(len(terms))]
    vectorizer = CountVectorizer(analyzer=list)
    counts = vectorizer.fit_transform(terms)
    vocabulary = vectorizer.get_feature_names_out()
    frequency = np.asarray(counts.sum(axis=0)).ravel()
    idf = np.log1p(counts.sum() / len(terms) / frequency)

    labels: list[str] = []
    seen: set[frozenset[str]] = set()
    for k in range(len(terms)):
        row = counts[[k]]
        order = np.lexsort((row.indices, -row.data * idf[row.indices]))
        ranked = _one_form_each(vocabulary[row.indices[order[:_RANKED]]])
        length = words
        while frozenset(ranked[:length]) in seen and length < len(ranked):
            length += 1
        chosen = ranked[:length]
        name = " ".join(chosen) if chosen else "cluster"
        labels.append(f"{name} {k}" if not chosen or frozenset(chosen) in seen else name)
        seen.add(frozenset(chosen))
    return labels


def _words(texts: Sequence[str]) -> Iterator[str]:
    """Lower-case words of a bounded, even sample of the texts; identifiers are split, digits divide words."""
    sample = texts[:: -(-len(texts) // _TEXTS)] if texts else ()
    for text in sample:
        for word in _WORD.finditer(_IDENTIFIER_BREAK.sub(" ", text[: _CHARACTERS // len(sample)])):
            yield word.group().lower()


def _one_form_each(ranked: Iterable[str]) -> list[str]:
    """The words without those that only differ from an earlier one as plural and singular do."""
    kept: dict[str, str] = {}
    for word in ranked:
        kept.setdefault(_singular(word), word)
    return list(kept.values())


def _singular(word: str) -> str:
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word

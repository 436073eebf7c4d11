"""Checks: losses of documents against an oracle, outcomes, and the choice of β."""

import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from localmoe.bank.manifest import Outcome
from localmoe.config import RouteConfig
from localmoe.lora import attached
from localmoe.routing import Centroids
from localmoe.train.checks import (
    AT_MOST,
    UNTUNED_BETA,
    Nll,
    choose_beta,
    document_nll,
    nearest_rows,
    outcome,
    outcome_beyond_doubt,
)


def test_the_loss_of_a_document_is_the_sum_over_its_passages_under_the_adapter() -> None:
    model = tiny.base("llama")
    adapter = tiny.random_adapter(model)
    parts = tiny.passages(*range(3, 13))
    documents = {5: parts[:4], 2: parts[4:9], 9: parts[9:]}
    for update in (None, adapter):
        found = document_nll(model, documents, update)
        assert list(found) == [5, 2, 9]
        for row, passages in documents.items():
            total, tokens = 0.0, 0
            for passage in passages:
                targets = passage.tokens.masked_fill(~passage.labels, -100)[1:]
                if update is None:
                    logits = model(passage.tokens[None]).logits
                else:
                    with attached(model, update):
                        logits = model(passage.tokens[None]).logits
                total += float(F.cross_entropy(logits[0, :-1].double(), targets, reduction="sum"))
                tokens += passage.predicted
            assert found[row].tokens == tokens
            assert found[row].total == pytest.approx(total, abs=1e-3)


def test_an_outcome_compares_means_per_token_and_needs_three_documents() -> None:
    reference = {row: Nll(30.0, 10) for row in range(4)}
    better = {0: Nll(20.0, 10), 1: Nll(35.0, 10), 2: Nll(30.0, 10)}
    worse = {0: Nll(30.0, 10), 1: Nll(30.0, 10), 2: Nll(31.0, 10)}
    good, harmful = outcome(better, reference), outcome(worse, reference)
    assert (good.status, good.documents) == ("good", 3)
    assert (good.nll, good.reference_nll) == pytest.approx((85 / 30, 3.0))
    assert harmful.status == "harmful"
    assert outcome({0: Nll(1.0, 10), 1: Nll(1.0, 10)}, reference).status == "unchecked"
    broken = outcome(better | {1: Nll(float("nan"), 10)}, reference)
    assert (broken.status, broken.nll, broken.reason) == ("harmful", None, "its loss on tune documents is nan")
    assert outcome(dict(list(reference.items())[:3]), reference).status == "harmful"


def test_an_expert_made_to_be_merged_is_harmful_only_beyond_the_standard_error() -> None:
    tokens, reference = (10, 20, 40, 30), (30.0, 50.0, 90.0, 70.0)
    others = {row: Nll(total, count) for row, (total, count) in enumerate(zip(reference, tokens, strict=True))}

    def found(*worse: float) -> Outcome:
        own = {row: Nll(others[row].total + more, tokens[row]) for row, more in enumerate(worse)}
        return outcome_beyond_doubt(own, others)

    # every document worse by 0.1 nats a token: no doubt; by as much on average, but each its own way: a half of it
    assert found(1.0, 2.0, 4.0, 3.0).status == "harmful"
    assert found(-1.0, -2.0, -4.0, -2.5).status == "good"
    scattered = found(7.0, -6.0, 8.0, 1.0)
    rest = np.array([7.0, -6.0, 8.0, 1.0]) - 0.1 * np.array(tokens)
    error = math.sqrt((rest**2).sum() * 4 / 3) / 100
    assert scattered.status == "unchecked" and f"+0.1000 ± {error:.4f} nats" in str(scattered.reason)
    assert found(0.0, 0.0, 0.0, 0.0).status == "unchecked"
    assert found(0.0, 0.0, 0.0, math.nan).status == "harmful"


def test_nearest_rows_are_the_most_similar_of_each_centroid() -> None:
    assignment = np.array([0, 1, 0, 0, 3])
    similarity = np.array([0.1, 0.9, 0.8, 0.5, 0.2])
    assert nearest_rows(assignment, similarity, 4) == [[2, 3, 0], [1], [], [4]]
    assert nearest_rows(assignment, similarity, 4, most=2) == [[2, 3], [1], [], [4]]
    assert len(nearest_rows(np.zeros(50, dtype=int), np.ones(50), 1)[0]) == AT_MOST


CENTROIDS = Centroids(("a", "b", "c", "d"), torch.eye(4), "bank")


def _queries(count: int) -> np.ndarray:
    rows = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return F.normalize(rows, dim=1).numpy()


def test_beta_is_the_one_that_gives_the_wanted_mean_of_active_experts() -> None:
    record, note = choose_beta(_queries(20), CENTROIDS, RouteConfig(active=2.0))
    assert note == ""
    assert record.beta > 0
    assert 1.5 < record.active <= 2.0 == record.wanted


def test_of_few_experts_no_more_than_about_half_are_wanted_and_it_is_said() -> None:
    record, note = choose_beta(_queries(20), CENTROIDS, RouteConfig(active=4.0))
    assert record.wanted == (len(CENTROIDS.experts) + 1) / 2
    assert record.active <= record.wanted
    assert "instead of 4" in note and f"only {len(CENTROIDS.experts)}" in note


@pytest.mark.parametrize("beta", [0.0001, 0.3, 0.55])
def test_a_beta_that_was_given_is_kept_and_its_active_experts_are_counted(beta: float) -> None:
    record, note = choose_beta(_queries(200), CENTROIDS, RouteConfig(beta=beta))
    assert (record.beta, note) == (beta, "")
    p = torch.softmax(torch.from_numpy(_queries(200)).double() / beta, dim=1)  # the centroids are the axes
    assert record.active == pytest.approx((p > 0.01).sum(dim=1).double().mean().item())


def test_the_active_experts_are_those_of_the_router() -> None:
    assert choose_beta(_queries(20), CENTROIDS, RouteConfig(router="nearest"))[0].active == 1
    assert choose_beta(_queries(20), CENTROIDS, RouteConfig(router="uniform", active=2.5))[0].active == 2


def test_without_tune_documents_or_experts_it_says_that_beta_was_not_tuned() -> None:
    record, note = choose_beta(_queries(2), CENTROIDS, RouteConfig())
    assert record.beta == UNTUNED_BETA
    assert "only 2 public tune documents" in note
    record, note = choose_beta(_queries(20), Centroids((), torch.zeros(0, 4), "bank"), RouteConfig())
    assert (record.beta, note) == (0.0, "no expert may be routed to")

"""Routing against loops in fp64, the contract of every router, and bit-equality of mixes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe.config import RouteConfig
from localmoe.errors import BankError, ConfigError, LocalMoEError, PromptError, UnknownNameError, UsageError
from localmoe.routing import (
    Centroids,
    Mix,
    beta_scores,
    find_beta,
    mean_similarities,
    route,
    routers,
    similarities,
    sparse_softmax,
    variance_reductions,
    weights,
)

CONFIG = RouteConfig(beta=0.05, tau=0.01)
ROUTERS = tuple(routers)
every_router = pytest.mark.parametrize("router", ROUTERS)


def units(rows: int, dim: int, seed: int) -> Tensor:
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors)


def bank(experts: int, dim: int = 24, seed: int = 0) -> Centroids:
    means = 0.3 * units(experts, dim, seed + 100) + 0.5 * units(experts, dim, seed)
    return Centroids(tuple(f"e{k:06d}" for k in range(experts)), units(experts, dim, seed), "digest", means)


def means_of(centroids: Centroids) -> Tensor:
    assert centroids.means is not None
    return centroids.means


def weights_of(mix: Mix) -> dict[str, float]:
    return dict(zip(mix.experts, mix.weights, strict=True))


def softmax(scores: list[float], beta: float) -> list[float]:
    parts = [math.exp((score - max(scores)) / beta) for score in scores]
    return [part / math.fsum(parts) for part in parts]


def nearest_of(scores: list[float]) -> int:
    return max(range(len(scores)), key=lambda k: scores[k])  # max returns the first of equals


def sparse_softmax_oracle(scores: list[float], beta: float, tau: float) -> list[float]:
    excess = [max(p - tau, 0.0) for p in softmax(scores, beta)]
    if math.fsum(excess) == 0:
        excess[nearest_of(scores)] = 1.0
    return [part / math.fsum(excess) for part in excess]


def threshold_oracle(scores: list[float], beta: float, tau: float, most: int) -> list[float]:
    """As in ttmerge: the kernel exp(−(1−cos)/β), normalised, kept where > τ, at most `most`, renormalised."""
    kernel = [math.exp(-(1 - score) / beta) for score in scores]
    share = [part / math.fsum(kernel) for part in kernel]
    kept = sorted((k for k in range(len(share)) if share[k] > tau), key=lambda k: -share[k])[:most]
    kept = kept if kept else [nearest_of(scores)]
    total = math.fsum(share[k] for k in kept)
    return [share[k] / total if k in kept else 0.0 for k in range(len(share))]


def sift_oracle(query: Tensor, vectors: Tensor, noise: float) -> list[float]:
    """Weights by solving with K + λI anew for every n; vectors: the nearest first."""
    variances = [1.0]
    for n in range(1, len(vectors) + 1):
        some = vectors[:n].double()
        k = some @ query.double()
        matrix = some @ some.T + noise * torch.eye(n, dtype=torch.float64)
        variances.append(1 - float(k @ torch.linalg.solve(matrix, k)))
    return [(before - after) / (1 - variances[-1]) for before, after in pairwise(variances)]


def cosines(query: Tensor, centroids: Centroids) -> list[float]:
    return [
        math.fsum(a * b for a, b in zip(query.tolist(), vector, strict=True)) for vector in centroids.vectors.tolist()
    ]


# --- the formulas ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.floats(-1, 1), min_size=1, max_size=30),
    beta=st.sampled_from([0.005, 0.04, 0.3, 2.0]),
    tau=st.sampled_from([0.0, 0.01, 0.1, 0.6]),
)
def test_sparse_softmax_equals_the_loop(scores: list[float], beta: float, tau: float) -> None:
    weights = sparse_softmax(torch.tensor([scores], dtype=torch.float64), beta, tau)[0]
    expected = sparse_softmax_oracle(scores, beta, tau)
    if all(abs(p - tau) > 1e-9 for p in softmax(scores, beta)):  # on the edge of τ both answers are right
        assert weights.tolist() == pytest.approx(expected, abs=1e-9)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


def test_similarities_equal_the_fp64_loop() -> None:
    centroids, queries = bank(11, dim=50), units(4, 50, 1)
    expected = [cosines(query, centroids) for query in queries]
    assert torch.allclose(similarities(queries, centroids), torch.tensor(expected).double(), atol=1e-7, rtol=0)


def test_similarities_are_the_exact_sums_of_their_rounded_factors() -> None:
    centroids, queries = bank(3, dim=384), units(2, 384, 1)
    scores = similarities(queries, centroids)
    for row, query in enumerate(queries.tolist()):
        for column, vector in enumerate(centroids.vectors.tolist()):
            whole = sum(round(a * 2**26) * round(b * 2**26) for a, b in zip(query, vector, strict=True))
            assert Fraction(scores[row, column].item()) == Fraction(whole, 2**52)


def test_the_default_router_gives_the_papers_weights() -> None:
    centroids, queries = bank(20), units(6, 24, 1)
    for query, mix in zip(queries, route(queries, centroids, CONFIG), strict=True):
        expected = sparse_softmax_oracle(cosines(query, centroids), 0.05, 0.01)
        named = {expert: w for expert, w in zip(centroids.experts, expected, strict=True) if w > 0}
        assert weights_of(mix) == pytest.approx(named, abs=1e-6)


def test_the_threshold_router_gives_the_weights_of_ttmerge() -> None:
    centroids, queries = bank(60), units(6, 24, 1)
    config = RouteConfig(router="threshold", beta=0.2**2, tau=0.01, max_experts=4)
    for query, mix in zip(queries, route(queries, centroids, config), strict=True):
        expected = threshold_oracle(cosines(query, centroids), 0.04, 0.01, most=4)
        named = {expert: w for expert, w in zip(centroids.experts, expected, strict=True) if w > 0}
        assert weights_of(mix) == pytest.approx(named, abs=1e-6)


def test_uniform_takes_the_nearest_experts_with_equal_weights() -> None:
    centroids = Centroids(("a", "b", "c"), torch.eye(3), "digest")
    query = torch.tensor([[0.6, 0.8, 0.0]])
    (mix,) = route(query, centroids, RouteConfig(router="uniform", active=2.9))
    assert weights_of(mix) == {"a": 0.5, "b": 0.5}
    (mix,) = route(query, centroids, RouteConfig(router="uniform", active=2.9, max_experts=1))
    assert weights_of(mix) == {"b": 1.0}


def test_nearest_takes_one_expert() -> None:
    centroids = Centroids(("a", "b", "c"), torch.eye(3), "digest")
    (mix,) = route(torch.tensor([[0.6, 0.0, 0.8]]), centroids, RouteConfig(router="nearest"))
    assert mix == Mix(("c",), (1.0,), "linear", "digest", None)


@pytest.mark.parametrize("noise", [1e-6, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_sift_weighs_by_what_each_nearest_centroid_takes_off_the_variance(noise: float, count: int) -> None:
    centroids, queries = bank(12, dim=16), units(5, 16, 1)
    config = RouteConfig(router="sift", active=count, sift_lambda=noise)
    for query, mix in zip(queries, route(queries, centroids, config), strict=True):
        order = torch.tensor(cosines(query, centroids)).argsort(descending=True)[:count].tolist()
        expected = sift_oracle(query, centroids.vectors[order], noise)
        named = {centroids.experts[k]: w for k, w in zip(order, expected, strict=True)}
        assert weights_of(mix) == pytest.approx(named, abs=2e-6)


def test_reductions_sum_to_the_variance_that_all_centroids_take_off() -> None:
    vectors, query = units(9, 16, 0).double(), units(1, 16, 1)[0].double()
    near, gram = vectors @ query, vectors @ vectors.T
    whole = near @ torch.linalg.solve(gram + 0.1 * torch.eye(9).double(), near)
    assert variance_reductions(near, gram, 0.1).sum().item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("copies", [2, 5, 20])
def test_copies_of_an_expert_share_its_weight_under_sift_and_multiply_it_under_softmax(copies: int) -> None:
    vectors, query = units(4, 16, 0), units(1, 16, 1)
    nearest = int((vectors @ query[0]).argmax())
    names = tuple("abcd")
    once = Centroids(names, vectors, "digest")
    many = Centroids(
        (*names, *(f"copy{n:02d}" for n in range(copies - 1))),
        torch.cat([vectors, vectors[nearest].expand(copies - 1, -1)]),
        "digest",
    )

    def share(centroids: Centroids, config: RouteConfig) -> float:
        (mix,) = route(query, centroids, config)
        return sum(w for expert, w in weights_of(mix).items() if expert == names[nearest] or "copy" in expert)

    sift = RouteConfig(router="sift", active=4 + copies, sift_lambda=1e-3)
    assert share(many, sift) == pytest.approx(share(once, sift), abs=2e-3)
    softmax = RouteConfig(beta=1.0, tau=0.0)
    assert share(many, softmax) > share(once, softmax) + 0.1


def test_where_sift_finds_nothing_in_common_the_nearest_is_taken_and_the_mix_says_so() -> None:
    centroids = Centroids(("a", "b"), torch.eye(3)[:2], "digest")
    (mix,) = route(torch.eye(3)[2:], centroids, RouteConfig(router="sift"))
    assert weights_of(mix) == {"a": 1.0}
    assert mix.fallback is not None and "right angles" in mix.fallback


def test_members_weighs_by_the_mean_squared_distance_to_an_experts_documents() -> None:
    documents, queries = units(60, 16, 0), units(4, 16, 1)
    parts = documents.split([10, 35, 15])
    means = torch.stack([part.double().mean(0).float() for part in parts])
    centroids = Centroids(("a", "b", "c"), torch.nn.functional.normalize(means), "digest", means)
    for query, mix in zip(queries, route(queries, centroids, RouteConfig(router="members", beta=0.05)), strict=True):
        distances = [float((part.double() - query.double()).square().sum(1).mean()) for part in parts]
        expected = sparse_softmax_oracle([-distance / 2 for distance in distances], 0.05, 0.01)
        named = {expert: w for expert, w in zip("abc", expected, strict=True) if w > 0}
        assert weights_of(mix) == pytest.approx(named, abs=1e-5)


def test_beta_is_found_on_the_scores_that_the_router_reads() -> None:
    centroids, queries = bank(40), units(30, 24, 1)
    assert torch.equal(beta_scores(queries, centroids, "sparse_softmax"), similarities(queries, centroids))
    scores = beta_scores(queries, centroids, "members")
    assert torch.equal(scores, mean_similarities(queries, centroids))
    found = find_beta(scores, 3.0, 0.01, 50)
    mixes = route(queries, centroids, RouteConfig(router="members", beta=found.beta))
    assert sum(len(mix.experts) for mix in mixes) / 30 == pytest.approx(found.active)


# --- edges of β, τ and K --------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["sparse_softmax", "threshold"])
def test_beta_zero_is_the_nearest_alone_and_no_fallback(router: str) -> None:
    centroids, queries = bank(9), units(5, 24, 1)
    zero = route(queries, centroids, RouteConfig(router=router, beta=0.0))
    assert zero == route(queries, centroids, RouteConfig(router="nearest"))


@every_router
def test_ties_go_to_the_lowest_index(router: str) -> None:
    vectors = torch.eye(4)[[1, 0, 0, 0]]
    centroids = Centroids(("d", "c", "b", "a"), vectors, "digest", vectors / 2)
    config = RouteConfig(router=router, beta=0.05, active=1, max_experts=1)
    assert route(torch.eye(4)[:1], centroids, config)[0].experts == ("c",)
    config = RouteConfig(router=router, beta=0.0, active=1)
    assert route(torch.eye(4)[:1], centroids, config)[0].experts == ("c",)


@pytest.mark.parametrize("beta", [5e-324, 1e-300, 1e-9])
def test_the_smallest_beta_does_not_overflow(beta: float) -> None:
    assert sparse_softmax(torch.tensor([[0.1, 0.9, -1.0]]), beta, 0.01).tolist() == [[0, 1, 0]]


def test_a_huge_beta_is_uniform() -> None:
    assert sparse_softmax(torch.tensor([[0.1, 0.9]]), 1e300, 0.0).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("router", ["sparse_softmax", "threshold"])
def test_s35_where_nothing_passes_tau_the_nearest_is_taken_and_the_mix_says_so(router: str) -> None:
    centroids, queries = bank(100), units(3, 24, 1)
    config = RouteConfig(router=router, beta=1e6, tau=0.02)
    for mix, nearest in zip(
        route(queries, centroids, config),
        route(queries, centroids, RouteConfig(router="nearest")),
        strict=True,
    ):
        assert mix.fallback is not None and "tau = 0.02" in mix.fallback
        assert replace(mix, fallback=None) == nearest


def test_a_weight_of_exactly_tau_does_not_pass() -> None:
    assert sparse_softmax(torch.zeros(1, 4), beta=1.0, tau=0.25).tolist() == [[1, 0, 0, 0]]


def test_an_expert_at_exactly_tau_does_not_pass_the_threshold_router() -> None:
    centroids = Centroids(("a", "b"), torch.eye(2)[[0, 0]], "digest")
    (mix,) = route(torch.eye(2)[:1], centroids, RouteConfig(router="threshold", beta=1.0, tau=0.5))
    assert weights_of(mix) == {"a": 1.0} and mix.fallback is not None


def test_max_experts_keeps_the_largest_weights_and_renormalises() -> None:
    centroids, queries = bank(20), units(4, 24, 1)
    free = route(queries, centroids, replace(CONFIG, tau=0.0))
    for whole, capped in zip(free, route(queries, centroids, replace(CONFIG, tau=0.0, max_experts=3)), strict=True):
        largest = sorted(whole.weights, reverse=True)[:3]
        kept = {expert: w / sum(largest) for expert, w in weights_of(whole).items() if w in largest}
        assert len(whole.experts) > 3 and len(kept) == 3
        assert weights_of(capped) == pytest.approx(kept, abs=1e-6)


def test_without_experts_every_mix_is_the_base_model_and_says_so() -> None:
    mixes = route(units(2, 8, 0), Centroids((), torch.empty(0, 8), "digest"), CONFIG)
    assert [(mix.experts, mix.weights, mix.bank) for mix in mixes] == [((), (), "digest")] * 2
    assert all(mix.fallback is not None and "base model" in mix.fallback for mix in mixes)


def test_beyond_the_limit_softmax_acts_on_the_nearest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.5, 0.2, 0.0]], dtype=torch.float64)
    monkeypatch.setattr(weights, "_ALL", 5)
    monkeypatch.setattr(weights, "_NEAREST", 3)
    expected = sparse_softmax_oracle([0.5, 0.3, 0.5], 0.3, 0.01)
    assert sparse_softmax(scores, 0.3, 0.01)[0, 1:4].tolist() == pytest.approx(expected, abs=1e-12)
    assert sparse_softmax(scores, 0.3, 0.01)[0, [0, 4, 5]].tolist() == [0, 0, 0]
    at_the_limit = sparse_softmax(scores[:, :5], 0.3, 0.01)[0].tolist()
    assert at_the_limit == pytest.approx(sparse_softmax_oracle(scores[0, :5].tolist(), 0.3, 0.01), abs=1e-12)


def test_just_beyond_100_000_experts_1_024_share_the_softmax() -> None:
    weights = sparse_softmax(torch.zeros(1, 100_001), beta=1.0, tau=0.0)
    assert weights.count_nonzero() == 1024 and weights[0, :1024].tolist() == [1 / 1024] * 1024


# --- the contract of every router -----------------------------------------------------------------------


@every_router
@pytest.mark.parametrize("tau", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("experts", [1, 2, 120])
def test_every_router_returns_sorted_experts_with_fp32_weights_that_sum_to_one(
    router: str, tau: float, experts: int
) -> None:
    config = RouteConfig(router=router, beta=0.1, tau=tau, active=3)
    for mix in route(units(9, 24, 1), bank(experts), config):
        assert 1 <= len(mix.experts) == len(mix.weights) <= config.max_experts
        assert list(mix.experts) == sorted(set(mix.experts))
        assert all(weight > 0 for weight in mix.weights)
        assert torch.tensor(mix.weights, dtype=torch.float32).tolist() == list(mix.weights)
        assert math.fsum(mix.weights) == pytest.approx(1, abs=1e-6)
        assert mix.bank == "digest"


@every_router
@pytest.mark.parametrize("experts", [1, 7, 33, 1000])
def test_mixes_are_bit_equal_whatever_else_is_in_the_batch(router: str, experts: int) -> None:
    centroids, queries = bank(experts, dim=65), units(64, 65, 1)
    config = RouteConfig(router=router, beta=0.03, tau=0.001, active=30, max_experts=600)
    alone = [route(query[None], centroids, config)[0] for query in queries]
    assert route(queries, centroids, config) == alone
    assert route(queries[10:17], centroids, config) == alone[10:17]
    assert route(queries.flip(0), centroids, config) == alone[::-1]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_router
def test_mixes_are_bit_equal_with_any_number_of_threads(router: str, set_threads: Callable[[int], None]) -> None:
    centroids, queries = bank(500, dim=130), units(70, 130, 1)
    config = RouteConfig(router=router, beta=0.03, tau=0.0, active=100, max_experts=500)
    mixes = []
    for threads in (1, 2, 3):
        set_threads(threads)
        mixes.append(route(queries, replace(centroids), config))
    assert mixes[0] == mixes[1] == mixes[2]


def test_weights_over_very_many_experts_are_bit_equal_whatever_else_is_in_the_batch() -> None:
    scores = torch.rand(5, 90_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = sparse_softmax(scores, beta=0.3, tau=0.0)
    alone = [sparse_softmax(row[None], beta=0.3, tau=0.0)[0] for row in scores]
    assert torch.equal(torch.stack(alone), together)


@every_router
@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(40)), beta=st.sampled_from([0.01, 0.1, 1.0]))
def test_the_order_of_the_experts_does_not_matter_to_a_bit(router: str, order: list[int], beta: float) -> None:
    centroids, queries = bank(40), units(3, 24, 1)
    experts = tuple(centroids.experts[k] for k in order)
    permuted = Centroids(experts, centroids.vectors[order], "digest", means_of(centroids)[order])
    config = RouteConfig(router=router, beta=beta, tau=0.001, active=5)
    assert route(queries, permuted, config) == route(queries, centroids, config)


@every_router
def test_granted_experts_are_routed_to_the_bit_as_in_a_bank_that_holds_no_others(router: str) -> None:
    everyone, queries = bank(300, dim=65), units(8, 65, 1)
    granted = list(range(3, 300, 7))
    scores = similarities(queries, everyone)
    experts, means = tuple(everyone.experts[k] for k in granted), means_of(everyone)[granted]
    gathered = Centroids(experts, everyone.vectors[granted], "digest", means)
    assert torch.equal(similarities(queries, gathered), scores[:, granted])
    alone = Centroids(experts, torch.stack([everyone.vectors[k].clone() for k in granted]), "digest", means.clone())
    config = RouteConfig(router=router, beta=0.05, tau=0.001)
    assert route(queries, gathered, config) == route(queries, alone, config)


def test_a_router_of_another_package_is_used_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [Mix(("mine",), (1.0,), "linear", "digest", None)]
    monkeypatch.setitem(routers._functions, "mine", lambda queries, centroids, config: mine)
    assert route(units(1, 24, 1), bank(2), RouteConfig(router="mine")) is mine


# --- what is refused ------------------------------------------------------------------------------------


def test_an_unknown_router_is_named_with_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="unknown router 'nearst', did you mean 'nearest'"):
        route(units(1, 24, 1), bank(2), RouteConfig(router="nearst"))


@pytest.mark.parametrize("router", ["sparse_softmax", "threshold"])
def test_an_unset_beta_is_refused_and_the_error_says_who_finds_it(router: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{router}' needs a β[\s\S]*build finds it on the tune documents"):
        route(units(1, 24, 1), bank(2), RouteConfig(router=router))


@every_router
@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (torch.zeros(24), PromptError, "prompt 1 is zero"),
        (torch.full((24,), float("nan")), PromptError, "prompt 1 is not finite"),
        (torch.full((24,), float("inf")), PromptError, "prompt 1 is not finite"),
        (torch.ones(24), UsageError, "prompt 1 has length 4.899, not 1"),
    ],
)
def test_a_query_that_is_no_unit_vector_is_refused(
    router: str, row: Tensor, error: type[LocalMoEError], message: str
) -> None:
    queries = torch.stack([units(1, 24, 1)[0], row])
    with pytest.raises(error, match=message):
        route(queries, bank(3), RouteConfig(router=router, beta=0.1))
    with pytest.raises(error, match=message):
        similarities(queries, bank(3))


@pytest.mark.parametrize("queries", [units(1, 23, 1), units(1, 24, 1)[0]])
def test_queries_of_another_encoder_are_refused(queries: Tensor) -> None:
    with pytest.raises(BankError, match=r"do not fit centroids \[3, 24\]"):
        route(queries, bank(3), CONFIG)


@every_router
def test_an_empty_batch_gives_no_mixes(router: str) -> None:
    assert route(torch.empty(0, 24), bank(3), RouteConfig(router=router, beta=0.1)) == []


def test_embeddings_stored_as_fp16_are_unit_vectors() -> None:
    queries = torch.full((1, 3), 3**-0.5).half()
    assert abs(queries.double().norm() - 1) > 2e-4
    assert len(route(queries, bank(3, dim=3), CONFIG)) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = torch.tensor([[0.1, 0.2], [0.3, bad]])
    with pytest.raises(UsageError, match="score of query 1 and expert 1"):
        sparse_softmax(scores, 0.1, 0.01)
    with pytest.raises(UsageError, match="score of query 1 and expert 1"):
        find_beta(scores, 1.5, 0.01, 50)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="at least one expert"):
        sparse_softmax(torch.zeros(shape), 0.1, 0.01)


@pytest.mark.parametrize(("beta", "tau"), [(-0.1, 0.0), (float("nan"), 0.0), (0.1, -0.1), (0.1, 1.0), (0.1, math.nan)])
def test_beta_and_tau_outside_their_ranges_are_refused(beta: float, tau: float) -> None:
    with pytest.raises(ConfigError, match="must be at least 0"):
        sparse_softmax(torch.zeros(1, 2), beta, tau)


@pytest.mark.parametrize(
    ("experts", "vectors", "message"),
    [
        (("a",), torch.eye(2), r"1 experts need centroids \[K, d\] in fp32, not \[2, 2\]"),
        (("a", "b"), torch.eye(2).double(), "float64"),
        (("a", "b"), torch.eye(4)[0], r"not \[4\]"),
        (("a", "a"), torch.eye(2), "same id"),
        (("a", "b"), torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "expert 'b' has length 1.414"),
        (("a", "b"), torch.tensor([[1.0, 0.0], [float("nan"), 1.0]]), "expert 'b' has length nan"),
    ],
)
def test_s46_centroids_that_cannot_be_right_are_refused(
    experts: tuple[str, ...], vectors: Tensor, message: str
) -> None:
    with pytest.raises(BankError, match=message):
        Centroids(experts, vectors, "digest")


@pytest.mark.parametrize(
    "means",
    [torch.eye(3)[:2], torch.eye(2).double(), torch.eye(2) * 1.1, torch.tensor([[1.0, 0.0], [float("nan"), 0.0]])],
)
def test_means_that_cannot_be_right_are_refused(means: Tensor) -> None:
    with pytest.raises(BankError, match="not those of unit vectors"):
        Centroids(("a", "b"), torch.eye(2), "digest", means)


def test_a_router_on_means_that_are_not_known_is_refused() -> None:
    with pytest.raises(BankError, match="means of the experts' documents are not known"):
        route(torch.eye(2), Centroids(("a", "b"), torch.eye(2), "digest"), RouteConfig(router="members", beta=0.1))


# --- β for a wanted number of experts -------------------------------------------------------------------


def mean_active(scores: Tensor, beta: float, tau: float, most: int) -> float:
    """Mean size of the mixes, counted one softmax at a time."""
    counts = [sum(p > tau for p in softmax(row, beta)) for row in scores.tolist()]
    return sum(min(max(count, 1), most) for count in counts) / len(counts)


def test_the_found_beta_is_the_largest_on_the_rising_branch() -> None:
    scores = similarities(units(30, 24, 1), bank(200))
    found = find_beta(scores, 3.0, 0.01, 50)
    assert found.active == mean_active(scores, found.beta, 0.01, 50) <= 3.0
    assert mean_active(scores, found.beta * 1.002, 0.01, 50) > 3.0
    peak, most = max(found.curve, key=lambda point: point[1])
    falling = [mean for beta, mean in found.curve if beta > peak]
    assert found.beta < peak and most > 3.0
    assert min(falling) <= 3.0  # so the falling branch would have been a wrong answer


def test_the_curve_holds_the_mean_number_of_active_experts() -> None:
    scores = similarities(units(10, 24, 1), bank(120))
    for beta, mean in find_beta(scores, 3.0, 0.01, 5).curve[::5]:
        assert mean == mean_active(scores, beta, 0.01, 5)


@settings(max_examples=6, deadline=None)
@given(
    experts=st.integers(1, 60),
    active=st.floats(1, 20),
    tau=st.sampled_from([0.0, 0.01, 0.05, 0.5]),
    seed=st.integers(0, 5),
)
def test_mixes_with_the_found_beta_have_at_most_the_wanted_mean(
    experts: int, active: float, tau: float, seed: int
) -> None:
    centroids, queries = bank(experts, dim=12, seed=seed), units(20, 12, seed + 1)
    found = find_beta(similarities(queries, centroids), active, tau, 50)
    mixes = route(queries, centroids, RouteConfig(beta=found.beta, tau=tau))
    assert sum(len(mix.experts) for mix in mixes) / 20 == pytest.approx(found.active)
    assert found.active <= active


def test_one_active_expert_needs_no_beta() -> None:
    found = find_beta(similarities(units(9, 24, 1), bank(20)), 1.0, 0.01, 50)
    assert (found.beta, found.active) == (0.0, 1.0)


def test_a_single_expert_needs_no_beta() -> None:
    assert find_beta(torch.rand(5, 1), 3.0, 0.01, 50).beta == 0.0


def test_equal_centroids_that_no_beta_tells_apart_leave_the_nearest_alone() -> None:
    assert find_beta(torch.zeros(5, 4), 3.0, 0.01, 50).beta == 0.0


def test_more_active_experts_than_there_are_stop_where_the_mean_stops_rising() -> None:
    scores = similarities(units(9, 24, 1), bank(4))
    found = find_beta(scores, 10.0, 0.01, 50)
    assert found.active == 4.0
    assert all(mean < 4.0 for beta, mean in found.curve if beta < found.beta)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_beta_cannot_be_found_from_nothing(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"tune_fraction"):
        find_beta(torch.zeros(shape), 3.0, 0.01, 50)


@pytest.mark.parametrize("active", [0.5, math.nan])
def test_fewer_than_one_active_expert_is_refused(active: float) -> None:
    with pytest.raises(ConfigError, match="active experts"):
        find_beta(torch.zeros(2, 2), active, 0.01, 50)


# --- Mix ------------------------------------------------------------------------------------------------

MIX = Mix(("a", "b"), (0.25, 0.75), "linear", "digest", None)
HASHES = {"a": "hash-a", "b": "hash-b", "c": "hash-c"}


def test_the_key_follows_everything_that_decides_the_merged_weights() -> None:
    keys = [
        MIX.key("base", HASHES),
        MIX.key("other", HASHES),
        MIX.key("base", {**HASHES, "b": "hash-c"}),
        replace(MIX, weights=(0.75, 0.25)).key("base", HASHES),
        replace(MIX, weights=(0.25, 0.75 + 2**-24)).key("base", HASHES),
        replace(MIX, method="ties").key("base", HASHES),
        Mix(("a",), (1.0,), "linear", "digest", None).key("base", HASHES),
        Mix((), (), "linear", "digest", None).key("base", HASHES),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_the_key_ignores_names_and_what_fp32_cannot_tell_apart() -> None:
    key = MIX.key("base", HASHES)
    assert replace(MIX, bank="elsewhere", fallback="why").key("base", HASHES) == key
    assert replace(MIX, weights=(0.25, 0.75 + 2**-40)).key("base", HASHES) == key
    renamed = replace(MIX, experts=("x", "y"))
    assert renamed.key("base", {"x": "hash-a", "y": "hash-b"}) == key


def test_the_key_of_a_mix_whose_expert_is_gone_is_refused() -> None:
    with pytest.raises(BankError, match="expert 'b' of the mix is not in the bank"):
        MIX.key("base", {"a": "hash-a"})


@pytest.mark.parametrize(
    ("experts", "weights", "message"),
    [
        (("b", "a"), (0.5, 0.5), "sorted and distinct: b, a"),
        (("a", "a"), (0.5, 0.5), "sorted and distinct"),
        (("a", "b"), (1.0,), "2 experts has 1 weights"),
        (("a",), (float("nan"),), "finite"),
        (("a",), (1e39,), "finite"),
    ],
)
def test_a_mix_that_cannot_be_right_is_refused(
    experts: tuple[str, ...], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Mix(experts, weights, "linear", "digest", None)


def test_a_mix_may_have_weights_that_no_router_gives() -> None:
    assert Mix(("a", "b"), (-0.5, 2.0), "linear", "digest", None).weights == (-0.5, 2.0)

"""Routing: embedded prompts × the experts' centroids → one mix per prompt; no files, no models."""

from localmoe.routing.centroids import Centroids, mean_similarities, similarities
from localmoe.routing.mix import Mix
from localmoe.routing.routers import ON_MEANS, WITHOUT_BETA, Router, beta_scores, route, routers
from localmoe.routing.weights import BetaSearch, find_beta, sparse_softmax, variance_reductions

__all__ = [
    "ON_MEANS",
    "WITHOUT_BETA",
    "BetaSearch",
    "Centroids",
    "Mix",
    "Router",
    "beta_scores",
    "find_beta",
    "mean_similarities",
    "route",
    "routers",
    "similarities",
    "sparse_softmax",
    "variance_reductions",
]

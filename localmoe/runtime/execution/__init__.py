"""Execution: mixes run dense (merged into a second buffer), stacked (beside the weights) or grouped (a mix a row)."""

from localmoe.runtime.execution.choice import Choice, Way, Work, choose
from localmoe.runtime.execution.executor import TRUNK, Executor, Loaded, Running, rounded

__all__ = ["TRUNK", "Choice", "Executor", "Loaded", "Running", "Way", "Work", "choose", "rounded"]

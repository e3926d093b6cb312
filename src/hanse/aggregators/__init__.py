"""From the clients' rows to one vector."""

from hanse.aggregators.mean import Aggregator, mean

__all__ = ["Aggregator", "mean"]

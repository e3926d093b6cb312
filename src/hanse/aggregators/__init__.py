"""From the clients' rows to one vector."""

from hanse.aggregators.base import Aggregator, Combination, PreAggregation
from hanse.aggregators.bulyan import bulyan
from hanse.aggregators.combinations import centred_clipping, geometric_median, krum, multi_krum
from hanse.aggregators.coordinates import Coordinates, meamed, median, phocas, trimmed_mean
from hanse.aggregators.flag import flag
from hanse.aggregators.mean import mean
from hanse.aggregators.merging import Merge, average, robust, variance_corrected
from hanse.aggregators.preaggregation import bucketing, clipping, mixed, nnm, series

__all__ = [
    "Aggregator",
    "Combination",
    "Coordinates",
    "Merge",
    "PreAggregation",
    "average",
    "bucketing",
    "bulyan",
    "centred_clipping",
    "clipping",
    "flag",
    "geometric_median",
    "krum",
    "meamed",
    "mean",
    "median",
    "mixed",
    "multi_krum",
    "nnm",
    "phocas",
    "robust",
    "series",
    "trimmed_mean",
    "variance_corrected",
]

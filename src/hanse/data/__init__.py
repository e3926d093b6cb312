"""Tasks, and partitions of their data over clients."""

from hanse.data import files, partition, tasks
from hanse.data.partition import Partition, dirichlet, feature_shift, iid, natural, neighbouring, quantity, shards
from hanse.data.task import Dataset, Split, Task

__all__ = [
    "Dataset",
    "Partition",
    "Split",
    "Task",
    "dirichlet",
    "feature_shift",
    "files",
    "iid",
    "natural",
    "neighbouring",
    "partition",
    "quantity",
    "shards",
    "tasks",
]

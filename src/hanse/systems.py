"""The published systems that hanse implements, and what of each was shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class System:
    """One published system: where it is, what works, what shows it."""

    slug: str
    name: str
    paper: str
    status: Literal["works", "partly"]
    implemented: str
    shown: str


SYSTEMS = (
    System(
        slug="momentum",
        name="FedAvg, FedProx, FedOpt, SCAFFOLD; FedAvg-M, SCAFFOLD-M and their variance-reduced forms",
        paper="Cheng, Huang, Wu, Yuan, ICLR 2024, arXiv 2306.16504; McMahan et al. 2017; Li et al. 2020; Reddi et al. 2021",
        status="partly",
        implemented="FedAvg, FedProx, FedAdam, FedYogi, FedAdagrad, FedAvgM, Scaffold; FedAvg_M, Scaffold_M, with _VR forms",
        shown="every exact check in tests/methods; on digits FedAvg-M trains below FedAvg, and SCAFFOLD-M below SCAFFOLD, "
        "each at its own rate, but not in half the rounds; not shown at CIFAR-10 size",
    ),
    System(
        slug="fedspeed",
        name="FedSpeed",
        paper="Sun, Shen, Huang, Ding, Tao, ICLR 2023, arXiv 2302.10429",
        status="partly",
        implemented="FedSpeed, both server modes",
        shown="every exact check in tests/methods; on digits more accurate than FedAvg and FedProx; that it loses less from "
        "longer local training was not seen, because FedAvg loses nothing there; not shown at CIFAR-10 size",
    ),
)

"""Learning rules, one file each."""

from hanse.methods.anarchic import AFA_CD, AFA_CS
from hanse.methods.base import Method
from hanse.methods.bristle import Bristle
from hanse.methods.fedamd import FedAMD
from hanse.methods.fedasync import FedAsync
from hanse.methods.fedau import AverageAll, FedAU, KnownParticipation
from hanse.methods.fedavg import FedAvg
from hanse.methods.fedavg_m import FedAvg_M, FedAvg_M_VR
from hanse.methods.fedkseed import FedKSeed
from hanse.methods.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from hanse.methods.fedprox import FedProx
from hanse.methods.fedsam import FedSAM
from hanse.methods.fedspeed import FedSpeed
from hanse.methods.frl import FRL
from hanse.methods.fwdllm import FwdLLM
from hanse.methods.memory import MIFA, FedVARP
from hanse.methods.one_by_one import OneByOne
from hanse.methods.opwa import OPWA
from hanse.methods.rffl import RFFL
from hanse.methods.scaffold import Scaffold
from hanse.methods.scaffold_m import Scaffold_M, Scaffold_M_VR
from hanse.methods.stale_inversion import FirstOrder, StaleInversion

__all__ = [
    "AFA_CD",
    "AFA_CS",
    "FRL",
    "MIFA",
    "OPWA",
    "RFFL",
    "AverageAll",
    "Bristle",
    "FedAMD",
    "FedAU",
    "FedAdagrad",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedAvgM",
    "FedAvg_M",
    "FedAvg_M_VR",
    "FedKSeed",
    "FedProx",
    "FedSAM",
    "FedSpeed",
    "FedVARP",
    "FedYogi",
    "FirstOrder",
    "FwdLLM",
    "KnownParticipation",
    "Method",
    "OneByOne",
    "Scaffold",
    "Scaffold_M",
    "Scaffold_M_VR",
    "StaleInversion",
]

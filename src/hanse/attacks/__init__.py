"""What adversaries send, and what they train on."""

from hanse.attacks.base import Attack, Cohort, Forging
from hanse.attacks.messages import damaged
from hanse.attacks.omniscient import alie, free_rider, ipm, mimic
from hanse.attacks.poisoning import backdoor, label_flip
from hanse.attacks.updates import drop, gaussian, inversion, random, rescale, scaled, sign_flip, sign_random

__all__ = [
    "Attack",
    "Cohort",
    "Forging",
    "alie",
    "backdoor",
    "damaged",
    "drop",
    "free_rider",
    "gaussian",
    "inversion",
    "ipm",
    "label_flip",
    "mimic",
    "random",
    "rescale",
    "scaled",
    "sign_flip",
    "sign_random",
]

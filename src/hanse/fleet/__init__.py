"""Devices and links in virtual time, and when clients are there."""

from hanse.fleet.distributions import (
    Amount,
    Distribution,
    by_class,
    by_labels,
    constant,
    evenly,
    exponential,
    listed,
    lognormal,
    mixture,
    uniform,
    zipf,
)
from hanse.fleet.participation import bernoulli, crashes, cyclic, diurnal, joins, leaves, markov, slowdowns
from hanse.fleet.population import Population
from hanse.fleet.presets import laptops, phones, silos
from hanse.fleet.profiles import Fleet, Profile, Work, devices, ideal
from hanse.fleet.recorded import recorded
from hanse.fleet.traces import Finish, Piecewise, Slotted, Trace, always

__all__ = [
    "Amount",
    "Distribution",
    "Finish",
    "Fleet",
    "Piecewise",
    "Population",
    "Profile",
    "Slotted",
    "Trace",
    "Work",
    "always",
    "bernoulli",
    "by_class",
    "by_labels",
    "constant",
    "crashes",
    "cyclic",
    "devices",
    "diurnal",
    "evenly",
    "exponential",
    "ideal",
    "joins",
    "laptops",
    "leaves",
    "listed",
    "lognormal",
    "markov",
    "mixture",
    "phones",
    "recorded",
    "silos",
    "slowdowns",
    "uniform",
    "zipf",
]

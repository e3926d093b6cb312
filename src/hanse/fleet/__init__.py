"""Devices and links in virtual time."""

from hanse.fleet.profiles import Fleet, Profile, ideal, phones

__all__ = ["Fleet", "Profile", "ideal", "phones"]

"""What the server does not get to know: sums without their terms, and sums from which no client can be told."""

from hanse.privacy.base import Privacy
from hanse.privacy.differential import differential
from hanse.privacy.secure import secure

__all__ = ["Privacy", "differential", "secure"]

"""Networks."""

from hanse.models.small import ByteWindow, Quadratic, cnn, mlp

__all__ = ["ByteWindow", "Quadratic", "cnn", "mlp"]

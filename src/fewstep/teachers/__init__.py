"""Teachers whose law is known exactly."""

from .laws import FiniteSet, Gaussian, Law, Mixture

__all__ = ["FiniteSet", "Gaussian", "Law", "Mixture"]

"""Generate shapes: unions of simple solids whose surfaces, parts and colors are known exactly."""

from data.procedural.compose import KINDS, LEVELS, GeneratedShape, SurfaceSamples, compose, sample_visible
from data.procedural.solids import Solid

__all__ = ["KINDS", "LEVELS", "GeneratedShape", "Solid", "SurfaceSamples", "compose", "sample_visible"]

"""Transforms: reparametrisations that leave the model's function as it is and make its weights easier to round."""

from fewbits.transform.base import Diagonal, Transform
from fewbits.transform.scale import Awq
from fewbits.transform.smooth import Smooth

__all__ = ["Awq", "Diagonal", "Smooth", "Transform"]

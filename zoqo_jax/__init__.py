"""zoqo_jax: train quantized models on their own integer grid, with forward passes only.

Two papers behind one optax interface, ZOQO (Bar & Giryes, arXiv:2501.06736) and CAQ-ZO (Shu & Zhu,
arXiv:2605.10673):

    import zoqo_jax as zq
"""

import warnings
from typing import Any

from zoqo_jax import directions as directions
from zoqo_jax.analysis import certificates as certificates
from zoqo_jax.analysis.diagnosis import Diagnosis as Diagnosis
from zoqo_jax.analysis.diagnosis import diagnose as diagnose
from zoqo_jax.analysis.explanation import Explanation as Explanation
from zoqo_jax.analysis.explanation import explain as explain
from zoqo_jax.analysis.health import Health as Health
from zoqo_jax.analysis.health import health as health
from zoqo_jax.analysis.observation import Observation as Observation
from zoqo_jax.analysis.observation import observe as observe
from zoqo_jax.grids import companders as companders
from zoqo_jax.grids import projection as projection
from zoqo_jax.grids.arrays import Grid as Grid
from zoqo_jax.grids.arrays import QuantizedArray as QuantizedArray
from zoqo_jax.grids.arrays import dequantize as dequantize
from zoqo_jax.grids.arrays import freeze as freeze
from zoqo_jax.grids.arrays import is_quantized as is_quantized
from zoqo_jax.grids.arrays import with_products as with_products
from zoqo_jax.grids.companders import Compander as Compander
from zoqo_jax.grids.quantization import Quantizer as Quantizer
from zoqo_jax.grids.quantization import is_matrix as is_matrix
from zoqo_jax.grids.quantization import nf4 as nf4
from zoqo_jax.grids.quantization import quantize as quantize
from zoqo_jax.implicit.arrays import PerturbedArray as PerturbedArray
from zoqo_jax.implicit.lora import LoraArray as LoraArray
from zoqo_jax.implicit.lora import lora as lora
from zoqo_jax.implicit.rules import quaxify as quaxify
from zoqo_jax.interop.models import Model as Model
from zoqo_jax.interop.models import load as load
from zoqo_jax.interop.models import save as save
from zoqo_jax.transforms import Info as Info
from zoqo_jax.transforms import State as State
from zoqo_jax.transforms import apply_updates as apply_updates
from zoqo_jax.transforms import caq_zo as caq_zo
from zoqo_jax.transforms import distributed as distributed
from zoqo_jax.transforms import on_floats as on_floats
from zoqo_jax.transforms import qes as qes
from zoqo_jax.transforms import queries as queries
from zoqo_jax.transforms import quzo as quzo
from zoqo_jax.transforms import qzo as qzo
from zoqo_jax.transforms import replay as replay
from zoqo_jax.transforms import spsa as spsa
from zoqo_jax.transforms import zoqo as zoqo

__version__ = "0.1.0"

__all__ = [
    "Compander",
    "Diagnosis",
    "Explanation",
    "Grid",
    "Health",
    "Info",
    "LoraArray",
    "Model",
    "Observation",
    "PerturbedArray",
    "QuantizedArray",
    "Quantizer",
    "State",
    "apply_updates",
    "caq_zo",
    "certificates",
    "companders",
    "dequantize",
    "diagnose",
    "directions",
    "distributed",
    "explain",
    "freeze",
    "health",
    "is_matrix",
    "is_quantized",
    "load",
    "lora",
    "nf4",
    "observe",
    "on_floats",
    "projection",
    "qes",
    "quantize",
    "quaxify",
    "queries",
    "quzo",
    "qzo",
    "replay",
    "save",
    "spsa",
    "with_products",
    "zoqo",
]


def __getattr__(name: str) -> Any:
    """The old name of a class, for one release."""
    if name != "StepState":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    message = "zoqo_jax.StepState is now zoqo_jax.State; the old name will go in the next release."
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return State

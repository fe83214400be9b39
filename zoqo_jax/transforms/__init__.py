"""Optimizers as optax transformations, one a file; `stepping` is what the quantized ones share."""

from zoqo_jax.transforms.applying import apply_updates as apply_updates
from zoqo_jax.transforms.caq_zo import caq_zo as caq_zo
from zoqo_jax.transforms.on_floats import on_floats as on_floats
from zoqo_jax.transforms.qes import qes as qes
from zoqo_jax.transforms.quzo import quzo as quzo
from zoqo_jax.transforms.qzo import qzo as qzo
from zoqo_jax.transforms.replaying import replay as replay
from zoqo_jax.transforms.spsa import spsa as spsa
from zoqo_jax.transforms.state import Info as Info
from zoqo_jax.transforms.state import State as State
from zoqo_jax.transforms.zoqo import zoqo as zoqo

__all__ = ["StepState", "caq_zo", "on_floats", "qes", "quzo", "qzo", "replay", "spsa", "zoqo"]

"""What the tests share: the backend under test, its tensors, the paths beside their oracles."""

import os

import hypothesis.strategies as st
import numpy as np
import oracle
from hypothesis.extra import numpy as hnp

from selfalign import paths

BACKEND = os.environ.get("KERAS_BACKEND", "")
MODULES = {
    "numpy": ("numpy", "ml_dtypes"),
    "torch": ("torch",),
    "jax": ("jax", "jaxlib"),
}
FLOATS = ["float16", "bfloat16", "float32"]
if BACKEND != "jax":  # JAX's default has no 64 bits
    FLOATS.append("float64")
INTEGERS = {
    "numpy": ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"],
    "torch": ["int8", "uint8", "int16", "int32", "int64"],
    "jax": ["int8", "uint8", "int16", "uint16", "int32", "uint32"],
}.get(BACKEND, [])

PATHS = {
    "linear": (paths.Linear(), oracle.linear(1)),
    "linear-reversed": (paths.Linear(noise_at=0), oracle.linear(0)),
    "cosine": (paths.Cosine(), oracle.cosine_path(1)),
    "cosine-reversed": (paths.Cosine(noise_at=0), oracle.cosine_path(0)),
    "discrete": (paths.Discrete(), oracle.ddpm()),
    "edm": (paths.EDM(), oracle.edm()),
}
CONTINUOUS = [name for name in PATHS if name != "discrete"]
UNIT_TIME = [name for name in CONTINUOUS if name != "edm"]

# Tensors


def tensor(value, dtype=None):
    """A tensor of the backend; float32, int32 or bool unless told."""
    value = np.asarray(value)
    dtype = dtype or {"f": "float32", "i": "int32", "u": "int32", "b": "bool"}[value.dtype.kind]
    if BACKEND == "torch":
        import torch

        return torch.tensor(value).to(getattr(torch, dtype))
    if BACKEND == "jax":
        import jax.numpy as jnp

        return jnp.asarray(value, dtype)
    if dtype == "bfloat16":
        import ml_dtypes

        return value.astype(ml_dtypes.bfloat16)
    return value.astype(dtype)


def array(value):
    """The numbers of a tensor in NumPy: floating point in float64, everything else as it is."""
    if BACKEND == "torch" and hasattr(value, "detach"):
        value = value.detach()
        value = (value.double() if value.is_floating_point() else value).cpu().numpy()
    value = np.asarray(value)
    return value if value.dtype.kind in "biu" else value.astype("float64")


def tree(values, dtype=None):
    """A dict of arrays as a dict of tensors."""
    return {name: tensor(value, dtype) for name, value in values.items()}


def dtype_of(value):
    return str(value.dtype).removeprefix("torch.")


def framework(value):
    """The package that the type of `value` comes from."""
    return type(value).__module__.partition(".")[0]


def is_tensor(value):
    """Whether `value` is a tensor of the backend under test; NumPy's scalars count as arrays."""
    return framework(value) in MODULES[BACKEND]


def gradients(function, *inputs):
    """d function / d input for each NumPy input; None where the framework sees no dependence."""
    if BACKEND == "torch":
        import torch

        leaves = [tensor(x).requires_grad_() for x in inputs]
        found = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
        return [None if g is None else array(g) for g in found]
    import jax

    places = tuple(range(len(inputs)))
    return [array(g) for g in jax.grad(function, argnums=places)(*map(tensor, inputs))]


# What hypothesis draws


def floats(low, high):
    low = float(np.float32(low))
    high = float(np.float32(high))
    return st.floats(low, high, width=32, allow_subnormal=False)


def vectors(low, high, size=8):
    return hnp.arrays("float32", (size,), elements=floats(low, high))


def token_arrays(shape, low=-100, high=100):
    return hnp.arrays("float32", shape, elements=floats(low, high))


draws = vectors(0, 0.9999999403953552)  # the largest float32 below 1
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)
# few shapes, because JAX compiles each anew; values as awkward as hypothesis likes
shapes = st.sampled_from([(1, 1, 1), (2, 3, 4)])
tokens = shapes.flatmap(token_arrays)
token_pairs = shapes.flatmap(lambda s: st.tuples(token_arrays(s), token_arrays(s)))


def times(name):
    """Times [8] of the path called `name`, as NumPy."""
    if name == "discrete":
        return hnp.arrays("int32", (8,), elements=st.integers(0, 999))
    return vectors(0.0, 1.0) if name != "edm" else vectors(1e-4, 100.0)

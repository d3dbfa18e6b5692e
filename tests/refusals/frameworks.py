"""Tensors of another framework, or of two."""

from .common import Foreign, Other, ema, sra

TWO = "All tensors of one call must belong to one framework"

CASES = {
    "foreign tensor": (
        lambda: sra()(Foreign(), Foreign()),
        TypeError,
        "Tensors must belong to the framework of Keras's backend",
        "a cupy tensor, with the Keras backend",
        "Convert it to a framework that Keras runs on.",
    ),
    "two frameworks": (
        lambda: sra()(Foreign(), Other()),
        TypeError,
        "All tensors of one call must belong to one framework",
        "tensors of cupy and paddle",
        "Convert them to one framework yourself: selfalign never converts silently.",
    ),
    "foreign leaf": (
        lambda: ema({"a": [1.0, Foreign()]}, {"a": [1.0, Other()]}),
        TypeError,
        "All tensors of one call must belong to one framework",
        "tensors of cupy and paddle",
        "Convert them to one framework",
    ),
}

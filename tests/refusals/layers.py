"""Layers and named models."""

from selfalign import LayerSyncLoss, Objective, REPALoss, SRALoss, layers, presets, sources

from .common import SPELLING, layersync, repa, sra

PRESET = 'A preset is named like "SiT-XL/2": SiT or DiT, then S, B, L or XL, then the patch size'
OTHER_MODEL = "For another model pass student_layer and teacher_layer, for instance 0.25 and 0.7."
LAYER = "student_layer must be an int (a layer counted from 1) or a float (a fraction of the depth)"
FRACTION = "student_layer as a fraction of the depth must lie inside (0, 1)"
ORDER = "student_layer must come before teacher_layer"
SWAP = "Swap them."
LATER = (
    "Choose a later layer for the teacher. For the paper's same-layer ablation pass "
    "SRALoss(allow_same_layer=True)."
)


class Own(Objective):
    """A third party's kind of objective."""

    kind = "own"


CASES = {
    "unknown model": (
        lambda: SRALoss.preset("SiT-H/2"),
        ValueError,
        PRESET,
        "'SiT-H/2'",
        OTHER_MODEL,
    ),
    "model without a patch": (
        lambda: presets.preset_layers("SiT-XL"),
        ValueError,
        PRESET,
        "'SiT-XL'",
        OTHER_MODEL,
    ),
    "model that is not a name": (
        lambda: presets.preset_layers(8),
        ValueError,
        PRESET,
        "8",
        OTHER_MODEL,
    ),
    "layer 0": (
        lambda: sra(student_layer=0),
        ValueError,
        "student_layer must be finite and at least 1",
        "0",
        "Layers are counted from 1: layer n is after block n.",
    ),
    "layer by name": (
        lambda: sra(student_layer="blocks.7"),
        TypeError,
        LAYER,
        "'blocks.7'",
        "Pass for instance 8, or 0.25.",
    ),
    "layer True": (
        lambda: sra(student_layer=True),
        TypeError,
        LAYER,
        "True",
        "Pass for instance 8, or 0.25.",
    ),
    "fraction above 1": (
        lambda: sra(student_layer=8.0),
        ValueError,
        FRACTION,
        "8.0",
        "Pass an int for a layer's number, counted from 1.",
    ),
    "fraction NaN": (
        lambda: sra(student_layer=float("nan")),
        ValueError,
        FRACTION,
        "nan",
        "Pass an int for a layer's number, counted from 1.",
    ),
    "layers swapped": (
        lambda: sra(student_layer=20, teacher_layer=8),
        ValueError,
        ORDER,
        "student 20, teacher 8",
        SWAP,
    ),
    "fractions swapped": (
        lambda: sra(student_layer=0.7, teacher_layer=0.25),
        ValueError,
        ORDER,
        "student 0.7, teacher 0.25",
        SWAP,
    ),
    "same layer": (
        lambda: sra(student_layer=3, teacher_layer=3),
        ValueError,
        ORDER,
        "student 3, teacher 3",
        LATER,
    ),
    "same layer once the depth is known": (
        lambda: sra(student_layer=3, teacher_layer=0.25).layers(12),
        ValueError,
        ORDER,
        "student 3, teacher 3",
        LATER,
    ),
    "layer beyond the depth": (
        lambda: sra(student_layer=8, teacher_layer=20).layers(12),
        ValueError,
        "teacher_layer must be at most the model's depth",
        "layer 20 of 12 blocks",
        "Choose a layer from 1 to the depth, or a fraction such as 0.25.",
    ),
    "depth 0": (
        lambda: layers.resolve_layers(0.25, 0.7, depth=0),
        ValueError,
        "depth must be finite and at least 1",
        "0",
        "It is the number of blocks.",
    ),
    "fractional depth": (
        lambda: sra().layers(12.0),
        TypeError,
        "depth must be an integer",
        "12.0",
        "It is the number of blocks.",
    ),
    "layers of LayerSync swapped": (
        lambda: layersync(student_layer=16, teacher_layer=8),
        ValueError,
        ORDER,
        "student 16, teacher 8",
        "Swap them",
    ),
    "one layer of LayerSync": (
        lambda: layersync(student_layer=8, teacher_layer=8),
        ValueError,
        ORDER,
        "student 8, teacher 8",
        LATER,
    ),
    "one layer of LayerSync once the depth is known": (
        lambda: layersync(student_layer=3, teacher_layer=0.25).layers(12),
        ValueError,
        ORDER,
        "student 3, teacher 3",
        LATER,
    ),
    "REPA's layer beyond the depth": (
        lambda: repa(student_layer=20).layers(12),
        ValueError,
        "student_layer must be at most the model's depth",
        "layer 20 of 12 blocks",
        "Choose a layer from 1 to the depth, or a fraction such as 0.25.",
    ),
    "layer 0 of a source": (
        lambda: sources.LaterLayer(layer=0),
        ValueError,
        "teacher_layer must be finite and at least 1",
        "0",
        "Layers are counted from 1: layer n is after block n.",
    ),
    "no width of an encoder": (
        lambda: repa(width=0),
        ValueError,
        "width must be finite and at least 1",
        "0",
        "It is the width of the tokens that the target consists of, 768 for DINOv2-B.",
    ),
    "an encoder's width in words": (
        lambda: repa(width="768"),
        TypeError,
        "width must be an integer",
        "'768'",
        "It is the width of the tokens that the target consists of, 768 for DINOv2-B.",
    ),
    "unknown model for LayerSync": (
        lambda: LayerSyncLoss.preset("UViT-B/2"),
        ValueError,
        PRESET,
        "'UViT-B/2'",
        OTHER_MODEL,
    ),
    "a recipe of another objective": (
        lambda: LayerSyncLoss.preset("SiT-B/2", recipe="paper"),
        ValueError,
        "recipe must be one of 'default'",
        "'paper'",
        SPELLING,
    ),
    "unknown resolution for REPA": (
        lambda: REPALoss.preset("SiT-B/2", resolution=1024),
        ValueError,
        "resolution must be one of 256, 512",
        "1024",
        SPELLING,
    ),
    "a kind without presets": (
        lambda: Own.preset("SiT-B/2"),
        ValueError,
        "the kind of objective must be one of 'sra', 'layersync', 'repa'",
        "'own'",
        SPELLING,
    ),
}

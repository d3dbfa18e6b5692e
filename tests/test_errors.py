"""Every error of the core: a ValueError or TypeError that says the rule, what was received, and what to do."""

import ast
import pathlib
import re
import sys
import types

import numpy as np
import pytest
from support import array, tensor

import selfalign
from selfalign import SRALoss, distances, paths, plateau, projector, schedules, targets, time_gap


def loss(**settings):
    return SRALoss(**({"student_layer": 1, "teacher_layer": 2} | settings))


def tokens(*shape, dtype="float32"):
    return tensor(np.ones(shape), dtype)


def ones(*shape):
    return tensor(np.ones(shape))


def move(t, u=(0.5, 0.5), path=None, t_dtype=None, u_dtype=None, **options):
    """The teacher's time of `t`."""
    t, u = tensor(np.array(t), t_dtype), tensor(np.array(u), u_dtype)
    return time_gap.teacher_time(path or paths.Linear(), t, u, **options)


def mix(x0=(2, 3), noise=(2, 3), t=(0.5, 0.5), t_dtype=None, path=None):
    return (path or paths.Linear()).add_noise(ones(*x0), ones(*noise), tensor(np.array(t), t_dtype))


def ema(teacher, student, decay=0.5):
    return selfalign.ema_update(teacher, student, decay)


def draws(first, second):
    return selfalign.init_projector(ones(*first), ones(*second))


def project(width, tokens_width):
    params = selfalign.init_projector(*(ones(*shape) for shape in projector.draw_shapes(width)))
    return selfalign.project(params, ones(2, 3, tokens_width))


class Foreign:
    """An array of a framework that Keras does not run on."""


class Other:
    """An array of one more."""


@pytest.fixture(autouse=True)
def frameworks(monkeypatch):
    """Two foreign frameworks, as far as selfalign looks at them."""
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=Foreign))
    monkeypatch.setitem(sys.modules, "paddle", types.SimpleNamespace(Tensor=Other))


SAME_SHAPE = "Student and teacher tokens must have the same shape [B, N, D]"
FALLING = "alphas_cumprod must be at least two numbers that fall strictly inside [0, 1]"
STRUCTURE = "Teacher and student must have the same structure and shapes"
PAPER_BETA = "The paper takes 0.05."
COPY = "Build the teacher as a copy of the student's parameters."
FLATTEN = "Flatten the token grid, or select the features in the adapter."
SKIP = "Skip empty batches in the training loop."
OLD_VALUE = "It is the weight of the old value, 0.9999 in the paper."
SHARE = "It is a share of the path's time axis, 0.2 in the paper."
NUMBER = "Pass a Python int or float."
BOUNDS = "Pass a value inside these bounds."
SETTINGS = "Take them from settings()."
SPELLING = "Check the spelling."
PRESET = 'A preset is named like "SiT-XL/2": SiT or DiT, then S, B, L or XL, then the patch size'
OTHER_MODEL = "For another model pass student_layer and teacher_layer, for instance 0.25 and 0.7."
LAYER = "student_layer must be an int (a layer counted from 1) or a float (a fraction of the depth)"
FRACTION = "student_layer as a fraction of the depth must lie inside (0, 1)"
ORDER = "student_layer must come before teacher_layer"
SWAP = "Swap them; for the paper's same-layer ablation pass allow_same_layer=True."
MASK = "mask must have the shape [B] (samples) or [B, N] (tokens)"
ONLY_SAMPLES = "With the token-axis cosine only a mask over samples has a meaning."
TIME_SCALE = "Check which path the model is trained with, and the scale of its time."
LINEAR_TIME = "The linear path counts time in [0, 1]: check the model's time scale."
STEPS = "The discrete path counts time in [0, 999]: check the model's time scale."
DRAW = "Draw u uniform in [0, 1)"
MATRICES = "The projector's draws must be matrices [D, H] and [H, D]"
DRAW_SHAPES = "Draw them with the shapes of selfalign.projector.draw_shapes(width)."
PARAMETERS = "The projector's parameters must be hidden_kernel, hidden_bias, output_kernel, output_bias"
SCHEDULE = "A schedule must be a number or a function of the step"
ANY_SCHEDULE = "Pass a number, an object of selfalign.schedules, or a callable."

# what is done: (the call, the exception, the rule, what was received, what to do)
ERRORS = {
    # frameworks
    "foreign tensor": (lambda: loss()(Foreign(), Foreign()), TypeError,
        "Tensors must belong to the framework of Keras's backend", "a cupy tensor, with the Keras backend",
        "Convert it to a framework that Keras runs on."),
    "two frameworks": (lambda: loss()(Foreign(), Other()), TypeError,
        "All tensors of one call must belong to one framework", "tensors of cupy and paddle",
        "Convert them to one framework yourself: selfalign never converts silently."),
    "foreign leaf": (lambda: ema({"a": [1.0, Foreign()]}, {"a": [1.0, Other()]}), TypeError,
        "All tensors of one call must belong to one framework", "tensors of cupy and paddle", "Convert them to one framework"),
    # tokens
    "tokens as lists": (lambda: loss()([[[1.0]]], [[[1.0]]]), TypeError,
        "The student's tokens must be a tensor", "list [[[1.0]]]", "Convert it first."),
    "no teacher": (lambda: loss().metrics(tokens(2, 3, 4), None), TypeError,
        "The teacher's tokens must be a tensor", "NoneType None", "Convert it first."),
    "student [N, D]": (lambda: loss()(tokens(3, 4), tokens(2, 3, 4)), ValueError,
        "Tokens must have the shape [B, N, D]", "student tokens of shape (3, 4)", FLATTEN),
    "teacher [B, H, W, D]": (lambda: loss()(tokens(2, 3, 4), tokens(2, 3, 3, 4)), ValueError,
        "Tokens must have the shape [B, N, D]", "teacher tokens of shape (2, 3, 3, 4)", FLATTEN),
    "no samples": (lambda: loss()(tokens(0, 3, 4), tokens(0, 3, 4)), ValueError,
        "Tokens must not be empty", "student tokens of shape (0, 3, 4)", SKIP),
    "no tokens on the teacher's side": (lambda: distances.l2(tokens(2, 3, 4), tokens(2, 0, 4)), ValueError,
        "Tokens must not be empty", "teacher tokens of shape (2, 0, 4)", SKIP),
    "integer student": (lambda: loss()(tokens(2, 3, 4, dtype="int32"), tokens(2, 3, 4)), TypeError,
        "Tokens must be floating point", "student tokens of dtype int32", "Pass a block's features, not indices."),
    "boolean teacher": (lambda: loss()(tokens(2, 3, 4), tokens(2, 3, 4, dtype="bool")), TypeError,
        "Tokens must be floating point", "teacher tokens of dtype bool", "Pass a block's features, not indices."),
    "two widths": (lambda: loss()(tokens(2, 3, 4), tokens(2, 3, 5)), ValueError,
        SAME_SHAPE, "student (2, 3, 4), teacher (2, 3, 5)",
        "Tap both sides of one model on the same batch, and give the projector the teacher's width."),
    "two batches, in metrics": (lambda: loss().metrics(tokens(1, 3, 4), tokens(2, 3, 4)), ValueError,
        SAME_SHAPE, "student (1, 3, 4), teacher (2, 3, 4)", "Tap both sides of one model on the same batch"),
    # time
    "one time for all": (lambda: move(0.5), ValueError,
        "t must hold one time per sample, shape [B]", "shape ()", "Pass a vector of times."),
    "time as a column": (lambda: move([[0.5], [0.5]]), ValueError,
        "t must hold one time per sample, shape [B]", "shape (2, 1)", "Pass a vector of times."),
    "another number of times": (lambda: mix(t=[0.5, 0.5, 0.5]), ValueError,
        "t must hold one time per sample, shape [B] = (2,)", "shape (3,)", "Pass a vector of times."),
    "no times": (lambda: move(np.zeros(0), np.zeros(0)), ValueError, "t must not be empty", "shape (0,)", SKIP),
    "steps on a continuous path": (lambda: move([1, 2]), TypeError,
        "The linear path takes floating-point times", "t of dtype int32", TIME_SCALE),
    "boolean steps": (lambda: move([True, False], path=paths.Discrete()), TypeError,
        "The discrete path takes integer steps", "t of dtype bool", TIME_SCALE),
    "continuous time on a discrete path": (lambda: mix(t=[0.5, 1.0], path=paths.Discrete()), TypeError,
        "The discrete path takes integer steps", "t of dtype float32", TIME_SCALE),
    "time of another scale": (lambda: move([0.5, 999.0]), ValueError,
        "t must lie in [0, 1]", "values from 0.5 to 999", LINEAR_TIME),
    "time that is not a number": (lambda: mix(t=[0.5, np.nan]), ValueError,
        "t must lie in [0, 1]", "values from nan to nan", "check the model's time scale."),
    "a step too many": (lambda: move([0, 1000], path=paths.Discrete()), ValueError,
        "t must lie in [0, 999]", "values from 0 to 1000", STEPS),
    "sigma below 0": (lambda: paths.EDM().snr(tensor([-1.0])), ValueError,
        "t must lie in [0, 3e+38]", "values from -1 to -1", "check the model's time scale."),
    "another number of draws": (lambda: move([0.5, 0.5], [0.5]), ValueError,
        "u must hold one draw per sample, of t's shape", "u (1,), t (2,)", "Draw u like t: uniform in [0, 1)."),
    "no draws": (lambda: loss().teacher_time(ones(2), None), ValueError,
        "u must hold one draw per sample, of t's shape", "u None, t (2,)", "Draw u like t: uniform in [0, 1)."),
    "integer draws": (lambda: move([0.5, 0.5], [1, 0]), TypeError, "u must be floating point", "dtype int32", DRAW),
    "normal draws": (lambda: move([0.5, 0.5], [-1.5, 2.5]), ValueError,
        "u must lie in [0, 1", "values from -1.5 to 2.5", DRAW + ": the loss scales it to the gap."),
    "gap above 1": (lambda: move([0.5, 0.5], max_gap=200), ValueError, "max_gap must be in [0, 1]", "200", SHARE),
    "negative gap": (lambda: loss(max_gap=-0.1), ValueError, "max_gap must be in [0, 1]", "-0.1", SHARE),
    "gap that is not a number": (lambda: loss(max_gap="0.2"), TypeError, "max_gap must be a number", "'0.2'", SHARE),
    "gap below one step": (lambda: loss(path="discrete", max_gap=0.0004), ValueError,
        "max_gap must cover at least one step of a discrete path", "0.0004 of 1000 steps", "Enlarge it, or pass 0 for no gap."),
    # paths
    "noise of another shape": (lambda: mix(noise=(2, 4)), ValueError,
        "x0 and noise must have the same shape [B, ...]", "x0 (2, 3), noise (2, 4)", "Draw the noise like x0."),
    "a scalar sample": (lambda: mix(x0=(), noise=()), ValueError,
        "x0 and noise must have the same shape [B, ...]", "x0 (), noise ()", "Draw the noise like x0."),
    "velocity of another shape": (lambda: paths.Linear().velocity(ones(2), ones(3), ones(2)), ValueError,
        "x0 and noise must have the same shape [B, ...]", "x0 (2,), noise (3,)", "Draw the noise like x0."),
    "integer images": (lambda: paths.Linear().add_noise(tokens(2, 3, dtype="uint8"), ones(2, 3), ones(2)), TypeError,
        "x0 must be floating point", "dtype uint8", "Scale images to floats first."),
    "unknown prediction": (lambda: paths.Linear().target(ones(2), ones(2), ones(2), "score"), ValueError,
        "prediction must be one of 'velocity', 'noise', 'data'", "'score'", SPELLING),
    "no inverse": (lambda: paths.Discrete((0.9, 0.1)).time_at_snr(1.0), ValueError,
        "time_at_snr needs a path with an inverse", "Discrete(alphas_cumprod=(0.9, 0.1))",
        "Use a continuous path, or search in snr(t)."),
    "noise in the middle": (lambda: paths.Linear(noise_at=0.5), ValueError,
        "noise_at must be one of 0.0, 1.0", "0.5", SPELLING),
    "noise nowhere": (lambda: paths.Cosine(noise_at="end"), ValueError, "noise_at must be one of 0.0, 1.0", "'end'", SPELLING),
    "one step": (lambda: paths.Discrete((0.5,)), ValueError,
        FALLING, "1 numbers, (0.5,)", "Pass the cumulative product of 1 - beta, step 0 first."),
    "rising schedule": (lambda: paths.Discrete((0.1, 0.9)), ValueError, FALLING, "2 numbers, (0.1, 0.9)", "step 0 first."),
    "schedule above 1": (lambda: paths.Discrete((1.5, 0.9)), ValueError, FALLING, "2 numbers, (1.5, 0.9)", "step 0 first."),
    "schedule with NaN": (lambda: paths.Discrete((0.9, float("nan"))), ValueError,
        FALLING, "2 numbers, (0.9, nan)", "step 0 first."),
    "no sigma": (lambda: paths.EDM(sigma_min=0.0), ValueError, "sigma_min must be finite and at least 1e-30", "0.0", BOUNDS),
    "sigmas swapped": (lambda: paths.EDM(80.0, 0.002), ValueError,
        "sigma_max must be finite and at least 80.08", "0.002", "sigma_max must exceed sigma_min."),
    "unknown path": (lambda: loss(path="vp"), ValueError,
        "path must be one of 'linear', 'cosine', 'discrete', 'edm'", "'vp'", SPELLING),
    "path settings without a name": (lambda: paths.resolve({"noise_at": 1}), ValueError,
        "path must be one of 'linear', 'cosine', 'discrete', 'edm'", "None", SPELLING),
    "a path's class": (lambda: loss(path=paths.Linear), ValueError,
        "path must be one of 'linear'", "<class 'selfalign.paths.Linear'>", SPELLING),
    "unknown setting of a path": (lambda: paths.resolve({"name": "linear", "clean_at": 0}), ValueError,
        "The settings of the path 'linear' must be noise_at", "clean_at", SETTINGS),
    "no path": (lambda: loss(path=None), ValueError, "path must be one of 'linear'", "None", SPELLING),
    # targets
    "unknown model": (lambda: SRALoss.preset("SiT-H/2"), ValueError, PRESET, "'SiT-H/2'", OTHER_MODEL),
    "model without a patch": (lambda: targets.preset_layers("SiT-XL"), ValueError, PRESET, "'SiT-XL'", OTHER_MODEL),
    "model that is not a name": (lambda: targets.preset_layers(8), ValueError, PRESET, "8", OTHER_MODEL),
    "layer 0": (lambda: loss(student_layer=0), ValueError,
        "student_layer must be finite and at least 1", "0", "Layers are counted from 1: layer n is after block n."),
    "layer by name": (lambda: loss(student_layer="blocks.7"), TypeError, LAYER, "'blocks.7'", "Pass for instance 8, or 0.25."),
    "layer True": (lambda: loss(student_layer=True), TypeError, LAYER, "True", "Pass for instance 8, or 0.25."),
    "fraction above 1": (lambda: loss(student_layer=8.0), ValueError,
        FRACTION, "8.0", "Pass an int for a layer's number, counted from 1."),
    "fraction NaN": (lambda: loss(student_layer=float("nan")), ValueError,
        FRACTION, "nan", "Pass an int for a layer's number, counted from 1."),
    "layers swapped": (lambda: loss(student_layer=20, teacher_layer=8), ValueError, ORDER, "student 20, teacher 8", SWAP),
    "fractions swapped": (lambda: loss(student_layer=0.7, teacher_layer=0.25), ValueError,
        ORDER, "student 0.7, teacher 0.25", SWAP),
    "same layer": (lambda: loss(student_layer=3, teacher_layer=3), ValueError, ORDER, "student 3, teacher 3", SWAP),
    "same layer once the depth is known": (lambda: loss(student_layer=3, teacher_layer=0.25).layers(12), ValueError,
        ORDER, "student 3, teacher 3", SWAP),
    "layer beyond the depth": (lambda: loss(student_layer=8, teacher_layer=20).layers(12), ValueError,
        "teacher_layer must be at most the model's depth", "layer 20 of 12 blocks",
        "Choose a layer from 1 to the depth, or a fraction such as 0.25."),
    "depth 0": (lambda: targets.resolve_layers(0.25, 0.7, depth=0), ValueError,
        "depth must be finite and at least 1", "0", "It is the number of blocks."),
    "fractional depth": (lambda: loss().layers(12.0), TypeError,
        "depth must be an integer", "12.0", "It is the number of blocks."),
    # distances
    "beta 0": (lambda: distances.smooth_l1(tokens(1, 1, 1), tokens(1, 1, 1), 0), ValueError,
        "beta must be finite and at least 1e-12", "0", PAPER_BETA),
    "beta in the loss": (lambda: loss(beta=-1), ValueError, "beta must be finite and at least 1e-12", "-1", PAPER_BETA),
    "beta NaN": (lambda: loss(beta=float("nan")), ValueError, "beta must be finite and at least 1e-12", "nan", PAPER_BETA),
    "mask as a list": (lambda: loss()(tokens(2, 3, 4), tokens(2, 3, 4), mask=[True, False]), TypeError,
        "mask must be a tensor", "list [True, False]", "Convert it first."),
    "mask as a list, with the token-axis cosine": (
        lambda: loss(distance="official-2026-07")(tokens(2, 3, 4), tokens(2, 3, 4), mask=[True, False]), TypeError,
        "mask must be a tensor", "list [True, False]", "Convert it first."),
    "mask over another batch": (lambda: loss()(tokens(2, 3, 4), tokens(2, 3, 4), mask=ones(3)), ValueError,
        MASK, "(3,), for distances of shape (2, 3)", ONLY_SAMPLES),
    "mask over features": (lambda: loss()(tokens(2, 3, 4), tokens(2, 3, 4), mask=ones(2, 3, 4)), ValueError,
        MASK, "(2, 3, 4), for distances of shape (2, 3)", ONLY_SAMPLES),
    "token mask with the token-axis cosine": (
        lambda: loss(distance="official-2026-07")(tokens(2, 3, 4), tokens(2, 3, 4), mask=ones(2, 3)), ValueError,
        "mask must have the shape [B] (samples)", "(2, 3)", ONLY_SAMPLES),
    "token mask with the token-axis cosine, as many tokens as features": (
        lambda: loss(distance="official-2026-07")(tokens(2, 3, 3), tokens(2, 3, 3), mask=ones(2, 3)), ValueError,
        "mask must have the shape [B] (samples)", "(2, 3)", ONLY_SAMPLES),
    "unknown distance": (lambda: loss(distance="huber"), ValueError,
        "distance must be one of 'cosine', 'smooth_l1', 'l1', 'l2'", "'huber'", SPELLING),
    "distance that is reduced already": (
        lambda: loss(distance=lambda s, t: ((s - t) ** 2).mean())(tokens(2, 3, 4), tokens(2, 3, 4)), ValueError,
        "A distance must return one value per token, [B, N]", "shape ()",
        "Reduce over the last axis only: (2, 3) is expected."),
    # projector
    "tokens of another width": (lambda: project(4, 5), ValueError,
        "Tokens must have the projector's width", "width 5, projector of width 4",
        "Build the projector with width= the student block's output width."),
    "draws that are vectors": (lambda: draws((4,), (8, 4)), ValueError, MATRICES, "shapes (4,) and (8, 4)", DRAW_SHAPES),
    "draws that do not fit": (lambda: draws((4, 8), (4, 8)), ValueError, MATRICES, "shapes (4, 8) and (4, 8)", DRAW_SHAPES),
    "width 0": (lambda: projector.draw_shapes(0), ValueError,
        "width must be finite and at least 1", "0", "It is the feature width D of the student's block."),
    "width that is not a number": (lambda: projector.draw_shapes("768"), TypeError,
        "width must be an integer", "'768'", "It is the feature width D of the student's block."),
    "fractional width": (lambda: projector.draw_shapes(4.5), TypeError,
        "width must be an integer", "4.5", "It is the feature width D of the student's block."),
    "no hidden units": (lambda: projector.draw_shapes(4, 0), ValueError, "hidden must be finite and at least 1", "0", BOUNDS),
    "projector without parameters": (lambda: selfalign.project({}, ones(1, 2, 3)), ValueError,
        PARAMETERS, "none", "Take them from selfalign.init_projector."),
    "projector of another library": (lambda: selfalign.project({"weight": ones(3, 3)}, ones(1, 2, 3)), ValueError,
        PARAMETERS, "weight", "Take them from selfalign.init_projector."),
    # teacher
    "decay above 1": (lambda: ema([ones(2)], [ones(2)], 1.5), ValueError, "decay must be in [0, 1]", "1.5", OLD_VALUE),
    "decay NaN": (lambda: ema([ones(2)], [ones(2)], float("nan")), ValueError, "decay must be in [0, 1]", "nan", OLD_VALUE),
    "no decay": (lambda: ema([ones(2)], [ones(2)], None), TypeError, "decay must be a number", "None", OLD_VALUE),
    "decay in words": (lambda: ema([ones(2)], [ones(2)], "0.9"), TypeError, "decay must be a number", "'0.9'", OLD_VALUE),
    "decay as a vector": (lambda: ema([ones(2)], [ones(2)], ones(2)), TypeError, "decay must be a number", "1.", OLD_VALUE),
    "a leaf that is no array": (lambda: ema({"a": ["weights"]}, {"a": ["weights"]}), TypeError,
        "The leaf at 'a/0' must be a tensor", "str 'weights'", "Convert it first."),
    "decay True": (lambda: ema([ones(2)], [ones(2)], True), TypeError, "decay must be a number", "True", OLD_VALUE),
    "decay tensor below 0": (lambda: ema([ones(2)], [ones(2)], tensor(np.float32(-0.5))), ValueError,
        "decay must lie in [0, 1]", "values from -0.5 to -0.5", OLD_VALUE),
    "parameter missing": (lambda: ema({"a": {"w": ones(2)}}, {"a": {"v": ones(2)}}), ValueError,
        STRUCTURE, "at 'a/w': teacher (2,), student missing", COPY),
    "parameter too many": (lambda: ema({"a": ones(2)}, {"a": ones(2), "b": ones(3)}), ValueError,
        STRUCTURE, "at 'b': teacher missing, student (3,)", COPY),
    "parameter of another shape": (lambda: ema({"a": [ones(2), ones(2, 3)]}, {"a": [ones(2), ones(3, 2)]}), ValueError,
        STRUCTURE, "at 'a/1': teacher (2, 3), student (3, 2)", COPY),
    # schedules
    "negative weight": (lambda: loss(weight=-0.5), ValueError,
        "weight must be finite and at least 0", "-0.5", "Weights and decays are never negative."),
    "infinite weight": (lambda: schedules.Constant(float("inf")), ValueError,
        "weight must be finite and at least 0", "inf", "Weights and decays are never negative."),
    "weight in words": (lambda: loss(weight="0.5"), ValueError, SCHEDULE, "'0.5'", ANY_SCHEDULE),
    "weight True": (lambda: loss(weight=True), ValueError, SCHEDULE, "True", ANY_SCHEDULE),
    "no weight": (lambda: loss(weight=None), ValueError, SCHEDULE, "None", ANY_SCHEDULE),
    "product with a word": (lambda: schedules.Warmup(10) * "2", ValueError, SCHEDULE, "'2'", ANY_SCHEDULE),
    "warm-up of no steps": (lambda: schedules.Warmup(0), ValueError, "steps must be finite and at least 1", "0", BOUNDS),
    "every half step": (lambda: schedules.Every(0.5), TypeError, "steps must be an integer", "0.5", NUMBER),
    "every no step": (lambda: schedules.Every(0), ValueError, "steps must be finite and at least 1", "0", BOUNDS),
    "every with a decay above 1": (lambda: schedules.Every(2, 1.5), ValueError, "decay must be in [0, 1]", "1.5", BOUNDS),
    "every with a function": (lambda: schedules.Every(2, len), ValueError,
        "decay must be a number or an object of selfalign.schedules", repr(len), "power of steps inside a function"),
    "warm-up of words": (lambda: schedules.Warmup("10"), TypeError, "steps must be a number", "'10'", NUMBER),
    "stop before the start": (lambda: schedules.Stop(-1), ValueError, "step must be finite and at least 0", "-1", BOUNDS),
    "no steps per epoch": (lambda: schedules.PaperDecay(0), ValueError,
        "steps_per_epoch must be finite and at least 1", "0", BOUNDS),
    "negative epoch": (lambda: schedules.PaperDecay(1, -1), ValueError,
        "last_flat_epoch must be finite and at least 0", "-1", BOUNDS),
    "no epochs per decade": (lambda: schedules.PaperDecay(1, 1, 0), ValueError,
        "epochs_per_decade must be finite and at least 1", "0", BOUNDS),
    "decay schedule above 1": (lambda: schedules.DecayWarmup(1.1), ValueError, "decay must be in [0, 1]", "1.1", BOUNDS),
    "unknown schedule": (lambda: schedules.resolve({"name": "linear"}), ValueError,
        "schedule must be one of 'constant', 'warmup', 'stop', 'paper_decay', 'decay_warmup', 'every', 'product'",
        "'linear'", SPELLING),
    "setting of a schedule missing": (lambda: schedules.resolve({"name": "warmup"}), ValueError,
        "The settings of the schedule 'warmup' must be steps", "none", SETTINGS),
    "product without factors": (lambda: schedules.resolve({"name": "product"}), ValueError,
        "The settings of the schedule 'product' must be factors", "none", SETTINGS),
    "a factor that has no settings": (lambda: schedules.Warmup(10) * len, ValueError,
        "Factors must be numbers or objects of selfalign.schedules", "<built-in function len>",
        "Multiply inside a function of the step instead."),
    # the plateau
    "no patience": (lambda: plateau.Plateau(patience=0), ValueError, "patience must be finite and at least 1", "0", BOUNDS),
    "patience of half a step": (lambda: plateau.Plateau(patience=0.5), TypeError, "patience must be an integer", "0.5", NUMBER),
    "warm-up below 0": (lambda: plateau.Plateau(warmup=-1), ValueError, "warmup must be finite and at least 0", "-1", BOUNDS),
    "negative gain": (lambda: plateau.Plateau(min_gain=-1), ValueError, "min_gain must be finite and at least 0", "-1", BOUNDS),
    "a factor that rises": (lambda: plateau.Plateau(shrink=2), ValueError, "shrink must be in [0, 1]", "2", BOUNDS),
    "smoothing that never moves": (lambda: plateau.Plateau(smoothing=1), ValueError, "smoothing must be in [0, 0.999999]", "1",
        "It is the old value's weight."),
    "a cosine per sample": (lambda: plateau.Plateau()(plateau.PlateauState(), ones(3)), ValueError,
        "cosine must be a scalar", "shape (3,)", "Take its mean over the batch."),
    "a cosine in words": (lambda: plateau.Plateau()(plateau.PlateauState(), "0.5"), TypeError,
        "cosine must be a tensor", "str '0.5'", "Convert it first."),
    # the loss's own
    "decay above 1 in the loss": (lambda: loss(decay=2), ValueError, "decay must be in [0, 1]", "2", OLD_VALUE),
    "unknown recipe": (lambda: SRALoss.preset("SiT-B/2", recipe="official"), ValueError,
        "recipe must be one of 'default', 'short', 'paper', 'official-2026-07'", "'official'", SPELLING),
    "unknown resolution": (lambda: SRALoss.preset("SiT-B/2", resolution=128), ValueError,
        "resolution must be one of 256, 512", "128", SPELLING),
    "schedule without a step": (lambda: loss(weight=schedules.Warmup(10))(tokens(1, 1, 1), tokens(1, 1, 1)), ValueError,
        "A weight that is a schedule needs the step", "step=None", "Pass step= the optimizer steps done."),
    "unknown setting": (lambda: SRALoss.from_settings(loss().settings(), gap=0.2), ValueError,
        "Settings must be those of SRALoss", "unknown gap", "Check versions and spelling."),
    "callable from its name": (lambda: SRALoss.from_settings(loss(distance=np.hypot, weight=len).settings()), ValueError,
        "A callable cannot be rebuilt from its name", "weight=builtins.len",
        "Pass it again: SRALoss.from_settings(settings, distance=my_distance)."),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "rule", "received", "fix"), ERRORS.values(), ids=ERRORS)
def test_rule_received_and_fix(call, kind, rule, received, fix):
    with pytest.raises(kind, match=f"^{re.escape(rule)}.*Received: .*{re.escape(received)}.*{re.escape(fix)}") as caught:
        call()
    assert type(caught.value) is kind


@pytest.mark.only("torch")
def test_two_devices():
    import torch

    rule, fix = r"All tensors of one call must be on one device\.", r"Move them with \.to\(device\) first\."
    with pytest.raises(ValueError, match=f"^{rule} Received: tensors on cpu and meta\\. {fix}"):
        loss()(tokens(2, 3, 4), torch.zeros(2, 3, 4, device="meta"))


@pytest.mark.only("torch")
def test_a_module_is_no_structure_of_arrays():
    import torch

    with pytest.raises(TypeError, match=r"must be a tensor\. Received: Linear Linear\(.*\. Convert it first\."):
        ema(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))


@pytest.mark.only("torch")
def test_a_scalar_may_stay_on_another_device():
    import torch

    step, far = torch.tensor(3), torch.zeros(2, 3, 4, device="meta")
    term = loss(weight=0.5 * schedules.Warmup(10))(far, far, step=step)
    assert term.device.type == "meta"


@pytest.mark.only("torch")
def test_times_that_carry_a_gradient_are_looked_at_without_a_warning():
    import torch

    t = torch.tensor([0.5, 0.75], requires_grad=True)
    assert time_gap.teacher_time(paths.Linear(), t, torch.full((2,), 0.5)).tolist() == pytest.approx([0.4, 0.65])


def test_every_error_of_the_core_is_in_the_table():
    """The longest literal of each rule in the sources occurs in a message that a call of the table gave."""
    messages = []
    for call, *_ in ERRORS.values():
        try:
            call()
        except Exception as error:  # of the wrong kind: the test of that case says so
            messages.append(str(error))
    messages.append("All tensors of one call must be on one device. Received: tensors on ")  # test_two_devices
    messages.append(  # test_imports.py
        "Keras must be imported before torch.compile traces selfalign. Received: a first call under torch.compile. "
        "Build the SelfAlignment first, or run the first step eagerly."
    )
    files = [file for file in pathlib.Path(selfalign.__file__).parent.glob("*.py") if file.stem not in ("cli", "_installed")]
    # test_cli.py has those two
    rules = {rule for file in files for rule in literal_rules(ast.parse(file.read_text("utf-8")))}
    assert len(rules) > 30
    missing = sorted(rule for rule in rules if not any(rule in message for message in messages))
    assert missing == []


def literal_rules(tree):
    """The longest string literal in the first argument of every invalid(...), ValueError(...) and TypeError(...)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("invalid", "ValueError", "TypeError"):
            yield max((c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant)), key=lambda v: len(str(v)))


def test_nothing_is_refused_without_reason():
    """The calls of the table are wrong in one thing only: set right, their helpers work."""
    assert array(loss()(tokens(2, 3, 4), tokens(2, 3, 4), mask=ones(2))) == 0
    assert tuple(project(4, 4).shape) == (2, 3, 4)
    assert array(move([0.5, 0.5], max_gap=0.5)).tolist() == [0.25, 0.25]
    assert array(mix()).tolist() == np.ones((2, 3)).tolist()
    assert array(ema([ones(2)], [ones(2)])[0]).tolist() == [1, 1]
    assert sorted(draws((4, 8), (8, 4))) == ["hidden_bias", "hidden_kernel", "output_bias", "output_kernel"]

"""Diagnostics: each figure against its formula in NumPy, and the laws that make it a measure."""

import ast
import pathlib
import re

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import BACKEND, FLOATS, PATHS, array, dtype_of, generators, tensor

import selfalign
from selfalign import diagnostics

OFFLINE = pytest.mark.only("torch")  # NumPy and scikit-learn alone: once
SHAPES = [(12, 3), (5, 8), (2, 4, 3)]  # more samples than features, fewer, and tokens


def rows(x):
    return x.reshape(-1, x.shape[-1]).astype("float64")


def rotation(rng, width):
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


# ---------------------------------------------------------------------------------------------------- oracles, from the papers


def effective_rank(x, center=False):
    x = rows(x) - rows(x).mean(0) * center
    values = np.linalg.svd(x)[1]
    shares = values[values > 0] / values.sum()
    return np.exp(-(shares * np.log(shares)).sum())


def participation_ratio(x):
    variances = np.linalg.svd(rows(x))[1] ** 2
    return variances.sum() ** 2 / (variances**2).sum()


def cka(x, y):
    """By Gram matrices and the centering matrix: tr(K H L H) over the geometric mean of both sides with themselves."""
    x, y = rows(x), rows(y)
    h = np.eye(len(x)) - 1 / len(x)
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h  # noqa: E741
    return np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l))


def cknna(x, y, k):
    """Pair by pair."""
    n = len(x)
    kernels = [[[float(a @ b) / np.sqrt((a @ a) * (b @ b)) for b in side] for a in side] for side in (x, y)]
    near = [[set(sorted((j for j in range(n) if j != i), key=lambda j: -side[i][j])[:k]) for i in range(n)] for side in kernels]

    def aligned(p, q):
        return sum(
            (kernels[p][i][j] - np.mean(kernels[p][i])) * (kernels[q][i][j] - np.mean(kernels[q][i]))
            for i in range(n)
            for j in near[p][i] & near[q][i]
        )

    return aligned(0, 1) / np.sqrt(aligned(0, 0) * aligned(1, 1))


# ----------------------------------------------------------------------------------------------------------------- the health


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_rank_and_ratio_equal_the_oracle(shape):
    @given(generators, st.sampled_from([1e-8, 1.0, 1e8]))
    def law(rng, scale):
        x = (scale * (rng.normal(size=shape) + 0.5)).astype("float32")
        for got, wanted in (
            (diagnostics.feature_norm(tensor(x)), np.linalg.norm(rows(x), axis=1).mean()),
            (diagnostics.effective_rank(tensor(x)), effective_rank(x)),
            (diagnostics.effective_rank(tensor(x), center=True), effective_rank(x, center=True)),
            (diagnostics.participation_ratio(tensor(x)), participation_ratio(x)),
        ):
            np.testing.assert_allclose(array(got), wanted, rtol=1e-3)

    law()


@pytest.mark.parametrize("measure", [diagnostics.effective_rank, diagnostics.participation_ratio])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_lie_between_1_and_the_smaller_side_and_know_no_scale_or_rotation(measure, shape):
    @given(generators)
    def law(rng):
        x = rng.normal(size=shape).astype("float32")
        got = array(measure(tensor(x)))
        assert 1 - 1e-5 <= got <= min(rows(x).shape) + 1e-4
        np.testing.assert_allclose(array(measure(tensor(8 * x @ rotation(rng, shape[-1])))), got, rtol=1e-4)

    law()


@pytest.mark.parametrize("measure", [diagnostics.effective_rank, diagnostics.participation_ratio])
def test_ranks_of_isotropic_and_of_one_dimensional_features(measure):
    rng = np.random.default_rng(0)
    isotropic = np.linalg.qr(rng.normal(size=(20, 6)))[0]
    np.testing.assert_allclose(array(measure(tensor(isotropic))), 6, rtol=1e-4)
    line = rng.normal(size=(20, 1)) * rng.normal(size=6)
    np.testing.assert_allclose(array(measure(tensor(line))), 1, rtol=1e-3)
    assert array(measure(tensor(line + 100), center=True)) == pytest.approx(1, rel=1e-2)
    assert np.isfinite(array(measure(tensor(np.zeros((4, 3))))))


@pytest.mark.parametrize("dtype", FLOATS)
def test_float32_scalars_for_every_dtype(dtype):
    x = tensor(np.eye(6), dtype)
    for got in (diagnostics.feature_norm(x), diagnostics.effective_rank(x), diagnostics.participation_ratio(x),
                diagnostics.cka(x, x), diagnostics.drift([x], [x])):  # fmt: skip
        assert (dtype_of(got), tuple(got.shape)) == ("float32", ())


@given(generators, st.sampled_from([0.5, 1.0, 1.5, 4.0]))
def test_drift(rng, scale):
    student = {"a": [tensor(rng.normal(size=(2, 3)))], "b": tensor(rng.normal(size=4)), "count": tensor(np.array(7))}
    teacher = {"a": [scale * student["a"][0]], "b": scale * student["b"], "count": tensor(np.array(9))}
    assert array(diagnostics.drift(student, student)) == 0
    np.testing.assert_allclose(array(diagnostics.drift(teacher, student)), abs(scale - 1), rtol=1e-5)
    np.testing.assert_allclose(array(diagnostics.drift(student, teacher)), abs(scale - 1) / scale, rtol=1e-5)


def test_drift_weighs_all_leaves_as_one_vector():
    student = {"small": tensor([3.0]), "large": tensor([4.0])}
    teacher = {"small": tensor([3.0]), "large": tensor([5.0])}
    np.testing.assert_allclose(array(diagnostics.drift(teacher, student)), 0.2, rtol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_the_teacher_has_the_larger_signal(name):
    path, known = PATHS[name]
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2, path=path)
    t = np.array([100, 400, 800]) if path.discrete else np.array([0.2, 0.5, 0.9], "float32")
    student = array(diagnostics.snr_decibels(path, tensor(t)))
    np.testing.assert_allclose(student, (10 * np.log10(oracle.snr(known, t))).mean(), atol=1e-3)
    teacher = diagnostics.snr_decibels(path, loss.teacher_time(tensor(t), tensor(np.full(3, 0.5, "float32"))))
    assert array(teacher) > student


def test_the_ends_of_the_path_are_cut():
    path = selfalign.paths.Linear()
    got = [array(diagnostics.snr_decibels(path, tensor([t]), limit=40)).item() for t in (0.0, 1.0)]
    assert got == [pytest.approx(40), pytest.approx(-40)]


@pytest.mark.only("torch")
def test_what_a_loop_logs_carries_no_graph():
    import torch

    x = torch.randn(4, 3, requires_grad=True)
    values = (diagnostics.feature_norm(x), diagnostics.effective_rank(x), diagnostics.participation_ratio(x),
              diagnostics.cka(x, x), diagnostics.drift([x], [x]))  # fmt: skip
    assert not any(value.requires_grad for value in values)


@pytest.mark.only("torch")
def test_nothing_waits_for_the_device():
    """Tensors without numbers: reading one would be an error."""
    import torch

    x, t = torch.ones(2, 4, 3, device="meta"), torch.ones(2, device="meta")
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=2)
    plateau = selfalign.plateau.Plateau()
    state, factor = plateau(plateau.init(), loss.metrics(x, x)["cosine"])
    metrics = {
        "norm": diagnostics.feature_norm(x),
        "ratio": diagnostics.participation_ratio(x, center=True),
        "cka": diagnostics.cka(x, x),
        "drift": diagnostics.drift([x], [x]),
        "snr": diagnostics.snr_decibels(loss.path, t),
        "factor": plateau(state, factor)[1],
    }
    logger = diagnostics.TensorBoardLogger(Writer(), every=2)
    logger.log(0, metrics)
    assert {value.device.type for value in metrics.values()} == {"meta"}
    with pytest.raises(RuntimeError, match="meta tensors"):
        logger.flush()


@pytest.mark.only("jax")
def test_health_and_cka_under_jit():
    import jax

    x = tensor(np.random.default_rng(0).normal(size=(6, 4)))
    for measure in (diagnostics.feature_norm, diagnostics.effective_rank, diagnostics.participation_ratio,
                    lambda x: diagnostics.cka(x, x), lambda x: diagnostics.drift([2 * x], [x])):  # fmt: skip
        np.testing.assert_allclose(array(jax.jit(measure)(x)), array(measure(x)), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- the similarities


@pytest.mark.parametrize(("n", "widths"), [(12, (3, 4)), (4, (8, 9))])
def test_cka_equals_the_oracle_and_lies_in_0_1(n, widths):
    @given(generators, st.sampled_from([1e-8, 1.0, 1e8]))
    def law(rng, scale):
        x, y = (rng.normal(size=(n, width)).astype("float32") for width in widths)
        got = array(diagnostics.cka(tensor(scale * x), tensor(y)))
        np.testing.assert_allclose(got, cka(x, y), rtol=1e-3, atol=1e-5)
        assert 0 <= got <= 1
        assert array(diagnostics.cka(tensor(y), tensor(scale * x))) == pytest.approx(got, rel=1e-5)

    law()


@given(generators, st.sampled_from([0.01, 3.0]))
def test_cka_knows_no_rotation_scale_or_shift_and_is_1_for_equal_features(rng, scale):
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(12, 4))
    got = array(diagnostics.cka(tensor(x), tensor(y)))
    moved = scale * x @ rotation(rng, 4) + scale
    np.testing.assert_allclose(array(diagnostics.cka(tensor(moved), tensor(y))), got, atol=1e-4)
    np.testing.assert_allclose(array(diagnostics.cka(tensor(moved), tensor(x))), 1, atol=1e-4)


def test_cka_of_tokens_and_of_a_constant():
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    flat = array(diagnostics.cka(tensor(rows(x)), tensor(rows(x)[::-1].copy())))
    assert array(diagnostics.cka(tensor(x), tensor(rows(x)[::-1].reshape(x.shape).copy()))) == flat
    assert array(diagnostics.cka(tensor(x), tensor(np.ones_like(x)))) == 0


@OFFLINE
@given(generators, st.integers(1, 8))
def test_cknna_equals_the_oracle_and_is_symmetric(rng, k):
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
    got = diagnostics.cknna(x, y, k)
    np.testing.assert_allclose(got, cknna(x, y, k), atol=1e-12)
    assert diagnostics.cknna(y, x, k) == pytest.approx(got, abs=1e-12)
    assert -1 <= got <= 1 + 1e-12


@OFFLINE
@given(generators, st.sampled_from([0.01, 3.0]))
def test_cknna_is_1_for_equal_features_and_knows_no_rotation_or_scale(rng, scale):
    x = rng.normal(size=(15, 4))
    assert diagnostics.cknna(x, x, 3) == pytest.approx(1)
    assert diagnostics.cknna(x, scale * x @ rotation(rng, 4), 3) == pytest.approx(1)


@OFFLINE
def test_cknna_of_unrelated_and_of_constant_features():
    x, y = np.random.default_rng(0).normal(size=(2, 400, 16))
    assert abs(diagnostics.cknna(x, y)) < 0.1
    assert diagnostics.cknna(np.ones((20, 3)), x[:20]) == 0


@OFFLINE
def test_compare_is_a_table():
    import torch

    layers = [torch.randn(20, width, generator=torch.Generator().manual_seed(width)) for width in (3, 4, 5)]
    for measure in (diagnostics.cka, diagnostics.cknna):
        table = diagnostics.compare(layers[:2], layers, measure)
        assert table.shape == (2, 3)
        assert table[1, 2] == float(measure(layers[1], layers[2]))
        np.testing.assert_allclose(table[[0, 1], [0, 1]], 1, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------------- the probes


def clouds(rng, distance, n=90):
    """Features of three classes, and the classes."""
    labels = np.arange(n) % 3
    return rng.normal(size=(n, 6)) + distance * np.eye(6)[labels], labels


@OFFLINE
@pytest.mark.parametrize("probe", [diagnostics.linear_probe, diagnostics.knn_probe])
def test_probes_tell_what_is_there_from_what_is_not(probe):
    import torch

    rng = np.random.default_rng(0)
    found = [probe(*clouds(rng, distance)) for distance in (0, 2, 20)]
    assert found[0] < 0.55
    assert found[0] < found[1] < found[2] == 1
    x, labels = clouds(rng, 3)
    assert probe(torch.tensor(x, dtype=torch.bfloat16, requires_grad=True), torch.tensor(labels)) == pytest.approx(
        probe(torch.tensor(x).bfloat16().double().numpy(), labels)
    )
    assert probe(x, labels) == probe(x, labels)


@OFFLINE
@pytest.mark.parametrize("probe", [diagnostics.linear_probe, diagnostics.knn_probe])
def test_probes_of_other_samples(probe):
    """What is read from them by hand; labels that do not fit are not read; what is fitted to stays the same."""
    rng = np.random.default_rng(0)
    train, test = clouds(rng, 3), clouds(rng, 3, 60)
    accuracy = probe(*train, held_out=test)
    assert accuracy * 60 == pytest.approx(round(accuracy * 60))
    assert accuracy > 0.9
    assert probe(*train, held_out=(test[0], (test[1] + 1) % 3)) < 0.1
    mean, deviation = train[0].mean(0), train[0].std(0)
    standard = [((x - mean) / deviation, labels) for x, labels in (train, test)]
    assert probe(*standard[0], held_out=standard[1]) == pytest.approx(accuracy)


@OFFLINE
def test_the_linear_probe_is_held_out():
    """As many features as samples fit any labels; what counts is what holds for others."""
    rng = np.random.default_rng(0)
    assert diagnostics.linear_probe(rng.normal(size=(60, 60)), np.arange(60) % 2) < 0.75


@OFFLINE
def test_per_layer_runs_over_layers_and_times():
    features = {0.1: [np.eye(3), 2 * np.eye(3)], 0.5: [np.eye(3), np.eye(3)]}
    assert diagnostics.per_layer(features, diagnostics.feature_norm) == {0.1: [1, 2], 0.5: [1, 1]}
    got = diagnostics.per_layer(features, diagnostics.effective_rank, center=True)
    assert got[0.5][0] == pytest.approx(2)


# --------------------------------------------------------------------------------------------------------------------- the maps


@OFFLINE
@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (6, 1), (2, 3, 4)])
def test_maps_have_the_grids_shape_and_lie_in_0_1(grid):
    @given(generators)
    def law(rng):
        tokens = rng.normal(size=(3, int(np.prod(grid)), 5))
        maps = diagnostics.pca_maps(tokens, grid)
        assert maps.shape == (3, *grid, 3)
        assert maps.min() == 0
        assert maps.max() == 1
        np.testing.assert_allclose(diagnostics.pca_maps(7 * tokens + 3, grid), maps, atol=1e-6)

    law()


@OFFLINE
def test_a_map_shows_where_the_features_differ():
    """The first component of an image whose left half has other features is its left half."""
    rng = np.random.default_rng(0)
    left = np.tile(np.arange(6) < 3, 4)  # a grid of 4 rows and 6 columns
    direction = np.array([0.0, -5, 0, 1, 0, 0, 0, 0])
    tokens = 0.01 * rng.normal(size=(2, 24, 8)) + left[:, None] * direction
    first = diagnostics.pca_maps(tokens, (4, 6))[..., 0]
    assert (first[:, :, :3] < 0.2).all()  # the largest weight, -5's, counts as positive
    assert (first[:, :, 3:] > 0.8).all()


@OFFLINE
def test_equal_colours_mean_alike_features_in_all_samples():
    tokens = np.random.default_rng(0).normal(size=(2, 6, 5))
    tokens[1, 4] = tokens[0, 1]
    maps = diagnostics.pca_maps(tokens, (2, 3))
    np.testing.assert_allclose(maps[1].reshape(6, 3)[4], maps[0].reshape(6, 3)[1], atol=1e-12)


@OFFLINE
def test_maps_of_constant_tokens_are_grey():
    assert (diagnostics.pca_maps(np.full((2, 6, 4), 3.0), (2, 3)) == 0.5).all()


@OFFLINE
def test_pictures(tmp_path):
    from matplotlib.image import imread

    image, video = np.zeros((3, 4, 8, 3)), np.ones((2, 3, 4, 8, 3))
    diagnostics.draw_maps(image, tmp_path / "image.png")
    diagnostics.draw_maps({"block 1": video, "block 2": 0.5 * video}, tmp_path / "video.png")
    shapes = [imread(tmp_path / f"{name}.png").shape[:2] for name in ("image", "video")]
    assert shapes[1][0] == 2 * shapes[0][0]
    assert shapes[1][1] > 1.5 * shapes[0][1]  # six frames of two videos in a row, against three images


# ------------------------------------------------------------------------------------------------------------------- the finder


def model_features(known, rng, n=240, times=(0.1, 0.5)):
    """Layers that know so much of a sample's class, less of it at more noise; what they do not know is noise."""
    labels = np.arange(n) % 4
    hidden = 4 * np.eye(8)[labels] + rng.normal(size=(n, 8))
    layers = {
        time: [share * (1 - time) * hidden + rng.normal(size=(n, 8)) for share in known] for time in times
    }  # fmt: skip
    return layers, labels


@OFFLINE
@pytest.mark.parametrize("labelled", [True, False])
def test_the_finder_proposes_the_first_of_the_best_and_one_half_way(labelled):
    features, labels = model_features([0.1, 0.25, 0.5, 0.9, 2.0, 2.0, 1.0, 0.5], np.random.default_rng(0))
    found = diagnostics.find_layers(features, labels if labelled else None, probe=diagnostics.knn_probe, tolerance=0.05)
    assert found.teacher in (5, 6)
    assert found.student in (2, 3)
    assert found.student <= found.teacher - 2
    half = (found.quality[0] + found.quality[found.teacher - 1]) / 2
    distances = [abs(q - half) for q in found.quality[: found.teacher - 2]]
    assert distances[found.student - 1] == min(distances)
    np.testing.assert_allclose(found.quality, np.mean(list(found.scores.values()), 0))


@OFFLINE
def test_the_finder_says_why():
    features, labels = model_features([0.1, 0.5, 2.0, 2.0], np.random.default_rng(0))
    found = diagnostics.find_layers(features, labels)
    text = str(found)
    assert list(found.scores) == [0.1, 0.5]
    assert f"Teacher, block {found.teacher} of 4: {found.quality[found.teacher - 1]:.3f}" in text
    assert f"Student, block {found.student}: {found.quality[found.student - 1]:.3f}" in text
    assert "Score: accuracy of linear_probe on held-out samples; mean over t = 0.1, 0.5." in text
    assert found.measure == "linear_probe"
    assert "A heuristic, of one model" in text
    assert "0.25 and 0.7 of the depth, is 1 -> 2 here" in text or "is 1 -> 3 here" in text
    unlabelled = diagnostics.find_layers(features)
    assert "Score: CKNNA of a layer's features at t = 0.1 with its own at more noise" in str(unlabelled)
    assert list(unlabelled.scores) == [0.5]
    assert unlabelled.scores[0.5][2] == diagnostics.cknna(features[0.1][2], features[0.5][2])
    selfalign.SRALoss(student_layer=found.student, teacher_layer=found.teacher).layers(4)


@OFFLINE
def test_where_the_first_layer_is_best_the_advice_stands():
    accuracies = iter([0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    found = diagnostics.find_layers({0.5: [np.eye(3)] * 8}, [0, 1, 2], probe=lambda x, y: next(accuracies))
    assert (found.student, found.teacher) == selfalign.SRALoss(student_layer=0.25, teacher_layer=0.7).layers(8)
    assert "No block is better than block 1 (0.900): these features decide nothing" in str(found)


@OFFLINE
@given(st.integers(2, 30).flatmap(lambda depth: st.lists(st.floats(0, 1), min_size=depth, max_size=depth)))
def test_every_proposal_is_a_pair_that_the_loss_takes(quality):
    scores = iter(quality)
    found = diagnostics.find_layers({0.5: [np.eye(2)] * len(quality)}, [0, 1], probe=lambda x, y: next(scores))
    assert 1 <= found.student < found.teacher <= len(quality)
    loss = selfalign.SRALoss(student_layer=found.student, teacher_layer=found.teacher)
    assert loss.layers(len(quality)) == (found.student, found.teacher)


@OFFLINE
def test_the_finders_plot(tmp_path):
    features, _ = model_features([0.1, 0.5, 2.0, 2.0], np.random.default_rng(0), n=40)
    diagnostics.find_layers(features).plot(tmp_path / "layers.svg")
    assert "</svg>" in (tmp_path / "layers.svg").read_text()


# ------------------------------------------------------------------------------------------------------------------ the loggers


def test_csv_holds_what_was_logged_and_a_resumed_run_appends(tmp_path):
    file = tmp_path / "log.csv"
    with diagnostics.CSVLogger(file, every=2) as logger:
        logger.log(0, {"cosine": tensor(np.float32(0.25)), "distance": 1})
        assert not file.exists()
        logger.log(1, {"cosine": tensor(np.float32(0.5), "bfloat16")})
        assert len(file.read_text().splitlines()) == 4
        logger.log(tensor(np.array(2)), {"finite": tensor(np.array(True)), "probe, block 3": 0.5})
    with diagnostics.CSVLogger(file) as logger:
        logger.log(3, {"cosine": 0.1})
    wanted = ["step,metric,value", "0,cosine,0.25", "0,distance,1", "1,cosine,0.5", "2,finite,1", '2,"probe, block 3",0.5',
              "3,cosine,0.1"]  # fmt: skip
    assert file.read_text().splitlines() == wanted


def test_numbers_survive_the_file_to_the_last_bit_of_float32(tmp_path):
    values = np.random.default_rng(0).normal(size=50).astype("float32")
    with diagnostics.CSVLogger(tmp_path / "log.csv") as logger:
        for step, value in enumerate(values):
            logger.log(step, {"x": tensor(value)})
    lines = (tmp_path / "log.csv").read_text().splitlines()[1:]
    assert np.array_equal(np.array([float(line.split(",")[2]) for line in lines], "float32"), values)


class Writer:
    def __init__(self):
        self.rows, self.flushed = [], 0

    def add_scalar(self, name, value, step):
        assert isinstance(value, float)
        self.rows.append((name, value, step))

    def flush(self):
        self.flushed += 1


def test_tensorboard_gets_plain_numbers_every_n_steps():
    writer = Writer()
    logger = diagnostics.TensorBoardLogger(writer, every=3, prefix="align/")
    for step in range(4):
        logger.log(step, {"cosine": tensor(np.float32(step))})
    assert writer.rows == [("align/cosine", float(step), step) for step in range(3)]
    logger.close()
    logger.close()
    assert [row[2] for row in writer.rows] == [0, 1, 2, 3]
    assert writer.flushed == 2


def test_what_is_logged_when_the_loop_fails_is_written():
    writer = Writer()

    def fail():
        with diagnostics.TensorBoardLogger(writer) as logger:
            logger.log(0, {"cosine": 1.0})
            raise RuntimeError("the loop's own")

    with pytest.raises(RuntimeError, match="the loop's own"):
        fail()
    assert writer.rows == [("sra/cosine", 1.0, 0)]


@pytest.mark.only("torch")
def test_what_is_kept_is_a_copy_without_graph_and_nothing_is_read_between():
    import torch

    class Watched(torch.Tensor):
        read = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.read += function in (torch.Tensor.__float__, torch.Tensor.item)
            return super().__torch_function__(function, types, args, kwargs or {})

    writer, value = Writer(), (torch.ones((), requires_grad=True) * 2).as_subclass(Watched)
    logger = diagnostics.TensorBoardLogger(writer, every=2)
    logger.log(0, {"x": value})
    assert not logger._pending[0][1]["x"].requires_grad
    assert Watched.read == 0
    with torch.no_grad():
        value.fill_(9)
    logger.log(1, {"x": value})
    assert [row[1] for row in writer.rows] == [2, 9]
    assert Watched.read == 2


@pytest.mark.only("numpy")
def test_a_numpy_scalar_that_is_written_to_later_was_copied():
    writer, value = Writer(), np.array(2.0)
    with diagnostics.TensorBoardLogger(writer) as logger:
        logger.log(0, {"x": value})
        value.fill(9)
    assert writer.rows == [("sra/x", 2.0, 0)]


# ------------------------------------------------------------------------------------------------------------------- the errors


def ones(*shape):
    return tensor(np.ones(shape))


LABELS = [0, 1] * 3
ERRORS = {
    # name: (call, kind, rule, received, fix)
    "features without rows": (lambda: diagnostics.feature_norm(ones(3)), ValueError,
        "tokens must be features [n, D] or tokens [B, N, D], not empty", "shape (3,)", "the width as the last axis."),
    "empty features": (lambda: diagnostics.effective_rank(ones(0, 3)), ValueError,
        "tokens must be features [n, D] or tokens [B, N, D], not empty", "shape (0, 3)", "the width as the last axis."),
    "no tensor": (lambda: diagnostics.participation_ratio([[1.0]]), TypeError, "tokens must be a tensor", "list", "Convert"),
    "drift of other trees": (lambda: diagnostics.drift({"a": ones(2)}, {"b": ones(2)}), ValueError,
        "Teacher and student must have the same structure and shapes", "at 'a': teacher (2,), student missing", "as a copy"),
    "signal of a time outside": (lambda: diagnostics.snr_decibels(selfalign.paths.Linear(), tensor([1.5])), ValueError,
        "t must lie in [0, 1]", "values from 1.5 to 1.5", "check the model's time scale."),
    "cka of other samples": (lambda: diagnostics.cka(ones(4, 2), ones(5, 2)), ValueError,
        "x and y must be features of the same samples", "x (4, 2), y (5, 2)", "on one batch, in one order."),
    "cknna of other samples": (lambda: diagnostics.cknna(np.ones((4, 2)), np.ones((5, 2))), ValueError,
        "x and y must be features of the same samples", "x (4, 2), y (5, 2)", "on one batch, in one order."),
    "cknna of tokens": (lambda: diagnostics.cknna(np.ones((4, 2, 3)), np.ones((4, 2))), ValueError,
        "x must be an array [n, D] of at least two samples", "shape (4, 2, 3)", "Take the mean over tokens"),
    "cknna of NaN": (lambda: diagnostics.cknna(np.ones((4, 2)), np.full((4, 2), np.nan)), ValueError,
        "y must be finite", "NaN or infinity", "Find the layer that gives them first."),
    "too many neighbours": (lambda: diagnostics.cknna(np.ones((4, 2)), np.ones((4, 2)), 4), ValueError,
        "k must be in [1, 3]", "4", "It counts neighbours among the other samples; 10 in the paper."),
    "labels of other samples": (lambda: diagnostics.linear_probe(np.ones((4, 2)), LABELS), ValueError,
        "labels must hold one class per sample, [n]", "shape (6,), for 4 samples", "Pass the classes of the samples"),
    "a class too small": (lambda: diagnostics.linear_probe(np.ones((4, 2)), [0, 0, 0, 1]), ValueError,
        "A probe needs two classes or more, each with as many samples as there are folds",
        "2 classes, the smallest of 1 samples, 3 folds", "Take more samples, or fewer folds."),
    "one fold": (lambda: diagnostics.linear_probe(np.ones((6, 2)), LABELS, folds=1), ValueError,
        "folds must be finite and at least 2", "1", "Pass a value inside these bounds."),
    "neighbours beyond the fold": (lambda: diagnostics.knn_probe(np.ones((6, 2)), LABELS, k=5), ValueError,
        "k must not exceed the samples that are left to vote", "k=5, 4 samples", "Take more samples."),
    "held-out features of another layer": (
        lambda: diagnostics.linear_probe(np.ones((6, 2)), LABELS, held_out=(np.ones((6, 3)), LABELS)), ValueError,
        "Held-out features must have the width of the others", "3 and 2", "Take both from one layer."),
    "maps of mean tokens": (lambda: diagnostics.pca_maps(np.ones((4, 8)), (2, 2)), ValueError,
        "Maps need tokens [B, N, D], at least three of them, with D at least 3", "shape (4, 8)", "not their mean."),
    "another grid": (lambda: diagnostics.pca_maps(np.ones((2, 6, 8)), (2, 2)), ValueError,
        "grid must be (H, W) or (T, H, W) with H W or T H W = N", "(2, 2), for 6 tokens", "leave out class and text tokens."),
    "maps of NaN": (lambda: diagnostics.pca_maps(np.full((2, 4, 8), np.inf), (2, 2)), ValueError,
        "tokens must be finite", "NaN or infinity", "Find the layer"),
    "a picture of no colours": (lambda: diagnostics.draw_maps({"a": np.ones((2, 4, 6))}, "x.png"), ValueError,
        "Maps must be colours [B, H, W, 3] or [B, T, H, W, 3]", "'a' of shape (2, 4, 6)", "Take them from pca_maps."),
    "no features": (lambda: diagnostics.find_layers({}), ValueError, "features must be {time: [features of each layer]}",
        "layers by time {}", "Take them after every block of the model."),
    "times of two depths": (lambda: diagnostics.find_layers({0.1: [1, 2], 0.5: [1, 2, 3]}), ValueError,
        "features must be {time: [features of each layer]}", "layers by time {0.1: 2, 0.5: 3}", "after every block"),
    "one time and no labels": (lambda: diagnostics.find_layers({0.1: [1, 2]}), ValueError,
        "Without labels the finder compares noise levels", "features at 0.1 alone", "or labels."),
    "tolerance of all": (lambda: diagnostics.find_layers({0.1: [1, 2]}, tolerance=1), ValueError,
        "tolerance must be in [0, 0.999999]", "1", "Pass a value inside these bounds."),
    "a metric per sample": (lambda: diagnostics.CSVLogger("x.csv").log(0, {"cosine": ones(3)}), ValueError,
        "A metric must be a scalar", "'cosine' of shape (3,)", "Log its mean."),
    "a writer that cannot": (lambda: diagnostics.TensorBoardLogger(print), TypeError,
        "writer must have add_scalar(name, value, step)", "builtin_function_or_method", "Pass a SummaryWriter"),
    "written every half step": (lambda: diagnostics.CSVLogger("x.csv", every=0.5), TypeError,
        "every must be an integer", "0.5", "Pass a Python int or float."),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "rule", "received", "fix"), ERRORS.values(), ids=ERRORS)
def test_rule_received_and_fix(call, kind, rule, received, fix):
    with pytest.raises(kind, match=f"^{re.escape(rule)}.*Received: .*{re.escape(received)}.*{re.escape(fix)}"):
        call()


def test_every_error_of_the_diagnostics_is_in_the_table():
    messages = []
    for call, *_ in ERRORS.values():
        try:
            call()
        except Exception as error:  # of the wrong kind: the test above says so
            messages.append(str(error))
    folder = pathlib.Path(diagnostics.__file__).parent
    rules = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("invalid", "ValueError", "TypeError"):
                literals = [c.value for c in ast.walk(node.args[0]) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
                rules.add(max(literals, key=len))
    assert len(rules) > 10
    assert sorted(rule for rule in rules if not any(rule in message for message in messages)) == []


@OFFLINE
def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch):
    import sys

    for module in ("sklearn.linear_model", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    fix = re.escape('Install it with: pip install "selfalign[diagnostics]"')
    with pytest.raises(ImportError, match=rf"^This diagnostic needs scikit-learn\. Received: .*\. {fix}"):
        diagnostics.linear_probe(np.ones((6, 2)), LABELS)
    with pytest.raises(ImportError, match=rf"^This diagnostic needs matplotlib\. Received: .*\. {fix}"):
        diagnostics.draw_maps(np.ones((1, 2, 2, 3)), "x.png")


def test_the_backend_is_the_one_under_test():
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")  # NumPy arrays are converted, as everywhere
    module = type(diagnostics.cka(x, x)).__module__.partition(".")[0]
    assert module in {"numpy": ("numpy",), "torch": ("torch",), "jax": ("jax", "jaxlib")}[BACKEND]

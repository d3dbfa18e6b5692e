"""Files of the Keras adapter: a resumed fit is the uninterrupted one; the backbone has no trace."""

import functools
import re
import zipfile

import keras
import numpy as np
import pytest
from keras_fits import compiled, fitted, same
from keras_models import WIDTH, Block, functional, subclassed, unconditional
from support import array
from third_party import LogCoshLoss

import selfalign
from selfalign.adapters.keras import SelfAligned

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's, NumPy 2.4


def refused(text):
    return pytest.raises(ValueError, match=re.escape(text))


def scheduled():
    return selfalign.SRALoss(
        student_layer=2,
        teacher_layer=4,
        weight=0.5 * selfalign.schedules.Warmup(20),
        decay=selfalign.schedules.DecayWarmup(0.99),
    )


KINDS = {
    "functional": (lambda: functional(depth=4), {}),
    "class": (lambda: functional(Block, depth=4), {}),
    "subclassed": (lambda: subclassed(depth=4), {"width": WIDTH}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(kind, data, tmp_path):
    make, options = KINDS[kind]
    model = compiled(make(), scheduled(), keras.optimizers.AdamW(1e-2), **options)
    fitted(model, data)
    model.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(resumed, SelfAligned)
    assert int(resumed.steps) == 4
    for each in (model, resumed):
        fitted(each, data)
    assert same(model, resumed)
    assert same(model.ema_backbone(), resumed.ema_backbone())


LOSSES = {
    "sra": selfalign.SRALoss(student_layer=1, teacher_layer=2, path="edm", distance="smooth_l1"),
    "layersync": selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3, projector=True),
    "repa": selfalign.REPALoss(student_layer=2, width=6, hidden=12, normalise="centre"),
}
LOSSES["list"] = list(LOSSES.values())
LOSSES["list of one"] = [selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3, name="deep")]


@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_comes_back_from_its_file(name, tmp_path):
    model = SelfAligned(unconditional(), LOSSES[name], label_dropout=0.1, null_label=3, seed=4)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.objectives == model.objectives
    assert loaded.noise_path == model.noise_path
    assert loaded.logged.keys() == model.logged.keys()
    assert loaded.get_config() == {
        **model.get_config(),
        "backbone": loaded.get_config()["backbone"],
    }
    assert same(loaded, model)


OPTIONS = {
    "taps": {"taps": ("block_1", "block_3")},
    "taps by name": {"taps": {"layersync": ("block_1", "block_3")}},
    "path": {"path": selfalign.paths.Linear(noise_at=0)},
    "pattern": {"blocks": "block_{}"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_come_back_from_a_file(name, tmp_path):
    layersync = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=2)
    model = SelfAligned(unconditional(), layersync, **OPTIONS[name])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.taps == model.taps
    assert loaded.noise_path == model.noise_path
    loaded.save_weights(tmp_path / "again.weights.h5")
    model.load_weights(tmp_path / "again.weights.h5")  # its settings are still the same


def power(student, target):
    return keras.ops.mean(keras.ops.square(student - target), axis=-1) ** 0.75


@pytest.mark.parametrize(
    "loss",
    [
        LogCoshLoss(student_layer=1, teacher_layer=3),
        selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3, distance=power, name="mine"),
    ],
    ids=["a class of one's own", "a function of one's own"],
)
def test_what_is_not_selfaligns_own_is_passed_again(loss, tmp_path):
    file = tmp_path / "model.keras"
    model = SelfAligned(unconditional(), loss)
    model.save(file)
    name = loss.name or loss.kind
    fix = f'Pass keras.saving.load_model(file, custom_objects={{"{name}": loss}}).'
    with refused(f"Received: a file with the objective {name!r}, without it. {fix}"):
        keras.saving.load_model(file)
    loaded = keras.saving.load_model(file, custom_objects={name: loss})
    assert loaded.objectives == {name: loss}
    assert same(loaded, model)


def half(step):
    return 0.5 + 0 * step


def first(output):
    return output


def quarter(count, seed):
    return keras.ops.full((count,), 0.25)


FUNCTIONS = {
    "distance": ({"distance": power}, {}),
    "weight": ({"weight": half}, {}),
    "decay": ({"decay": half}, {}),
    "options": ({}, {"select": first, "draw_time": quarter}),
}


@pytest.mark.parametrize("where", FUNCTIONS)
@pytest.mark.parametrize("registered", [True, False])
def test_functions_come_back_by_their_own_names(where, registered, tmp_path):
    settings, options = FUNCTIONS[where]
    loss = selfalign.SRALoss(student_layer=1, teacher_layer=3, **settings)
    model = compiled(unconditional(), loss, **options)
    model.save(tmp_path / "model.keras")
    names = {function.__name__: function for function in (*settings.values(), *options.values())}
    if registered:
        with keras.saving.custom_object_scope(names):
            loaded = keras.saving.load_model(tmp_path / "model.keras")
    else:
        loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=names)
    assert loaded.objectives == model.objectives
    assert {name: loaded.get_config()[name] for name in options} == {
        name: model.get_config()[name] for name in options
    }


def test_a_function_without_a_name_is_refused_when_it_is_saved(loss, tmp_path):
    model = compiled(functional(depth=4), loss, select=functools.partial(first))
    rule = "select must be a function that Keras can save. Received: functools.partial("
    with refused(rule):
        model.save(tmp_path / "model.keras")


def own_loss(target, prediction):
    return keras.ops.mean(keras.ops.abs(target - prediction), axis=-1)


def test_what_was_compiled_comes_back(data, tmp_path):
    layersync = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3)
    model = compiled(unconditional(), layersync)
    model.compile("sgd", own_loss, metrics=["mae"])
    model.save(tmp_path / "model.keras")
    objects = {"own_loss": own_loss}
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=objects)
    assert loaded.test_on_batch(data[0]) == model.test_on_batch(data[0])
    logs = {name: float(value) for name, value in loaded.get_metrics_result().items()}
    np.testing.assert_allclose(logs["mae"], logs["denoising"], rtol=1e-5)


def test_another_objective_in_place_of_the_saved_one_is_refused(tmp_path):
    SelfAligned(unconditional(), LogCoshLoss(student_layer=1, teacher_layer=3)).save(
        tmp_path / "model.keras"
    )
    other = LogCoshLoss(student_layer=1, teacher_layer=2)
    with refused("of the same settings. Received: log_cosh.teacher_layer 3 instead of 2. Build"):
        keras.saving.load_model(tmp_path / "model.keras", custom_objects={"log_cosh": other})


def test_the_backbone_alone_bears_no_trace(backbone, loss, data, tmp_path):
    config = backbone.get_config()
    model = compiled(backbone, loss)
    model.train_on_batch(*data)
    assert backbone.get_config() == config
    for source in (backbone, model.ema_backbone()):
        file = tmp_path / "backbone.keras"
        source.save(file)
        with zipfile.ZipFile(file) as archive:
            assert "selfalign" not in archive.read("config.json").decode()
        assert same(keras.saving.load_model(file), source)


def test_weights_come_back_into_a_model_of_the_same_settings(loss, data, tmp_path):
    model = compiled(functional(depth=4), loss)
    model.train_on_batch(*data)
    model.save_weights(tmp_path / "sra.weights.h5")
    other = SelfAligned(functional(depth=4), loss)
    other.load_weights(tmp_path / "sra.weights.h5")
    assert same(model, other)


def test_weights_of_other_settings_are_refused(tmp_path):
    saved = selfalign.SRALoss(student_layer=1, teacher_layer=3)
    SelfAligned(unconditional(), saved).save_weights(tmp_path / "sra.weights.h5")
    other = selfalign.SRALoss(student_layer=2, teacher_layer=3, weight=0.2)
    model = SelfAligned(unconditional(), other, prediction="noise")
    before = array(model.projector["hidden_kernel"].value)
    changed = [
        "sra.student_layer 1 instead of 2",
        "sra.weight 0.5 instead of 0.2",
        "prediction 'velocity' instead of 'noise'",
    ]
    with refused(f"a model of the same settings. Received: {', '.join(changed)}. Build it with"):
        model.load_weights(tmp_path / "sra.weights.h5")
    np.testing.assert_array_equal(before, array(model.projector["hidden_kernel"].value))


def test_weights_of_another_list_are_refused(tmp_path):
    layersync = selfalign.LayerSyncLoss(student_layer=1, teacher_layer=3)
    sra = selfalign.SRALoss(student_layer=1, teacher_layer=3)
    SelfAligned(unconditional(), [sra, layersync]).save_weights(tmp_path / "two.weights.h5")
    with refused("layersync.kind 'layersync' instead of None"):
        SelfAligned(unconditional(), [sra]).load_weights(tmp_path / "two.weights.h5")

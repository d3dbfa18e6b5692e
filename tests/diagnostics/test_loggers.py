"""Loggers: what they write and when, and what stays on its device."""

import numpy as np
import pytest
from support import tensor

import selfalign
from selfalign import diagnostics


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
    wanted = [
        "step,metric,value",
        "0,cosine,0.25",
        "0,distance,1",
        "1,cosine,0.5",
        "2,finite,1",
        '2,"probe, block 3",0.5',
        "3,cosine,0.1",
    ]
    assert file.read_text().splitlines() == wanted


def test_numbers_survive_the_file_to_the_last_bit_of_float32(tmp_path):
    values = np.random.default_rng(0).normal(size=50).astype("float32")
    with diagnostics.CSVLogger(tmp_path / "log.csv") as logger:
        for step, value in enumerate(values):
            logger.log(step, {"x": tensor(value)})
    lines = (tmp_path / "log.csv").read_text().splitlines()[1:]
    written = [float(line.split(",")[2]) for line in lines]
    assert np.array_equal(np.array(written, "float32"), values)


class Writer:
    def __init__(self):
        self.rows = []
        self.flushed = 0

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

    writer = Writer()
    value = (torch.ones((), requires_grad=True) * 2).as_subclass(Watched)
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
    writer = Writer()
    value = np.array(2.0)
    with diagnostics.TensorBoardLogger(writer) as logger:
        logger.log(0, {"x": value})
        value.fill(9)
    assert writer.rows == [("sra/x", 2.0, 0)]


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

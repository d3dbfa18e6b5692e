"""Loggers: metrics into a CSV file or TensorBoard.

What is logged stays on its device until a block of steps is written.
"""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

from .._checks import check_number, invalid
from ..typing import Scalar, Step

Row: TypeAlias = tuple[int, dict[str, float]]
"""A step, and its metrics as plain numbers."""


class Logger:
    """Base of the loggers: keeps metrics as they come, and writes them every `every` calls.

    A logger of your own gives `write`. Writing reads the numbers, which waits for the device;
    between two writings nothing does. Use it as a context, or close it: the rest is written then.

    Example: see `CSVLogger`.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = check_number("every", every, 1, integer=True)
        self._pending: list[tuple[Step, dict[str, Scalar]]] = []

    def log(self, step: Step, metrics: Mapping[str, Scalar]) -> None:
        """Take the metrics of a step, such as those of `SRALoss.metrics`.

        Args:
            step: its number.
            metrics: numbers or scalar tensors, by name.

        Raises:
            ValueError: a metric that is no scalar.
        """
        for name, value in metrics.items():
            shape = tuple(getattr(value, "shape", ()))
            if any(side != 1 for side in shape):
                received = f"{name!r} of shape {shape}"
                raise invalid("A metric must be a scalar", received, "Log its mean.")
        self._pending.append((step, {name: _kept(value) for name, value in metrics.items()}))
        if len(self._pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Write what was logged since the last time."""
        pending = self._pending
        self._pending = []
        if pending:
            self.write([_as_numbers(step, metrics) for step, metrics in pending])

    def write(self, rows: list[Row]) -> None:
        """Write the metrics of some steps, as plain numbers."""
        raise NotImplementedError

    def close(self) -> None:
        """Write the rest."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _kept(value: Scalar) -> Scalar:
    """A copy on the same device, without graph: a tensor may be written to after the step."""
    return value.detach().clone() if hasattr(value, "detach") else copy.copy(value)


def _as_numbers(step: Step, metrics: Mapping[str, Scalar]) -> Row:
    return int(step), {name: float(value) for name, value in metrics.items()}


class CSVLogger(Logger):
    """Metrics in a plain file, one line for each: step,metric,value. A resumed run appends to it.

    Such a file takes metrics that come rarely, or late. pandas makes a table of it:
    `pandas.read_csv(path).pivot(index="step", columns="metric")`.

    Args:
        path: the file.
        every: calls of `log` between two writings.

    Example:
        >>> import os, tempfile
        >>> from selfalign import diagnostics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "log.csv")
        ...     with diagnostics.CSVLogger(path) as logger:
        ...         logger.log(0, {"cosine": 0.25})
        ...     with open(path) as file:
        ...         print(file.read(), end="")
        step,metric,value
        0,cosine,0.25
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 100) -> None:
        super().__init__(every)
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(
                f"path must be that of a file. Received: {path!r:.60}. Pass a string or a Path."
            )
        self.path = path

    def write(self, rows: list[Row]) -> None:
        """Append the metrics of some steps."""
        with open(self.path, "a", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                lines.writerow(("step", "metric", "value"))
            for step, metrics in rows:
                for name, value in metrics.items():
                    lines.writerow((step, name, f"{value:.9g}"))


class TensorBoardLogger(Logger):
    """Metrics in TensorBoard, through a writer of yours.

    wandb, MLflow and others have one that takes the same call.

    Args:
        writer: any object with add_scalar(name, value, step), such as
            `torch.utils.tensorboard.SummaryWriter`. It stays open.
        every: calls of `log` between two writings.
        prefix: what is put before each name.

    Raises:
        TypeError: the writer has no add_scalar.

    Example:
        >>> from selfalign import diagnostics
        >>> class Writer:
        ...     def add_scalar(self, name, value, step):
        ...         print(name, value, step)
        >>> with diagnostics.TensorBoardLogger(Writer()) as logger:
        ...     logger.log(7, {"cosine": 0.25})
        sra/cosine 0.25 7
    """

    def __init__(self, writer: Any, every: int = 100, prefix: str = "sra/") -> None:
        super().__init__(every)
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                "writer must have add_scalar(name, value, step). Received: "
                f"{type(writer).__name__}. Pass a SummaryWriter, or an object with that method."
            )
        self.writer = writer
        if not isinstance(prefix, str):
            raise TypeError(
                f"prefix must be a string. Received: {prefix!r:.60}. Pass for instance "
                '"sra/", or "" for none.'
            )
        self.prefix = prefix

    def write(self, rows: list[Row]) -> None:
        """Hand the metrics of some steps to the writer."""
        for step, metrics in rows:
            for name, value in metrics.items():
                self.writer.add_scalar(self.prefix + name, value, step)
        if hasattr(self.writer, "flush"):
            self.writer.flush()

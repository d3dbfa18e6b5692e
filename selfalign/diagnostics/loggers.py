"""Loggers: metrics into a CSV file or TensorBoard. What is logged stays on its device until a block of steps is written."""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Mapping
from typing import Any

from .._checks import check_number, invalid


class Logger:
    """Base of the loggers: keeps metrics as they come, and writes them every `every` calls. Yours gives `write`.

    Writing reads the numbers, which waits for the device; between two writings nothing does. Use it as a context, or close it:
    what was not written is written then.

    Example: see `CSVLogger`.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = check_number("every", every, 1, integer=True)
        self._pending: list[tuple[Any, dict[str, Any]]] = []

    def log(self, step: Any, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step: numbers or scalar tensors by name, such as those of `SRALoss.metrics`.

        Raises:
            ValueError: a metric that is no scalar.
        """
        for name, value in metrics.items():
            if any(side != 1 for side in getattr(value, "shape", ())):
                raise invalid("A metric must be a scalar", f"{name!r} of shape {tuple(value.shape)}", "Log its mean.")
        self._pending.append((step, {name: _kept(value) for name, value in metrics.items()}))
        if len(self._pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Write what was logged since the last time."""
        pending, self._pending = self._pending, []
        rows = [(int(step), {name: float(value) for name, value in metrics.items()}) for step, metrics in pending]
        if rows:
            self.write(rows)

    def write(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Write the metrics of some steps, as plain numbers."""
        raise NotImplementedError

    def close(self) -> None:
        """Write the rest."""
        self.flush()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _kept(value: Any) -> Any:
    """A copy on the same device: a tensor may be written to after the step, and its graph must not live on."""
    return value.detach().clone() if hasattr(value, "detach") else copy.copy(value)


class CSVLogger(Logger):
    """Metrics in a plain file, one line for each: step,metric,value. A resumed run appends to it.

    Such a file takes metrics that come rarely, or late; `pandas.read_csv(path).pivot(index="step", columns="metric")` makes
    a table of it.

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
        self.path = path

    def write(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Append the metrics of some steps."""
        with open(self.path, "a", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                lines.writerow(("step", "metric", "value"))
            lines.writerows((step, name, f"{value:.9g}") for step, metrics in rows for name, value in metrics.items())


class TensorBoardLogger(Logger):
    """Metrics in TensorBoard, through a writer of yours; wandb, MLflow and others have one that takes the same call.

    Args:
        writer: any object with add_scalar(name, value, step), such as `torch.utils.tensorboard.SummaryWriter`. It stays open.
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
            raise TypeError(f"writer must have add_scalar(name, value, step). Received: {type(writer).__name__}. "
                            "Pass a SummaryWriter, or an object with that method.")  # fmt: skip
        self.writer, self.prefix = writer, prefix

    def write(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Hand the metrics of some steps to the writer."""
        for step, metrics in rows:
            for name, value in metrics.items():
                self.writer.add_scalar(self.prefix + name, value, step)
        getattr(self.writer, "flush", lambda: None)()

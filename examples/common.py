"""What the examples share: data, command line, progress bar and picture. Nothing here is about SRA.

The training loops are not here: each example has its own.
"""

import argparse
import contextlib
import gzip
import signal
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import matplotlib
import numpy as np
import rich.progress

# --------------------------------------------------------------------------------------------------
# The data

Array = TypeVar("Array")  # of NumPy, or of a framework


class Data(NamedTuple, Generic[Array]):
    """Images [N, H, W, C] in [-1, 1], float32, with their labels [N], int32."""

    images: Array
    labels: Array
    held_out_images: Array  # not trained on
    held_out_labels: Array
    classes: list[str]  # the names of the labels


Images = Data[np.ndarray]


def load_data(settings: argparse.Namespace) -> Images:
    """The data that `--data` names."""
    if settings.data == "digits":
        return digits()
    if settings.data == "fashion-mnist":
        return fashion_mnist(Path(settings.data_dir))
    return image_folder(Path(settings.data), settings.image_size)


def digits() -> Images:
    """1,797 handwritten digits of 8x8 pixels, which come with scikit-learn."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # [1797, 64] from 0 to 16, [1797]
    images = pixels.reshape(-1, 8, 8, 1) * (255 / 16)
    return split(images, labels, [str(digit) for digit in range(10)])


CLOTHES = [
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Boot",
]


def fashion_mnist(folder: Path) -> Images:
    """60,000 + 10,000 pictures of clothes, 28x28 pixels: Xiao et al., 2017, arXiv 1708.07747."""
    return Data(
        images=scale(read_idx(folder, "train-images-idx3", header=16).reshape(-1, 28, 28, 1)),
        labels=read_idx(folder, "train-labels-idx1", header=8).astype("int32"),
        held_out_images=scale(
            read_idx(folder, "t10k-images-idx3", header=16).reshape(-1, 28, 28, 1)
        ),
        held_out_labels=read_idx(folder, "t10k-labels-idx1", header=8).astype("int32"),
        classes=CLOTHES,
    )


def read_idx(folder: Path, name: str, header: int) -> np.ndarray:
    """The bytes of one of MNIST's files, behind its header."""
    file = folder / f"{name}-ubyte.gz"
    if not file.is_file():
        raise ValueError(
            "Fashion-MNIST must lie in a folder as its four .gz files. "
            f"Received: {folder}, without {file.name}. "
            "Install the Debian package dataset-fashion-mnist, or give the folder with --data-dir."
        )
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def image_folder(folder: Path, size: int) -> Images:
    """Your images, cropped to a square in the middle and resized; the subfolder is the class."""
    from PIL import Image, ImageOps

    if not folder.is_dir():
        raise ValueError(
            "--data must be digits, fashion-mnist, or a folder of images with one subfolder per "
            f"class. Received: {str(folder)!r}, which is no folder. Check the spelling."
        )
    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 10:
        raise ValueError(
            "A folder of images must have one subfolder per class, and ten images at least. "
            f"Received: {folder} with {len(files)} images in subfolders. "
            "Put them in as FOLDER/CLASS/NAME.png or .jpg."
        )
    classes = sorted({file.parent.name for file in files})
    labels = [classes.index(file.parent.name) for file in files]
    pictures = [ImageOps.fit(Image.open(file).convert("RGB"), (size, size)) for file in files]
    return split(np.stack([np.asarray(picture) for picture in pictures]), np.array(labels), classes)


def split(images: np.ndarray, labels: np.ndarray, classes: list[str]) -> Images:
    """A fifth is held out: the same images whatever the run's seed."""
    order = np.random.default_rng(0).permutation(len(images))
    held_out, trained = np.split(order, [len(order) // 5])
    x = scale(images)
    y = labels.astype("int32")
    return Data(x[trained], y[trained], x[held_out], y[held_out], classes)


def scale(images: np.ndarray) -> np.ndarray:
    """From [0, 255] to [-1, 1]."""
    return images.astype("float32") / np.float32(127.5) - np.float32(1)


def batch_indices(count: int, step: int, settings: argparse.Namespace) -> np.ndarray:
    """Which of `count` images a step trains on [B].

    They follow from the seed and the step alone, so a resumed run sees them in the same order.
    """
    size = min(settings.batch_size, count)
    epoch, position = divmod(step, count // size)
    order = np.random.default_rng((settings.seed, epoch)).permutation(count)
    return order[position * size : (position + 1) * size]


# --------------------------------------------------------------------------------------------------
# The command line


def layer(text: str) -> int | float:
    """A block's number, or a fraction of the depth."""
    return int(text) if text.isdigit() else float(text)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with defaults, and the description as it was written."""


def command_line(
    description: str | None, name: str, teacher_layer: float = 0.7
) -> argparse.ArgumentParser:
    """The options that every example has. An example adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    add = parser.add_argument
    add(
        "--data",
        default="digits",
        help="digits, fashion-mnist, or a folder of images with one subfolder per class",
    )
    add(
        "--data-dir",
        default="/usr/share/datasets/fashion-mnist",
        help="where Fashion-MNIST's .gz files lie",
    )
    add("--image-size", type=int, default=32, help="images of a folder are resized to this")
    add("--out", type=Path, default=Path("runs") / name, help="folder of checkpoint and samples")
    add("--steps", type=int, default=1500, help="optimizer steps")
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--no-sra", dest="sra", action="store_false", help="train without SRA, all else equal")
    add("--student-layer", type=layer, default=0.25, help="a block from 1, or a fraction of depth")
    add("--teacher-layer", type=layer, default=teacher_layer, help="the same, of the teacher")
    add("--weight", type=float, default=0.5, help="weight of SRA's term")
    add("--max-gap", type=float, default=0.2, help="largest gap in time from student to teacher")
    add("--decay", type=float, default=0.999, help="decay of the EMA, reached after a warm-up")
    add("--label-dropout", type=float, default=0.1)
    add("--patch", type=int, help="side of a patch in pixels (default: 2, from 16 pixels on 4)")
    add("--width", type=int, default=96)
    add("--depth", type=int, default=8)
    add("--heads", type=int, default=4)
    add("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none")
    add("--sampling-steps", type=int, default=25)
    add("--save-every", type=int, default=500, help="steps from checkpoint to checkpoint")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--short", action="store_true", help="a tiny model for a few seconds, to see that it runs")
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None
) -> argparse.Namespace:
    """The settings. `--short` changes the defaults only: what is given still holds."""
    if parser.parse_args(arguments).short:
        parser.set_defaults(steps=20, width=32, depth=4, batch_size=32, sampling_steps=5)
    return parser.parse_args(arguments)


def model_sizes(data: Images, settings: argparse.Namespace) -> dict[str, int]:
    """The model's sizes for these images. Sets `settings.patch` where it was not given."""
    _, size, _, channels = data.images.shape
    if settings.patch is None:
        settings.patch = 2 if size < 16 else 4
    patch = settings.patch
    width = settings.width
    heads = settings.heads
    if size % patch or width % heads or width % 4:
        raise ValueError(
            "The patch must divide the side; heads, and 4, the width. "
            f"Received: patch {patch}, side {size}, heads {heads}, width {width}. "
            "Choose others, or another --image-size."
        )
    return {
        "size": size,
        "channels": channels,
        "classes": len(data.classes),
        "patch": patch,
        "width": width,
        "depth": settings.depth,
        "heads": heads,
    }


@contextlib.contextmanager
def errors_as_sentences() -> Iterator[None]:
    """A ValueError ends the program with its sentence, without a traceback."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


# --------------------------------------------------------------------------------------------------
# Resuming

FREE = {  # settings that may differ when a run is resumed: they do not change its numbers
    "out",
    "resume",
    "short",
    "steps",
    "save_every",
    "data_dir",
    "guidance",
    "sampling_steps",
}


def fixed_settings(settings: argparse.Namespace, **more: int) -> dict[str, Any]:
    """The settings that decide a run's numbers; a checkpoint holds them."""
    return {name: value for name, value in vars(settings).items() if name not in FREE} | more


def check_settings(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A run must be resumed with the settings it began with."""
    changed = [f"{name}={saved.get(name)}" for name in now if now[name] != saved.get(name)]
    if changed:
        raise ValueError(
            "A run is resumed with the settings it began with. "
            f"Received: others than {', '.join(changed)} in the checkpoint. "
            "Repeat those, or begin anew with another --out."
        )


def check_exists(checkpoint: Path) -> None:
    """There must be something to resume from."""
    if not checkpoint.exists():
        raise ValueError(
            f"--resume needs a checkpoint. Received: no file {checkpoint}. "
            "Train without --resume, or check --out."
        )


# --------------------------------------------------------------------------------------------------
# The progress bar


class Scalar(Protocol):
    """A loss, still on its device."""

    def __float__(self) -> float: ...


class Progress:
    """A progress bar with the losses beside it.

    Ctrl-C sets `interrupted` and does nothing else, so that the loop can end after its step.
    """

    def __init__(self, settings: argparse.Namespace, first_step: int) -> None:
        self.interrupted = False
        self.with_sra: bool = settings.sra
        self.losses = ""
        columns = rich.progress.Progress.get_default_columns()
        losses = rich.progress.TextColumn("{task.fields[losses]}")
        self.bar = rich.progress.Progress(*columns, losses)
        self.task = self.bar.add_task(
            "training", total=settings.steps, completed=first_step, losses=""
        )

    def __enter__(self) -> Self:
        self.handler_before = signal.signal(signal.SIGINT, self.interrupt)
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()
        signal.signal(signal.SIGINT, self.handler_before)

    def interrupt(self, *_: object) -> None:
        self.interrupted = True

    def show(self, step: int, denoising: Scalar, alignment: Scalar) -> None:
        """Move the bar to `step`, with new losses from time to time."""
        if step % 20 == 0:  # reading a loss waits for the device: not in every step
            self.losses = f"denoising {float(denoising):.3f}"
            if self.with_sra:
                self.losses += f", SRA {float(alignment):.3f}"
        self.bar.update(self.task, completed=step, losses=self.losses)


# --------------------------------------------------------------------------------------------------
# The picture of samples

ROWS = 20  # at most, one per class
COLUMNS = 10  # samples of each class


def sampling_inputs(data: Images) -> tuple[np.ndarray, np.ndarray]:
    """Noise [n, H, W, C] and labels [n] of the picture's samples, class by class."""
    classes = len(data.classes[:ROWS])
    labels = np.arange(classes).repeat(COLUMNS)
    shape = (len(labels), *data.images.shape[1:])
    noise = np.random.default_rng(0).standard_normal(shape, "float32")
    return noise, labels


def draw_samples(images: np.ndarray, classes: list[str], file: Path) -> None:
    """A picture of the samples [n, H, W, C] of `sampling_inputs`, one row per class."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    names = classes[:ROWS]
    images = np.clip((images + 1) / 2, 0, 1)
    size = (COLUMNS * 0.6 + 1.2, len(names) * 0.62)
    figure, axes = pyplot.subplots(len(names), 1, figsize=size, squeeze=False)
    for axis, name, row in zip(axes[:, 0], names, np.split(images, len(names)), strict=True):
        white_edge = ((0, 0), (0, 0), (0, 1), (0, 0))
        tiles = np.pad(row, white_edge, constant_values=1.0)  # [COLUMNS, H, W + 1, C]
        axis.imshow(np.concatenate(tiles, axis=1).squeeze(), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)

"""What the examples share and what is not about SRA: images, command line, the loop with its progress bar, the picture."""

import argparse
import gzip
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import matplotlib
import numpy as np
from rich.progress import Progress, TextColumn

# ------------------------------------------------------------------------------------------------------------------ the run


class Run:
    """One training run: everything that a checkpoint must hold. An example fills in what its framework does."""

    suffix: ClassVar[str] = ""  # of the checkpoint's file name

    def __init__(self, data: "Data", settings: argparse.Namespace) -> None:
        self.data, self.settings, self.step = data, settings, 0

    def training_step(self) -> tuple[Any, Any]:
        """One optimizer step. Returns the denoising loss and SRA's term."""
        raise NotImplementedError

    def sample(self, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Images [n, H, W, C] of the classes `labels` [n], from `noise` [n, H, W, C], by the EMA model."""
        raise NotImplementedError

    def write(self, file: Path) -> None:
        """Write everything that the next step depends on, `self.step` included."""
        raise NotImplementedError

    def read(self, file: Path) -> None:
        """Take back what `write` wrote."""
        raise NotImplementedError

    def save(self, file: Path) -> None:
        """At once: whatever happens, `file` is a whole checkpoint, the old one or the new one."""
        partial = file.with_suffix(".partial")
        self.write(partial)
        os.replace(partial, file)

    def load(self, file: Path) -> None:
        if not file.exists():
            raise ValueError(f"--resume needs a checkpoint. Received: no file {file}. Train without --resume, or check --out.")
        self.read(file)

    def fixed(self) -> dict[str, Any]:
        """The settings that decide a run's numbers: a checkpoint holds them."""
        return {name: value for name, value in vars(self.settings).items() if name not in FREE}

    def check_fixed(self, saved: dict[str, Any]) -> None:
        mine = self.fixed()
        changed = [f"{name}={saved.get(name)}" for name in mine if mine[name] != saved.get(name)]
        if changed:
            raise ValueError(f"A run is resumed with the settings it began with. Received: others than {', '.join(changed)} "
                             "in the checkpoint. Repeat those, or begin anew with another --out.")  # fmt: skip

    def chosen(self) -> np.ndarray:
        """Which images this step sees [B]; a function of seed and step alone, so that a resumed run sees the same order."""
        count, size = len(self.data.images), min(self.settings.batch_size, len(self.data.images))
        epoch, position = divmod(self.step, count // size)
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(count)
        return order[position * size : (position + 1) * size]


FREE = ("out", "resume", "short", "steps", "save_every", "data_dir", "guidance", "sampling_steps")


def train(run: Run, checkpoint: Path) -> bool:
    """Train to the last step, or to the end of the step in which Ctrl-C came. Returns whether it went to the last."""
    stop: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    losses = ""
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[losses]}")) as progress:
        bar = progress.add_task("training", total=run.settings.steps, completed=run.step, losses="")
        while run.step < run.settings.steps and not stop:
            denoising, alignment = run.training_step()
            if run.step % 20 == 0:  # reading a loss waits for the device: not in every step
                losses = f"denoising {float(denoising):.3f}" + f", SRA {float(alignment):.3f}" * run.settings.sra
            progress.update(bar, completed=run.step, losses=losses)
            if run.step % run.settings.save_every == 0:
                run.save(checkpoint)
    run.save(checkpoint)
    signal.signal(signal.SIGINT, before)
    return not stop


def start(settings: argparse.Namespace, checkpoint: Path, make: Callable[["Data", argparse.Namespace], Any]) -> Any:
    """The run that `make` gives for the data, new or as the checkpoint has it; and the folder it writes to."""
    try:
        run = make(load_data(settings), settings)
        if settings.resume:
            run.load(checkpoint)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    settings.out.mkdir(parents=True, exist_ok=True)
    return run


def finish(run: Run, checkpoint: Path) -> None:
    """Draw samples, and say where everything is."""
    picture = run.settings.out / "samples.png"
    draw_samples(run, picture)
    print(f"Checkpoint: {checkpoint}\nSamples:    {picture}")


def main(parser: argparse.ArgumentParser, kind: type[Run]) -> None:
    """Load the data, train or go on training, and draw samples."""
    settings = parse(parser)
    checkpoint = settings.out / f"checkpoint{kind.suffix}"
    run = start(settings, checkpoint, kind)
    if not train(run, checkpoint):
        raise SystemExit(f"Stopped at step {run.step}; the same command with --resume continues.")
    finish(run, checkpoint)


def draw_samples(run: Run, file: Path, columns: int = 10) -> None:
    """A picture of samples, one row per class."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    names = run.data.classes[:20]
    noise = np.random.default_rng(0).standard_normal((len(names) * columns, *run.data.images.shape[1:]), "float32")
    images = np.clip((run.sample(noise, np.arange(len(names)).repeat(columns)) + 1) / 2, 0, 1)
    figure, axes = pyplot.subplots(len(names), 1, figsize=(columns * 0.6 + 1.2, len(names) * 0.62), squeeze=False)
    for axis, name, row in zip(axes[:, 0], names, np.split(images, len(names)), strict=True):
        framed = np.pad(row, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=1.0)  # [columns, H, W + 1, C]
        axis.imshow(np.concatenate(framed, axis=1).squeeze(), cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------------- the data


class Data(NamedTuple):
    """Training and held-out images [N, H, W, C] in [-1, 1], float32, with labels [N], int32, and the names of the classes."""

    images: Any  # here and below: a NumPy array, or a framework's tensor
    labels: Any
    held_out_images: Any
    held_out_labels: Any
    classes: list[str]


def load_data(settings: argparse.Namespace) -> Data:
    if settings.data == "digits":
        return digits()
    if settings.data == "fashion-mnist":
        return fashion_mnist(Path(settings.data_dir))
    return image_folder(Path(settings.data), settings.image_size)


def digits() -> Data:
    """1,797 handwritten digits of 8x8 pixels, inside scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # [1797, 64] from 0 to 16, [1797]
    return split(images.reshape(-1, 8, 8, 1) * (255 / 16), labels, [str(digit) for digit in range(10)])


def fashion_mnist(folder: Path) -> Data:
    """60,000 + 10,000 pictures of clothes, 28x28 pixels: Xiao et al., 2017, arXiv 1708.07747."""
    names = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
    parts = []
    for part in ("train", "t10k"):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            file = folder / f"{part}-{kind}-ubyte.gz"
            if not file.is_file():
                raise ValueError(
                    f"Fashion-MNIST must lie in a folder as its four .gz files. Received: {folder}, without {file.name}. "
                    "Install the Debian package dataset-fashion-mnist, or say with --data-dir where the files are."
                )
            parts.append(np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header))
    images, labels, held_out_images, held_out_labels = parts
    scaled = (scale(part.reshape(-1, 28, 28, 1)) for part in (images, held_out_images))
    return Data(next(scaled), labels.astype("int32"), next(scaled), held_out_labels.astype("int32"), names)


def image_folder(folder: Path, size: int) -> Data:
    """Your images, cropped to a square in the middle and resized; the subfolder is the class."""
    from PIL import Image, ImageOps

    if not folder.is_dir():
        raise ValueError("--data must be digits, fashion-mnist, or a folder of images with one subfolder per class. "
                         f"Received: {str(folder)!r}, which is no folder. Check the spelling.")  # fmt: skip
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in suffixes)
    if len(files) < 10:
        raise ValueError(f"A folder of images must have one subfolder per class, and ten images at least. Received: {folder} "
                         f"with {len(files)} images in subfolders. Put them in as FOLDER/CLASS/NAME.png or .jpg.")  # fmt: skip
    names = sorted({file.parent.name for file in files})
    images = [np.asarray(ImageOps.fit(Image.open(file).convert("RGB"), (size, size))) for file in files]
    return split(np.stack(images), np.array([names.index(file.parent.name) for file in files]), names)


def split(images: np.ndarray, labels: np.ndarray, names: list[str], held_out: float = 0.2) -> Data:
    """A fifth is held out, the same whatever the seed of the run."""
    order = np.random.default_rng(0).permutation(len(images))
    held, rest = np.split(order, [int(held_out * len(order))])
    x, y = scale(images), labels.astype("int32")
    return Data(x[rest], y[rest], x[held], y[held], names)


def scale(images: np.ndarray) -> np.ndarray:
    return images.astype("float32") / np.float32(127.5) - np.float32(1)


# --------------------------------------------------------------------------------------------------------- the command line


def layer(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def command_line(description: str | None, name: str, teacher_layer: float = 0.7) -> argparse.ArgumentParser:
    """The options that every example has. One of its own is added by the example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Formatter)
    add = parser.add_argument
    add("--data", default="digits", help="digits, fashion-mnist, or a folder of images with one subfolder per class")
    add("--data-dir", default="/usr/share/datasets/fashion-mnist", help="where Fashion-MNIST's .gz files lie")
    add("--image-size", type=int, default=32, help="images of a folder are resized to this")
    add("--out", type=Path, default=Path("runs") / name, help="folder of the checkpoint and of samples.png")
    add("--steps", type=int, default=1500, help="optimizer steps")
    add("--batch-size", type=int, default=128)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--no-sra", dest="sra", action="store_false", help="train without SRA, all else equal")
    add("--student-layer", type=layer, default=0.25, help="after this block (from 1), or a fraction of the depth")
    add("--teacher-layer", type=layer, default=teacher_layer, help="the same, of the teacher")
    add("--weight", type=float, default=0.5, help="weight of SRA's term")
    add("--max-gap", type=float, default=0.2, help="the teacher is at most this much nearer to the data, in time")
    add("--decay", type=float, default=0.999, help="decay of the EMA, reached after a warm-up")
    add("--label-dropout", type=float, default=0.1)
    add("--patch", type=int, default=None, help="side of a patch in pixels (default: 2, from 16 pixels on 4)")
    add("--width", type=int, default=96)
    add("--depth", type=int, default=8)
    add("--heads", type=int, default=4)
    add("--guidance", type=float, default=1.0, help="classifier-free guidance of the samples; 1 is none")
    add("--sampling-steps", type=int, default=25)
    add("--save-every", type=int, default=500, help="steps from checkpoint to checkpoint")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--short", action="store_true", help="a few seconds: a tiny model, to see that everything runs")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    if parser.parse_args(arguments).short:  # other defaults; what is said on the command line still holds
        parser.set_defaults(steps=20, width=32, depth=4, batch_size=32, sampling_steps=5)
    return parser.parse_args(arguments)


def shape(data: Data, settings: argparse.Namespace) -> dict[str, int]:
    """The model's sizes for these images; decides the patch where the command line does not."""
    _, size, _, channels = data.images.shape
    settings.patch = settings.patch or (2 if size < 16 else 4)
    patch, width, depth, heads = (getattr(settings, name) for name in ("patch", "width", "depth", "heads"))
    if size % patch or width % heads or width % 4:
        raise ValueError(f"The patch must divide the side; heads, and 4, the width. Received: patch {patch}, side {size}, "
                         f"heads {heads}, width {width}. Choose others, or another --image-size.")  # fmt: skip
    return {"size": size, "channels": channels, "classes": len(data.classes), "patch": patch, "width": width, "depth": depth,
            "heads": heads}  # fmt: skip

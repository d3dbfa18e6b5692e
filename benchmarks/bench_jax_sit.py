"""What SRA costs in JAX at the papers' sizes, side by side in one run.

    python benchmarks/bench_jax_sit.py

Steps of the NNX example's SiT on 32x32x4 latents, jitted and donated:

    plain         the model's own training step
    selfalign     the same with SRA
    by hand       the method as the authors' code does it, with a float32 teacher (written here).
                  What it throws away of the teacher's forward, XLA does not compute: unlike in
                  PyTorch, only precision can make a difference

and their floor: the plain step times what the method adds at least, in FLOPs that XLA counts of the
teacher's first blocks, projector and distance, and EMA.

Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rounds import SIZES, Seconds, Size, Step, measure, ratio, show_against

import selfalign
from selfalign.adapters import jax as sra

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from jax_nnx_sit import PATH, SiT

OPTIMIZER = optax.adamw(1e-4)
Params = Any  # a pytree


class Batch(NamedTuple):
    """Latents and noise [B, H, W, 4], times [B] and labels [B]."""

    x0: jax.Array
    noise: jax.Array
    t: jax.Array
    y: jax.Array


def make_batch(count: int, side: int) -> Batch:
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (count, side, side, 4)
    return Batch(
        jax.random.normal(keys[0], shape),
        jax.random.normal(keys[1], shape),
        jax.random.uniform(keys[2], (count,)),
        jax.random.randint(keys[3], (count,), 0, 1000),
    )


def captured(model: SiT, *inputs: jax.Array) -> tuple[jax.Array, nnx.State]:
    """The model's prediction, and what its modules returned on the way."""
    return nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)(*inputs)


def block_output(captures: nnx.State, layer: int) -> jax.Array:
    """The tokens [B, N, D] after block `layer`, counted from 1."""
    return sra.tap(captures, f"blocks/{layer - 1}/__call__")


class Setting:
    """A model taken apart, its batch, and how its features come out."""

    def __init__(
        self, size: Size, loss: selfalign.SRALoss, count: int, dtype: str, side: int = 32
    ) -> None:
        self.width = size.width
        self.loss = loss
        self.dtype = dtype
        self.student_layer, self.teacher_layer = self.loss.layers(size.depth)
        model = SiT(side, 4, 1000, 2, size.width, size.depth, size.heads, nnx.Rngs(0))
        self.graph, self.params = nnx.split(nnx.view(model))
        self.batch = make_batch(count, side)

    def cast(self, params: Params) -> Params:
        """To the dtype in which the model computes."""
        return jax.tree.map(lambda p: p.astype(self.dtype), params)

    def forward(self, params: Params, *inputs: jax.Array) -> tuple[jax.Array, nnx.State]:
        """The prediction, and what the modules returned on the way."""
        return captured(nnx.merge(self.graph, self.cast(params)), *inputs)

    def target(self, params: Params, *inputs: jax.Array) -> jax.Array:
        _, captures = self.forward(params, *inputs)
        return block_output(captures, self.teacher_layer)

    def denoising(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The denoising loss, and the student's tokens."""
        x0, noise, t, y = batch
        prediction, captures = self.forward(params, PATH.add_noise(x0, noise, t), t, y)
        loss = jnp.mean((prediction - PATH.velocity(x0, noise, t)) ** 2)
        return loss, block_output(captures, self.student_layer)


# --------------------------------------------------------------------------------------------------
# The arms


class Trained(NamedTuple):
    """The parameters of the model and of the projector."""

    model: Params
    projector: Params


# (setting, teacher, trained, student's tokens, batch, key) -> the term
Term = Callable[[Setting, Any, Trained, jax.Array, Batch, jax.Array], jax.Array]


def no_term(
    setting: Setting, teacher: None, trained: Trained, tokens: jax.Array, batch: Batch, key: Any
) -> jax.Array:
    return jnp.zeros(())


def with_selfalign(
    setting: Setting,
    teacher: sra.Teacher,
    trained: Trained,
    tokens: jax.Array,
    batch: Batch,
    key: jax.Array,
) -> jax.Array:
    return sra.align(setting.loss, setting.target, teacher, *trained, tokens, *batch, key=key)


def by_hand(
    setting: Setting,
    teacher: sra.Teacher,
    trained: Trained,
    tokens: jax.Array,
    batch: Batch,
    key: jax.Array,
) -> jax.Array:
    x0, noise, t, y = batch
    t_teacher = jnp.maximum(t - 0.2 * jax.random.uniform(key, t.shape), 0)
    x_teacher = PATH.add_noise(x0, noise, t_teacher)
    model = nnx.merge(setting.graph, teacher.average)  # in float32
    _, captures = captured(model, x_teacher, t_teacher, y)
    target = jax.lax.stop_gradient(block_output(captures, setting.teacher_layer))
    target = target.astype("float32")
    projected = selfalign.project(trained.projector, tokens).astype("float32")
    norms = jnp.linalg.norm(projected, axis=-1) * jnp.linalg.norm(target, axis=-1)
    cosine = jnp.sum(projected * target, -1) / norms
    return 0.5 * (1 - cosine.mean())


ARMS: dict[str, Term] = {"plain": no_term, "selfalign": with_selfalign, "by hand": by_hand}


def compiled_step(setting: Setting, term: Term) -> tuple[Step, float]:
    """A step that carries its state along, and the FLOPs that XLA counts in it."""
    aligned = term is not no_term
    params = jax.tree.map(jnp.copy, setting.params)
    projector = sra.init_projector(jax.random.key(1), setting.width) if aligned else {}
    trained = Trained(params, projector)
    teacher = sra.init_teacher(setting.params) if aligned else None
    batch = setting.batch

    def step(trained: Trained, moments: Any, teacher: Any, batch: Batch, key: jax.Array) -> Any:
        def objective(trained: Trained) -> jax.Array:
            loss, tokens = setting.denoising(trained.model, batch)
            return loss + term(setting, teacher, trained, tokens, batch, key)

        updates, moments = OPTIMIZER.update(jax.grad(objective)(trained), moments, trained)
        trained = optax.apply_updates(trained, updates)
        if aligned:
            teacher = sra.update_teacher(setting.loss, teacher, trained.model)
        return trained, moments, teacher

    state = (trained, OPTIMIZER.init(trained), teacher)
    jitted = jax.jit(step, donate_argnums=(0, 1, 2))
    compiled = jitted.lower(*state, batch, jax.random.key(0)).compile()
    seeds = itertools.count()

    def run() -> None:
        nonlocal state
        key = jax.random.key(next(seeds))
        state = jax.block_until_ready(compiled(*state, batch, key))

    return run, compiled.cost_analysis()["flops"]


# --------------------------------------------------------------------------------------------------
# The floor


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """As XLA counts them."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def least_flops(setting: Setting) -> float:
    """FLOPs of what SRA needs.

    A teacher of its first blocks alone, projector and distance with their gradients, the EMA.
    """
    x0, _, t, y = setting.batch
    shorter = nnx.merge(setting.graph, setting.params)
    shorter.blocks = nnx.List(list(shorter.blocks)[: setting.teacher_layer])
    graph, params = nnx.split(shorter)

    def first_blocks(params: Params) -> jax.Array:
        _, captures = captured(nnx.merge(graph, setting.cast(params)), x0, t, y)
        return block_output(captures, setting.teacher_layer)

    def term(projector: Params, tokens: jax.Array, target: jax.Array) -> jax.Array:
        return sra.term(setting.loss, projector, tokens, target)

    projector = sra.init_projector(jax.random.key(0), setting.width)
    tokens = jnp.ones((len(x0), shorter.side**2, setting.width), setting.dtype)
    teacher = flops(first_blocks, params)
    gradients = flops(jax.grad(term, argnums=(0, 1)), projector, tokens, tokens)
    adamw = flops(OPTIMIZER.update, projector, OPTIMIZER.init(projector), projector)
    ema = 3 * sum(p.size for p in jax.tree.leaves(setting.params))
    return teacher + gradients + adamw + ema


# --------------------------------------------------------------------------------------------------
# The command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", default=["S", "B"], choices=SIZES)
    add("--batch", type=int, default=2)
    add("--rounds", type=int, default=7)
    add("--bf16", action="store_true", help="the models compute in bfloat16")
    add("--out", type=Path, default=Path("runs") / "bench")
    return parser.parse_args()


def report(
    title: str, seconds: Seconds, counted: dict[str, float], floor: float, console: Console
) -> None:
    show_against(console, title, seconds, "plain")
    others = {name: values for name, values in seconds.items() if name != "plain"}
    show_against(console, "The same", others, "by hand")
    for name, count in counted.items():
        relative = count / counted["plain"]
        console.print(f"{name}: {count / 1e9:.1f} GFLOPs, {relative:.3f} x plain")
    by_flops = counted["selfalign"] / counted["plain"] / floor
    by_time = ratio(seconds["selfalign"], seconds["plain"]).median / floor
    console.print(f"floor {floor:.3f}; selfalign / floor: FLOPs {by_flops:.3f}, time {by_time:.3f}")


def main() -> None:
    options = parse()
    console = Console()
    device = jax.devices()[0]
    dtype = "bfloat16" if options.bf16 else "float32"
    console.print(f"jax {jax.__version__}, {device.device_kind}, {dtype}")
    found = {}
    for name in options.sizes:
        loss = selfalign.SRALoss.preset(f"SiT-{name}/2")
        setting = Setting(SIZES[name], loss, options.batch, dtype)
        steps: dict[str, Step] = {}
        counted: dict[str, float] = {}
        for arm, term in ARMS.items():
            steps[arm], counted[arm] = compiled_step(setting, term)
        seconds = measure(steps, options.rounds, warm_up=2)
        floor = 1 + least_flops(setting) / counted["plain"]
        title = f"SiT-{name}/2 in Flax NNX, 256 tokens, batch {options.batch}: a training step"
        report(title, seconds, counted, floor, console)
        found[name] = {"seconds": seconds, "flops": counted, "floor": floor}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench_jax_sit.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

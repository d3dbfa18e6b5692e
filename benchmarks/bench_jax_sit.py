"""What SRA costs in JAX at the papers' sizes, side by side in one run: `python benchmarks/bench_jax_sit.py`.

Steps of the NNX example's SiT on 32x32x4 latents, jitted and donated:

    plain         the model's own training step
    selfalign     the same with SRA
    by hand       the method as the authors' code does it, with a float32 teacher (written here). What it throws away of the
                  teacher's forward, XLA does not compute: unlike in PyTorch, only precision can make a difference

and their floor: the plain step times what the method adds at least, in FLOPs that XLA counts of the teacher's first blocks,
projector and distance, and EMA.

Reference: Jiang et al., SRA, 2025, arXiv 2505.02831.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rounds import SIZES, Step, measure, show

import selfalign
from selfalign.adapters import jax as sra

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from jax_nnx_sit import PATH, SiT, block_output, captured

Batch = tuple[jax.Array, ...]
OPTIMIZER = optax.adamw(1e-4)


class Setting:
    """A model taken apart, its batch, and how its features come out."""

    def __init__(self, size: str, batch: int, dtype: Any) -> None:
        self.width, depth, heads = SIZES[size]
        self.loss, self.dtype = selfalign.SRALoss.preset(f"SiT-{size}/2"), dtype
        self.student_layer, self.teacher_layer = self.loss.layers(depth)
        model = nnx.view(SiT(32, 4, 1000, 2, self.width, depth, heads, nnx.Rngs(0)))
        self.graph, self.params = nnx.split(model)
        keys = jax.random.split(jax.random.key(0), 4)
        x0, noise = (jax.random.normal(key, (batch, 32, 32, 4)) for key in keys[:2])
        self.batch = x0, noise, jax.random.uniform(keys[2], (batch,)), jax.random.randint(keys[3], (batch,), 0, 1000)

    def forward(self, params: Any, x: jax.Array, t: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        return captured(nnx.merge(self.graph, jax.tree.map(lambda p: p.astype(self.dtype), params)), x, t, y)

    def target(self, params: Any, *inputs: jax.Array) -> jax.Array:
        return block_output(self.forward(params, *inputs)[1], self.teacher_layer)

    def denoising(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        x0, noise, t, y = batch
        prediction, captures = self.forward(params, PATH.add_noise(x0, noise, t), t, y)
        return jnp.mean((prediction - PATH.velocity(x0, noise, t)) ** 2), block_output(captures, self.student_layer)


Term = Callable[[Setting, Any, Any, jax.Array, Batch, jax.Array], jax.Array]


def no_term(setting: Setting, teacher: Any, trained: Any, tokens: jax.Array, batch: Batch, key: jax.Array) -> jax.Array:
    return jnp.zeros(())


def with_selfalign(setting: Setting, teacher: Any, trained: Any, tokens: jax.Array, batch: Batch, key: jax.Array) -> jax.Array:
    return sra.align(setting.loss, setting.target, teacher, *trained, tokens, *batch, key=key)


def by_hand(setting: Setting, teacher: Any, trained: Any, tokens: jax.Array, batch: Batch, key: jax.Array) -> jax.Array:
    x0, noise, t, y = batch
    t_teacher = jnp.maximum(t - 0.2 * jax.random.uniform(key, t.shape), 0)
    model = nnx.merge(setting.graph, teacher.average)
    captures = captured(model, PATH.add_noise(x0, noise, t_teacher), t_teacher, y)[1]
    target = jax.lax.stop_gradient(block_output(captures, setting.teacher_layer)).astype("float32")
    projected = selfalign.project(trained[1], tokens).astype("float32")
    cosine = jnp.sum(projected * target, -1) / (jnp.linalg.norm(projected, axis=-1) * jnp.linalg.norm(target, axis=-1))
    return 0.5 * (1 - cosine.mean())


ARMS: dict[str, Term] = {"plain": no_term, "selfalign": with_selfalign, "by hand": by_hand}


def compiled_step(setting: Setting, term: Term) -> tuple[Step, float]:
    """A step that carries its state along, and the FLOPs that XLA counts in it."""
    aligned = term is not no_term
    trained = (jax.tree.map(jnp.copy, setting.params), sra.init_projector(jax.random.key(1), setting.width) if aligned else {})
    teacher = sra.init_teacher(setting.params) if aligned else None

    def step(trained: Any, moments: Any, teacher: Any, batch: Batch, key: jax.Array) -> Any:
        def objective(trained: Any) -> jax.Array:
            loss, tokens = setting.denoising(trained[0], batch)
            return loss + term(setting, teacher, trained, tokens, batch, key)

        updates, moments = OPTIMIZER.update(jax.grad(objective)(trained), moments, trained)
        trained = optax.apply_updates(trained, updates)
        return trained, moments, sra.update_teacher(setting.loss, teacher, trained[0]) if aligned else None

    state = trained, OPTIMIZER.init(trained), teacher
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*state, setting.batch, jax.random.key(0)).compile()
    keys = iter(range(10**9))

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(*state, setting.batch, jax.random.key(next(keys))))

    return run, compiled.cost_analysis()["flops"]


def least(setting: Setting) -> float:
    """FLOPs of what SRA needs: a teacher of its first blocks alone, projector and distance with their gradients, the EMA."""
    x0, _, t, y = setting.batch
    shorter = nnx.merge(setting.graph, setting.params)
    shorter.blocks = nnx.List(list(shorter.blocks)[: setting.teacher_layer])
    graph, params = nnx.split(shorter)

    def first_blocks(params: Any) -> jax.Array:
        model = nnx.merge(graph, jax.tree.map(lambda p: p.astype(setting.dtype), params))
        return block_output(captured(model, x0, t, y)[1], setting.teacher_layer)

    def term(projector: Any, tokens: jax.Array, target: jax.Array) -> jax.Array:
        return sra.term(setting.loss, projector, tokens, target)

    projector = sra.init_projector(jax.random.key(0), setting.width)
    tokens = jnp.ones((len(x0), shorter.side**2, setting.width), setting.dtype)
    count = lambda function, *arguments: jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]  # noqa: E731
    gradients = count(jax.grad(term, argnums=(0, 1)), projector, tokens, tokens)
    adamw = count(OPTIMIZER.update, projector, OPTIMIZER.init(projector), projector)
    return count(first_blocks, params) + gradients + adamw + 3 * sum(p.size for p in jax.tree.leaves(setting.params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S", "B"], choices=SIZES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="the models compute in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs") / "bench")
    options = parser.parse_args()
    console, device, found = Console(), jax.devices()[0], {}
    console.print(f"jax {jax.__version__}, {device.device_kind}, {'bfloat16' if options.bf16 else 'float32'}")
    for size in options.sizes:
        setting = Setting(size, options.batch, "bfloat16" if options.bf16 else "float32")
        steps, flops = {}, {}
        for name, term in ARMS.items():
            steps[name], flops[name] = compiled_step(setting, term)
        seconds = measure(steps, options.rounds, warm_up=2)
        floor = 1 + least(setting) / flops["plain"]
        title = f"SiT-{size}/2 in Flax NNX, 256 tokens, batch {options.batch}: a training step"
        show(console, title, seconds, dict.fromkeys(seconds, "plain"))
        others = {name: values for name, values in seconds.items() if name != "plain"}
        show(console, "The same", others, dict.fromkeys(others, "by hand"))
        ratio = statistics.median(a / b for a, b in zip(seconds["selfalign"], seconds["plain"], strict=True))
        for name, count in flops.items():
            console.print(f"{name}: {count / 1e9:.1f} GFLOPs, {count / flops['plain']:.3f} x plain")
        counted = flops["selfalign"] / flops["plain"] / floor
        console.print(f"floor {floor:.3f}; selfalign / floor: FLOPs {counted:.3f}, time {ratio / floor:.3f}")
        found[size] = {"seconds": seconds, "flops": flops, "floor": floor}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench_jax_sit.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""optax's SAM over its own floor: JAX compiles the whole step, so its net, clock and floor are its own.

The floor is one compiled function: two gradients, each on a batch of its own so that they are not merged into one, and
a step of SGD. Times are CPU time of the process, with one thread.
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.nets import LR, MOMENTUM
from benchmarks.peers import RHO
from benchmarks.results import Spread, Table

LAYERS, WIDTH, CLASSES, BATCH = 200, 32, 10, 32


def installed() -> bool:
    """Whether optax can be run here."""
    return importlib.util.find_spec("optax") is not None


def _steps() -> tuple[str, dict[str, Callable[[], None]]]:
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    import jax
    import jax.numpy as jnp
    import optax
    from optax import contrib

    keys = jax.random.split(jax.random.PRNGKey(0), LAYERS + 3)
    bound = WIDTH**-0.5

    def layer(key: Any, out: int) -> tuple[Any, Any]:
        return jax.random.uniform(key, (WIDTH, out), minval=-bound, maxval=bound), jnp.zeros(out)

    start = [layer(key, WIDTH) for key in keys[:LAYERS]], layer(keys[LAYERS], CLASSES)
    x, other = (jax.random.normal(key, (BATCH, WIDTH)) for key in keys[LAYERS + 1 :])
    y = jnp.arange(BATCH) % CLASSES

    def loss(params: Any, x: Any) -> Any:
        layers, (weight, bias) = params
        for w, b in layers:
            x = x + 0.1 * jax.nn.relu(x @ w + b)
        return optax.softmax_cross_entropy_with_integer_labels(x @ weight + bias, y).mean()

    gradient = jax.grad(loss)
    sgd = optax.sgd(LR, momentum=MOMENTUM)
    climb = optax.chain(contrib.normalize(), optax.sgd(RHO))
    sam = contrib.sam(sgd, climb, sync_period=2, opaque_mode=True)

    def floor(params: Any, state: Any) -> tuple[Any, Any, Any]:
        updates, state = sgd.update(gradient(params, other), state, params)
        return optax.apply_updates(params, updates), state, gradient(params, x)

    def step(params: Any, state: Any) -> tuple[Any, Any, Any]:
        updates, state = sam.update(gradient(params, x), state, params, grad_fn=lambda p, _: gradient(p, x))
        return optax.apply_updates(params, updates), state, None

    def runner(function: Callable[[Any, Any], Any], state: Any) -> Callable[[], None]:
        compiled, held = jax.jit(function), [start, state]

        def run() -> None:
            held[0], held[1], rest = compiled(*held)
            jax.block_until_ready((held, rest))

        return run

    named = f"optax {optax.__version__}, jax {jax.__version__}"
    return named, {"floor": runner(floor, sgd.init(start)), "sam": runner(step, sam.init(start))}


def _seconds(run: Callable[[], None], repeats: int) -> float:
    best = math.inf
    for _ in range(repeats):
        begun = time.process_time()
        run()
        best = min(best, time.process_time() - begun)
    return best


def measure(rounds: int, repeats: int = 2) -> Table:
    """SAM and the floor as a control in turns, each between two samples of the floor.

    A sample is the fastest of `repeats` steps, as in `step`.
    """
    named, runs = _steps()
    for run in runs.values():
        for _ in range(3):
            run()
    table = Table(f"mlp200 in JAX ({named})", ("step", "x its own floor, median [IQR]", "p10", "ms, median"))
    clock = partial(_seconds, repeats=repeats)
    labels = {"A/A control (the floor)": "floor", "optax.contrib.sam": "sam"}
    samples: dict[str, list[tuple[float, float, float]]] = {label: [] for label in labels}
    order = random.Random(0)
    for _ in range(rounds):
        for label in order.sample(list(labels), len(labels)):
            samples[label].append((clock(runs["floor"]), clock(runs[labels[label]]), clock(runs["floor"])))
    for label, rows in samples.items():
        over = Spread.of([2 * b / (a + c) for a, b, c in rows])
        table.rows.append(
            (label, over.ratio(), f"{over.p10:.3f}", f"{Spread.of([b for _, b, _ in rows]).median * 1e3:.2f}")
        )
    return table

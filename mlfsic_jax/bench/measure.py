"""Times a case in turns with its reference, then in PyTorch; and what the machine reaches at best."""

import importlib.util
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Function = Callable[[], Any]

_SECONDS = 4.0  # of measuring, for each set of functions that take turns
_AT_LEAST = ("pytorch", "peak")


class Case(NamedTuple):
    """What to time, and beside what."""

    name: str  # what is measured, and its size
    function: Function
    references: Mapping[str, Function]  # one name -> one function
    work: float  # matrix products in multiply-adds x 2, or bytes read and written, that cannot be avoided
    kind: str = "mm"  # of work: "mm" or "copy"
    pytorch: tuple = ()  # a function of torch_reference and its arguments
    targets: Mapping[str, float] = {}  # a field of Row -> the highest value asked for, of _AT_LEAST the lowest
    per: float = 1  # multiplies the reference's time
    sizes: Mapping[int, Function] = {}  # size -> function, for a row about growth


class Row(NamedTuple):
    """One line of the table: a measured ``Case``."""

    name: str
    seconds: float  # the smallest of many times
    reference: str  # its name
    ratio: float  # seconds over the reference's
    work: float
    kind: str
    memory: int  # bytes, the highest resident so far; on an accelerator of its memory
    pytorch: dict[str, float]  # name of a PyTorch program -> its seconds over ours
    targets: dict[str, float]
    exponent: float | None = None  # of the power law that the sizes follow, if there are any
    peak: float | None = None  # the share of the machine's peak; added when all peaks are known

    def missed(self) -> list[str]:
        """The targets that this row misses, in words; the fastest PyTorch program counts."""
        found = self._asdict() | {"pytorch": min(self.pytorch.values(), default=None)}
        lines = []
        for field, limit in self.targets.items():
            at_least = field in _AT_LEAST
            if found[field] is not None and (found[field] < limit if at_least else found[field] > limit):
                asked = f"asked for at {'least' if at_least else 'most'} {limit:.3g}"
                lines.append(f"{self.name}: {field} {found[field]:.3g}, {asked}")
        return lines


def measure(case: Case, quick: bool) -> Row:
    """Times a case; ``quick``: few repeats and no targets, as tests want it."""
    budget = 0.0 if quick else _SECONDS
    ((reference, other),) = case.references.items()
    times = fastest({"": case.function, reference: other}, budget)
    seconds, exponent = times[""], None
    if case.sizes:
        by_size = fastest(case.sizes, 2 * budget)
        exponent = float(np.polyfit(np.log(list(by_size)), np.log(list(by_size.values())), 1)[0])
    held, unit = jax.devices()[0].memory_stats(), 1 if sys.platform == "darwin" else 1024
    memory = held["peak_bytes_in_use"] if held else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # After the memory, and not in turns with ours: PyTorch's threads go on spinning for a while, and take our cores.
    by_torch = {}
    if case.pytorch and has_torch():
        from mlfsic_jax.bench import torch_reference

        name, *arguments = case.pytorch
        by_torch = fastest(getattr(torch_reference, name)(*arguments), budget)
    return Row(
        *(case.name, seconds, reference, seconds / (case.per * times[reference]), case.work, case.kind, memory),
        pytorch={k: t / seconds for k, t in by_torch.items()},
        targets={} if quick else dict(case.targets),
        exponent=exponent,
    )


def fastest(functions: Mapping[Hashable, Function], budget: float) -> dict[Any, float]:
    """The shortest time of each function in seconds: called in turns for ``budget`` seconds, at least twice."""
    for function in functions.values():
        jax.block_until_ready(function())  # compiles
    shortest, end, rounds = dict.fromkeys(functions, math.inf), time.perf_counter() + budget, 0
    while functions and (rounds < 2 or time.perf_counter() < end):
        rounds += 1
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            shortest[name] = min(shortest[name], time.perf_counter() - start)
    return shortest


def has_torch() -> bool:
    """Whether PyTorch is there and would run on the device that JAX runs on."""
    return importlib.util.find_spec("torch") is not None and jax.default_backend() == "cpu"


def peaks(quick: bool) -> dict[str, float]:
    """What the machine can do at best: "mm" operations a second in a matrix product, "copy" bytes a second."""
    n, dtype = (2048, jnp.float32) if jax.default_backend() == "cpu" else (8192, jnp.bfloat16)
    n = 256 if quick else n
    matrix, array = jnp.ones((n, n), dtype), jnp.ones(n * n * 16, jnp.float32)
    # In place: new memory costs a CPU's kernel several times what the copy itself does.
    product, increase = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy():
        nonlocal array
        array = increase(array)
        return array

    times = fastest({"mm": lambda: product(matrix), "copy": copy}, 0.0 if quick else _SECONDS)
    return {"mm": 2 * n**3 / times["mm"], "copy": 2 * array.nbytes / times["copy"]}


def machine() -> str:
    """Processor or accelerator, cores and versions."""
    device, cpus = jax.devices()[0], Path("/proc/cpuinfo")
    name = device.device_kind
    if device.platform == "cpu":
        lines = cpus.read_text().splitlines() if cpus.exists() else []
        models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        name = next(models, platform.processor())
    versions = [f"jax {jax.__version__}"]
    if has_torch():
        import torch

        versions.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {', '.join(versions)}"

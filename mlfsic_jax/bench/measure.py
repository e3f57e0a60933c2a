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
    """What to time, and beside what.

    Attributes:
      name: what is measured, and its size.
      function: called with nothing.
      references: one name -> one function.
      work: matrix products in multiply-adds x 2, or bytes read and written, that cannot be avoided.
      kind: of ``work``: "mm" or "copy".
      pytorch: a function of ``torch_reference`` and its arguments, () for none.
      targets: what the project asks for: a field of ``Row`` -> its highest value, for ``_AT_LEAST`` the lowest.
      per: multiplies the reference's time.
      sizes: size -> function, for a row about growth.
    """

    name: str
    function: Function
    references: Mapping[str, Function]
    work: float
    kind: str = "mm"
    pytorch: tuple = ()
    targets: Mapping[str, float] = {}
    per: float = 1
    sizes: Mapping[int, Function] = {}


class Row(NamedTuple):
    """One line of the table: a measured ``Case``.

    Attributes:
      name, work, kind, targets: of the case.
      seconds: the smallest of many times.
      reference: its name.
      ratio: ``seconds`` over the reference's.
      memory: bytes, the highest resident so far; on an accelerator of its memory.
      pytorch: name of a PyTorch program -> its seconds over ``seconds``.
      exponent: of the power law that the sizes follow, if there are any.
      peak: the share of the machine's peak; added when all peaks are known.
    """

    name: str
    seconds: float
    reference: str
    ratio: float
    work: float
    kind: str
    memory: int
    pytorch: dict[str, float]
    targets: dict[str, float]
    exponent: float | None = None
    peak: float | None = None

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
    memory = peak_memory()  # before PyTorch is loaded
    # Not in turns with ours: its threads go on spinning for a while, and would take our cores.
    by_torch = fastest(torch_programs(*case.pytorch), budget)
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


def torch_programs(function: str = "", *arguments) -> dict[str, Function]:
    """Programs of ``torch_reference``; none where PyTorch is not installed, or where JAX runs on an accelerator."""
    if not function or not has_torch():
        return {}
    from mlfsic_jax.bench import torch_reference

    return getattr(torch_reference, function)(*arguments)


def has_torch() -> bool:
    """Whether PyTorch is there and would run on the device that JAX runs on."""
    return importlib.util.find_spec("torch") is not None and jax.default_backend() == "cpu"


def peak_memory() -> int:
    """Bytes: the highest that this process has held so far, on an accelerator in that one's memory."""
    held = jax.devices()[0].memory_stats()
    unit = 1 if sys.platform == "darwin" else 1024
    return held["peak_bytes_in_use"] if held else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peaks(quick: bool) -> dict[str, float]:
    """What the machine can do at best: "mm" operations a second in a matrix product, "copy" bytes a second."""
    on_cpu = jax.default_backend() == "cpu"
    n, dtype = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
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
    device = jax.devices()[0]
    name = device.device_kind
    cpus = Path("/proc/cpuinfo")
    if device.platform == "cpu":
        lines = cpus.read_text().splitlines() if cpus.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    versions = [f"jax {jax.__version__}"]
    if has_torch():
        import torch

        versions.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {', '.join(versions)}"

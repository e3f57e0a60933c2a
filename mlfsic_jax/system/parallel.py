"""Many devices and hosts: episodes and images are mapped over a one-dimensional mesh of all devices.

``pmapped`` is ``jit`` of ``jax.shard_map``, as ``jax.pmap`` itself is now. One device runs the same program.
"""

import collections
import contextlib
import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from mlfsic_jax.system.command import SIGNALS, defer_signals
from mlfsic_jax.system.errors import InputError

Item, Result = TypeVar("Item"), TypeVar("Result")
AXIS = "devices"
EPISODE_AXES = ("episodes", AXIS)  # of a training step: vmapped on each device, mapped over devices
SHARDED, REPLICATED = PartitionSpec(AXIS), PartitionSpec()


def launched() -> str:
    """Which process this is of those that were launched together, whether or not they join, as "i/n".

    It is JAX_PROCESS_ID of JAX_NUM_PROCESSES, or SLURM's task of a step (srun), as they stand; else 0/1.
    """
    for process, number in (("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if process in os.environ and number in os.environ:
            return f"{os.environ[process]}/{os.environ[number]}"
    return "0/1"


def start() -> None:
    """Joins the other processes of a run, if there are any. Call it before anything else touches JAX.

    JAX detects SLURM and TPU pods. Elsewhere, set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES
    and JAX_PROCESS_ID.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        number, process = (os.environ.get(name, "") for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        if not (number.isdecimal() and process.isdecimal() and int(process) < int(number)):
            given = f"JAX_NUM_PROCESSES={number} JAX_PROCESS_ID={process}"
            raise InputError(f"JAX_COORDINATOR_ADDRESS is set, with {given}: give a process from 0 to n-1 of n")
        number, process = int(number), int(process)
        jax.distributed.initialize(num_processes=number, process_id=process)
    # Not SLURM_NTASKS, which a shell in an allocation has too: alone there, a process would wait for others.
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process is the one that prints and writes files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def quiet_other_processes() -> Iterator[None]:
    """Silences every process but the first inside the block; errors still end them with a traceback."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield


def wait_for_all() -> None:
    """Blocks until every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("wait_for_all")


def signals() -> tuple[int, ...]:
    """The signals that interrupt this process at once; with several processes JAX passes SIGTERM on to all."""
    return SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)


@contextlib.contextmanager
def stop_requests(note: str) -> Iterator[Callable[[int], bool]]:
    """Defers SIGTERM, and on a single host SIGINT, to the end of a step that is the same in every process.

    Prints ``note`` when a signal arrives, and yields ``asked(step)``, to call after every step: once it returns True,
    save and leave the block. After a signal on a single host the block ends with ``KeyboardInterrupt``.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
    else:
        with defer_signals(note) as received:
            yield lambda step: received()


@functools.cache
def mesh(devices: tuple[jax.Device, ...] | None = None) -> jax.sharding.Mesh:
    """Some devices along one axis; by default all of all hosts."""
    n = len(devices or jax.devices())
    return jax.make_mesh((n,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


@functools.lru_cache(maxsize=64)
def pmapped(
    fn: Callable, *static: Any, specs: tuple, out_specs: Any = SHARDED, donate: tuple[int, ...] = ()
) -> Callable:
    """``jit(shard_map(fn))``: every device runs ``fn(*static, *arrays)`` on its shard.

    ``fn`` is a module-level function and ``static`` are hashable: it is compiled once. ``specs`` are ``SHARDED`` (along
    the first axis) or ``REPLICATED`` for each array, ``out_specs`` for the results. Results may reuse the memory of the
    arrays at the positions ``donate``. Gradients are per device (``check_vma`` is off): take their ``mean``.
    """
    mapped = jax.shard_map(
        functools.partial(fn, *static), mesh=mesh(), in_specs=specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donate)


def mean(tree: Any) -> Any:
    """The mean over all devices, inside ``pmapped``."""
    # On one device XLA would still copy every array: a quarter of a training step on a CPU.
    return tree if jax.lax.axis_size(AXIS) == 1 else jax.lax.pmean(tree, AXIS)


def replicate(tree: Any) -> Any:
    """Puts a pytree, the same in every process, on every device."""

    def put(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):  # device_put rejects keys for other hosts
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        where = NamedSharding(mesh(), REPLICATED)
        if isinstance(x, jax.Array) and x.sharding == where:  # an equivalent one would compile programs twice
            return x
        return jax.device_put(np.asarray(x), where)

    return jax.tree.map(put, tree)


def share(n_rows: int) -> slice:
    """The rows that this process reads of ``n_rows``, a multiple of the number of devices."""
    per_process = n_rows // jax.process_count()
    return slice(jax.process_index() * per_process, (jax.process_index() + 1) * per_process)


def shard(local: Any) -> Any:
    """Turns this process's ``share`` of some arrays into arrays sharded over all devices."""
    sharding = NamedSharding(mesh(), SHARDED)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), local)


def devices_here() -> tuple[jax.Device, ...]:
    """The devices for programs that this process runs alone: its own, of which one stands for all cores of a CPU."""
    return tuple(jax.local_devices()[: 1 if jax.default_backend() == "cpu" else None])


def replicate_here(tree: Any) -> Any:
    """Puts a pytree, which may be ``replicate``'s, on each of ``devices_here``."""
    local = jax.tree.map(lambda x: x if getattr(x, "is_fully_addressable", True) else np.asarray(x), tree)
    devices = devices_here()
    return jax.device_put(local, devices[0] if len(devices) == 1 else NamedSharding(mesh(devices), REPLICATED))


def shard_here(array: np.ndarray) -> np.ndarray | jax.Array:
    """Shards an array along its first axis over ``devices_here``, where they are several."""
    devices = devices_here()  # a program takes the array to where its other arrays are, sooner than device_put does
    return array if len(devices) == 1 else jax.device_put(array, NamedSharding(mesh(devices), SHARDED))


def gather(tree: Any) -> Any:
    """Sharded arrays -> whole NumPy arrays in every process."""
    several = jax.process_count() > 1
    return multihost_utils.process_allgather(tree, tiled=True) if several else jax.device_get(tree)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch(
    read: Callable[[Item], Result], items: Iterable[Item], *, readers: int = 1, ahead: int = 2
) -> Iterator[Result]:
    """Yields ``map(read, items)`` in order, while ``readers`` threads read the next, ``ahead`` results at most."""
    threads = ThreadPoolExecutor(readers)
    try:
        remaining = iter(items)
        pending = collections.deque(threads.submit(read, item) for item in itertools.islice(remaining, ahead))
        while pending:
            yield pending.popleft().result()
            pending.extend(threads.submit(read, item) for item in itertools.islice(remaining, 1))
    finally:
        threads.shutdown(cancel_futures=True)  # whoever interrupts waits for what has begun only


def prefetch_batches(compute: Callable[[list[Item]], Result], items: Iterable[Item], batch: int) -> Iterator[Result]:
    """``prefetch`` of ``compute`` for lists of ``batch`` items, the last of which may be shorter.

    XLA computes few photos on one core: there is a thread for each, and two that read meanwhile. Some keep a GPU busy.
    """
    remaining, n = iter(items), cores() + 2 if jax.default_backend() == "cpu" else 16
    batches = iter(lambda: list(itertools.islice(remaining, batch)), [])
    return prefetch(compute, batches, readers=n, ahead=2 * n)

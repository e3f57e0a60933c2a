"""Many devices and many hosts: episodes and images are mapped over a one-dimensional mesh of all devices.

"pmapped" here is ``jit`` of ``jax.shard_map``, which is what ``jax.pmap`` itself has become. On one device it is the
same program; there is no second path.
"""

from __future__ import annotations

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
from jax.sharding import NamedSharding, PartitionSpec

from mlfsic_jax.system.command import SIGNALS, defer_signals

Item, Result = TypeVar("Item"), TypeVar("Result")
AXIS = "devices"
EPISODE_AXES = ("episodes", AXIS)  # a training step's: vmapped on each device, and mapped over devices
SHARDED, REPLICATED = PartitionSpec(AXIS), PartitionSpec()


def start() -> None:
    """Joins the other processes of a run, where there are any; call it before anything else touches JAX.

    Under SLURM and on TPU pods JAX finds them by itself. Elsewhere the environment says where: JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        number, process = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(num_processes=number, process_id=process)
    elif int(os.environ.get("SLURM_NTASKS", 1)) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def is_first() -> bool:
    """Whether this process writes the files and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def quiet_other_processes() -> Iterator[None]:
    """Only the first process prints; the others speak up when they fail."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("wait_for_all")


def signals() -> tuple[int, ...]:
    """The signals that interrupt this process at once; of several processes' SIGTERM JAX tells all of them."""
    return SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)


@contextlib.contextmanager
def stop_requests(note: str) -> Iterator[Callable[[int], bool]]:
    """SIGTERM, and on a single host SIGINT, wait for the end of a step, the same in every process.

    What it yields is asked after every step, ``asked(step)``; once it is True, save and leave.

    Args:
      note: is printed when a signal comes.

    Raises:
      KeyboardInterrupt: at the end, after a signal.
    """
    if jax.process_count() == 1:
        with defer_signals(note) as received:
            yield lambda step: received()
        return
    from jax.experimental.multihost_utils import reached_preemption_sync_point

    yield reached_preemption_sync_point


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """All devices of all hosts in a row."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


@functools.lru_cache(maxsize=64)
def pmapped(
    fn: Callable, *static: Any, specs: tuple, out_specs: Any = SHARDED, donate: tuple[int, ...] = ()
) -> Callable:
    """``jit(shard_map(fn))``: every device runs ``fn`` on its share.

    Gradients inside ``fn`` are those of every device's own part (``check_vma`` is off): take their ``mean``.

    Args:
      fn: called with ``static`` and then the arrays. A module-level function, so that it is compiled once.
      *static: hashable values.
      specs: for each array argument, ``SHARDED`` along its first axis or ``REPLICATED``.
      out_specs: the same for the results.
      donate: positions of arrays whose memory the results may take.
    """
    mapped = jax.shard_map(
        functools.partial(fn, *static), mesh=mesh(), in_specs=specs, out_specs=out_specs, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donate)


def mean(tree: Any) -> Any:
    """The average over all devices, inside of ``pmapped``."""
    # Of one device too, XLA would copy all arrays, on a CPU for a quarter of a training step.
    return tree if jax.lax.axis_size(AXIS) == 1 else jax.lax.pmean(tree, AXIS)


def replicate(tree: Any) -> Any:
    """A pytree of equal values in every process, put on every device."""

    def put(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):  # device_put does not know keys on other hosts' devices
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        return jax.device_put(np.asarray(x), NamedSharding(mesh(), REPLICATED))

    return jax.tree.map(put, tree)


def share(n_rows: int) -> slice:
    """Which of ``n_rows`` rows, a multiple of the number of devices, this process has to read."""
    per_process = n_rows // jax.process_count()
    return slice(jax.process_index() * per_process, (jax.process_index() + 1) * per_process)


def shard(local: Any) -> Any:
    """This process's ``share`` of some arrays -> arrays that are split over all devices."""
    sharding = NamedSharding(mesh(), SHARDED)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), local)


def shard_here(array: np.ndarray) -> jax.Array:
    """An array that is split along its first axis over this process's devices, for programs that it runs alone."""
    own = jax.make_mesh(
        (jax.local_device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.local_devices()
    )
    return jax.device_put(array, NamedSharding(own, SHARDED))


def gather(tree: Any) -> Any:
    """Split arrays as whole NumPy arrays in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(tree, tiled=True)


def prefetch(
    read: Callable[[Item], Result], items: Iterable[Item], *, readers: int = 1, ahead: int = 2
) -> Iterator[Result]:
    """``map(read, items)``, in whose order threads read the next ones while the caller and the devices work.

    Args:
      read: may be called for several items at once.
      items: what to read.
      readers: threads.
      ahead: how many results are held at most.
    """
    with ThreadPoolExecutor(readers) as threads:
        remaining = iter(items)
        pending = collections.deque(threads.submit(read, item) for item in itertools.islice(remaining, ahead))
        while pending:
            yield pending.popleft().result()
            pending.extend(threads.submit(read, item) for item in itertools.islice(remaining, 1))

"""Settings for every test: JAX on the CPU, cached and cheaply compiled programs, a folder of its own, no network."""

import contextlib
import ipaddress
import os
import socket
import tempfile
from pathlib import Path

import hypothesis
import jax
import pytest

ROOT = Path(__file__).parents[1]

# JAX's own as settings of this process and, like the others, for the programs that tests start.
for name, value in {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": str(ROOT / "tests" / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_traceback_in_locations_limit": 0,  # programs are lowered faster
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
os.environ["MLFSIC_SHARED"] = str((ROOT / os.environ.get("MLFSIC_SHARED", "../shared")).resolve())
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

hypothesis.settings.register_profile(
    "mlfsic", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("mlfsic")

# Each of them makes compilation faster.
UNOPTIMISED = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"
)
# Files that share a run are run by one process, which makes it once.
TOGETHER = {
    "own photos": ("run/test_classifier", "run/test_photos", "run/test_saved", "run/test_export", "tests/test_predict"),
    "undisturbed": ("run/test_loop", "run/test_workdir", "run/test_experiment"),
}
# The files that take longest. Each is run by one of two processes: begun first, they end together.
LONG = (
    *TOGETHER["own photos"],
    *("system/test_parallel", "tests/test_whole_program", *TOGETHER["undisturbed"], "tests/test_notebooks"),
    *("methods/test_contract", "run/test_evaluate", "bench/test_benchmark", "report/test_page"),
    *("paper/test_reproduce", "run/test_step", "tests/test_readme", "tests/test_goldens", "tests/test_new_method"),
)


def pytest_configure(config):
    """Compiles cheaply, before XLA starts; slow tests and launch/torture.sh run the programs that users run."""
    optimised = "MLFSIC_OPTIMISED" in os.environ or "not slow" not in config.option.markexpr
    flags = os.environ.get("XLA_FLAGS", "")
    if not optimised and UNOPTIMISED not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {UNOPTIMISED}".strip()


def pytest_collection_modifyitems(items):
    """Puts the longest files first."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(named(item.nodeid), len(LONG)))


def named(nodeid):
    """The file of a test as in ``LONG``: its folder and its name."""
    file = Path(nodeid.partition("::")[0])
    return f"{file.parent.name}/{file.stem}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each process a file at a time, or all of the files that share a run."""
    from xdist.scheduler import LoadFileScheduling

    group_of = {file: group for group, files in TOGETHER.items() for file in files}

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return group_of.get(named(nodeid), named(nodeid))

    return Together(config, log)


@contextlib.contextmanager
def elsewhere():
    """A new working folder with nothing but configs/: no test sees the data, caches and runs of the one it began in."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.symlink(ROOT / "configs", "configs")
        yield


@pytest.fixture(scope="session", autouse=True)
def fixtures_run_elsewhere():
    """For fixtures of modules and of the session, which are made before a test's own."""
    with elsewhere():
        yield


@pytest.fixture(autouse=True)
def tests_run_elsewhere(fixtures_run_elsewhere):
    """For each test, so that none sees what another leaves."""
    with elsewhere():
        yield


@pytest.fixture(scope="session")
def shared():
    """The folder of real inputs beside the project."""
    folder = Path(os.environ["MLFSIC_SHARED"])
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set MLFSIC_SHARED to the one that holds data/, weights/ and vectors/")
    return folder


@pytest.fixture(scope="session")
def frozen(tmp_path_factory):
    """A run on made-up photos with a frozen backbone, in which every method was evaluated: config and workdir."""
    from tests.own_photos import folder_run

    return folder_run(tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="session")
def model(frozen):
    """The run of ``frozen``, loaded."""
    from mlfsic_jax.run.saved import load

    return load(frozen[1])


def is_local(host) -> bool:
    """Whether an address is this machine's own."""
    host = host.decode() if isinstance(host, bytes) else host
    try:
        own = host in (None, "", "localhost", socket.gethostname())
        return own or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # a name
        return False


@pytest.fixture(scope="session")
def guarded_sockets():
    """Every attempt of this process to reach or look up another machine fails and is noted here."""
    attempts = []

    def guard(function, address_of):
        def guarded(*arguments, **options):
            address = address_of(*arguments, **options)
            if is_local(address):
                return function(*arguments, **options)
            attempts.append(address)
            raise OSError(f"a test tried to reach {address}: tests have no network")

        return guarded

    def of_socket(sock, address, *_):
        return address[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else None

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guard(getattr(socket.socket, name), of_socket))
        for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
            patch.setattr(socket, name, guard(getattr(socket, name), lambda host, *_, **__: host))
        yield attempts


@pytest.fixture(autouse=True)
def no_network(guarded_sockets):
    """No test reaches another machine, not even where the program would pass over the failure."""
    guarded_sockets.clear()
    yield guarded_sockets
    assert not guarded_sockets, f"it tried to reach {', '.join(map(str, guarded_sockets))}"

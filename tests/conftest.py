"""JAX on the CPU with a cache of compiled programs, reproducible hypothesis runs, and the folder of real inputs."""

import ipaddress
import os
import socket
from pathlib import Path

import hypothesis
import jax
import pytest

for name, value in {
    "jax_platforms": "cpu",
    "jax_compilation_cache_dir": str(Path(__file__).parent / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the programs that tests start

hypothesis.settings.register_profile(
    "mlfsic", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("mlfsic")

LONG = (
    *("test_parallel", "test_whole_program", "test_train", "test_notebooks", "test_torture", "test_peers"),
    *("test_benchmark", "test_report", "test_predict", "test_export", "test_reproduce", "test_fuzz"),
)


def pytest_collection_modifyitems(items):
    """The files that take minutes come first: where each file is run by one of two processes, both end together."""
    items.sort(key=lambda item: (*LONG, item.path.stem).index(item.path.stem))


@pytest.fixture(scope="session")
def shared():
    """The folder of real inputs beside the project."""
    folder = Path(os.environ.get("MLFSIC_SHARED", "../shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set MLFSIC_SHARED to the one that holds data/, weights/ and vectors/")
    return folder


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

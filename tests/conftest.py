"""JAX on the CPU with a cache of compiled programs, reproducible hypothesis runs, and the folder of real inputs."""

import os
from pathlib import Path

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

hypothesis.settings.register_profile(
    "mlfsic", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("mlfsic")


@pytest.fixture(scope="session")
def shared():
    """The folder of real inputs beside the project."""
    folder = Path(os.environ.get("MLFSIC_SHARED", "../shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set MLFSIC_SHARED to the one that holds data/, weights/ and vectors/")
    return folder

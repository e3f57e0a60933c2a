"""Fetches and unpacks what a run needs from the official places: VOC, COCO, GloVe and backbone weights.

A download goes on where it stopped, counts only when its size and sha256 are right, and is unpacked without any of its
members leaving the folder. Nothing here runs unless the user asked for a download.
"""

from __future__ import annotations

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
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import lock
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import expand, reason

_MB = 10**6


class Asset(NamedTuple):
    """A published file.

    Attributes:
      url: where it comes from, http(s) or file.
      filename: what it is called in the folder.
      sha256: hex digest or its first digits; None if none is published, then the digest found is printed.
      size: in bytes; None if unknown.
      members: what is unpacked of an archive, patterns as in ``unpack``; empty: the file is used as it is.
      into: subfolder that it is unpacked in.
      unpacked: about how many bytes its members take.
      licence: a few words, shown before a download.
    """

    url: str
    filename: str
    sha256: str | None = None
    size: int | None = None
    members: tuple[str, ...] = ()
    into: str = ""
    unpacked: int = 0
    licence: str = ""


def _voc(path: str, year: str, sha256: str, size: int) -> Asset:
    return Asset(
        url=f"http://host.robots.ox.ac.uk/pascal/VOC/{path}",
        filename=path.rsplit("/", 1)[1],
        sha256=sha256,
        size=size,
        members=tuple(f"VOCdevkit/VOC{year}/{part}/*" for part in ("Annotations", "ImageSets/Main", "JPEGImages")),
        unpacked=size,
        licence="photos from Flickr under their owners' terms",
    )


def _coco(path: str, sha256: str, size: int, members: tuple[str, ...], unpacked: int) -> Asset:
    return Asset(
        url=f"http://images.cocodataset.org/{path}",
        filename=path.rsplit("/", 1)[1],
        sha256=sha256,
        size=size,
        members=members,
        into="coco",
        unpacked=unpacked,
        licence="photos from Flickr under their owners' terms, annotations CC BY 4.0",
    )


# Digests and sizes of VOC and COCO are those in TensorFlow Datasets' url_checksums; that of GloVe is GluonNLP's.
ASSETS: dict[str, tuple[Asset, ...]] = {
    "voc": (
        _voc(
            "voc2007/VOCtrainval_06-Nov-2007.tar",
            "2007",
            "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
            460_032_000,
        ),
        _voc(
            "voc2007/VOCtest_06-Nov-2007.tar",
            "2007",
            "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
            451_020_800,
        ),
        _voc(
            "voc2012/VOCtrainval_11-May-2012.tar",
            "2012",
            "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
            1_999_639_040,
        ),
    ),
    "coco": (
        _coco(
            "annotations/annotations_trainval2014.zip",
            "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
            252_872_794,
            ("annotations/instances_train2014.json", "annotations/instances_val2014.json"),
            500 * _MB,
        ),
        _coco(
            "zips/train2014.zip",
            "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
            13_510_573_713,
            ("train2014/*",),
            13_510_573_713,
        ),
        _coco(
            "zips/val2014.zip",
            "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
            6_645_013_297,
            ("val2014/*",),
            6_645_013_297,
        ),
    ),
    "glove": (
        Asset(
            url="https://nlp.stanford.edu/data/glove.6B.zip",
            filename="glove.6B.zip",
            sha256="617afb2fe6cbd085c235baf7a465b96f4112bd7f7ccb2b2cbd649fed9cbcf2fb",
            size=862_182_613,
            members=tuple(f"glove.6B.{d}d.txt" for d in (50, 100, 200, 300)),
            unpacked=2250 * _MB,
            licence="Public Domain Dedication and License 1.0",
        ),
    ),
}


def weights(url: str, sha256: str, licence: str = "") -> Asset:
    """A file of published weights, which is stored under the last part of its address.

    Args:
      url: where it comes from.
      sha256: hex digest or its first digits, see ``backbones.WeightsFile``.
      licence: a few words, shown before a download.

    Returns:
      The asset.
    """
    return Asset(url=url, filename=url.rsplit("/", 1)[1], sha256=sha256, licence=licence)


def fetch_and_unpack(assets: Iterable[Asset], folder: str | os.PathLike[str], **options: float) -> None:
    """Brings assets into a folder: archives unpacked, other files as they are. What is there already stays.

    VOC becomes ``VOCdevkit/VOC2007`` and ``VOCdevkit/VOC2012``, COCO ``coco/train2014``, ``coco/val2014`` and
    ``coco/annotations``, GloVe ``glove.6B.300d.txt`` and its smaller siblings. Once unpacked, archives may be deleted.

    Args:
      assets: e.g. ``ASSETS["voc"]``, or ``weights(..)`` of each file of a backbone.
      folder: made if it is not there.
      **options: timeout, retries and backoff of ``fetch``.

    Raises:
      InputError: too little disk space, or as ``fetch`` and ``unpack``.
    """
    folder = expand(folder)
    with _one_line(folder):
        missing = [asset for asset in assets if not _is_unpacked(asset, folder)]
        folder.mkdir(parents=True, exist_ok=True)
        _need_space(missing, folder)
    archives = []
    for asset in missing:
        path = fetch(asset, folder, **options)
        if asset.members:
            unpack(path, folder / asset.into, wanted=asset.members)
            archives.append(path.name)
    if archives:
        _say(f"unpacked in {folder}; {', '.join(archives)} can be deleted there")


def fetch(
    asset: Asset,
    folder: str | os.PathLike[str],
    *,
    timeout: float = 30.0,
    retries: int = 5,
    backoff: float = 1.0,
) -> pathlib.Path:
    """Downloads a file, or goes on with ``<filename>.part``; a file that is there is only checked.

    Args:
      asset: what to download.
      folder: where to; made if it is not there.
      timeout: seconds without a byte after which the connection counts as stalled.
      retries: how often in a row it tries again without getting on by a megabyte.
      backoff: seconds before the first of these; doubled for each further one.

    Returns:
      The file, whose size and sha256 are the published ones.

    Raises:
      InputError: the file cannot be had, is not the published one, or cannot be written.
    """
    path = expand(folder) / asset.filename
    with _one_line(path.parent):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(path.parent):
                if not path.exists():  # another process may have fetched it meanwhile
                    _download(asset, path, timeout, retries, backoff)
                    return path
        if difference := _difference(asset, path):
            raise InputError(f"{path} is not the published file: {difference}. Move it away; {asset.url} is it")
    return path


def unpack(archive: str | os.PathLike[str], folder: str | os.PathLike[str], *, wanted: Sequence[str] = ("*",)) -> None:
    """Unpacks a .zip or an uncompressed .tar, unless it was unpacked there before.

    The members are written to a scratch folder and moved to their places when all are there; they replace files of
    the same name. Members that are links or devices are refused, and names that lead out of the folder.

    Args:
      archive: the file.
      folder: where to; made if it is not there.
      wanted: patterns of the members to unpack, in which ``*`` stands for any characters, slashes too.

    Raises:
      InputError: the archive is damaged or unsafe, lacks something that is wanted, or does not fit on the disk.
    """
    archive, folder = pathlib.Path(archive), expand(folder)
    scratch = folder / f".unpacking-{archive.name}"
    with _one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if _unpacked_files(archive.name, folder, wanted):  # another process may have done it meanwhile
                return
            shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted run left
            try:
                names = _extract(archive, scratch, wanted)
                _merge(scratch, folder)
                _stamp(archive.name, folder).write_text("\n".join([_key(wanted), *names]), **_STAMP_ENCODING)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)


# --- download


def _download(asset: Asset, path: pathlib.Path, timeout: float, retries: int, backoff: float) -> None:
    part = path.with_name(f"{path.name}.part")
    _say(f"{asset.url} -> {path}" + (f" ({asset.licence})" if asset.licence else ""))
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
                    f"in {part}, or get the file otherwise and put it at {path}"
                ) from error
            wait = backoff * 2 ** (failures - 1)
            _say(f"{asset.filename}: {error}; trying again in {wait:g} s")
            time.sleep(wait)
    difference = _difference(asset, part)
    _validator_file(part).unlink(missing_ok=True)
    if difference:
        part.unlink()
        raise InputError(
            f"what came from {asset.url} is not the published file: {difference}. "
            "It was deleted; run again to fetch it anew"
        )
    os.replace(part, path)


def _receive_rest(asset: Asset, part: pathlib.Path, timeout: float) -> None:
    """Appends to the partial file what it lacks, by one request.

    Raises:
      ConnectionError: it is not complete, and another attempt may help.
    """
    have = _size(part)
    if have and have == asset.size:
        return
    validator_file = _validator_file(part)
    validator = validator_file.read_text(encoding="latin-1") if validator_file.exists() else ""
    request = urllib.request.Request(asset.url, headers={"User-Agent": "mlfsic_jax"})
    # Pieces of two editions of a file would go unnoticed if there were neither a validator nor a digest.
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
            raise InputError(
                f"{asset.url} holds {total} bytes, expected {asset.size}: this is not the published file; "
                f"get it otherwise and put it at {part.with_suffix('')}"
            )
        expected = total if asset.size is None else asset.size
        # A server that does not know ranges, or whose file has changed, answers 200 and sends everything.
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
    """Writes what comes, yields once for each megabyte and for the rest; stops when all that is expected is there."""
    received = reported = 0
    while expected is None or file.tell() < expected:
        try:
            piece = response.read1(1 << 17)  # what is there, so that a stall costs nothing that came before it
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"the connection broke ({_reason(error)})") from error
        if not piece:
            break
        file.write(piece)
        received += len(piece)
        while received - reported >= _MB:
            reported += _MB
            yield
    if received > reported:
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
        raise ConnectionError(f"no connection ({_reason(error)})") from error


def _extent(response: Any) -> tuple[int, int | None]:
    """At which byte of the file an answer starts, and how many the file has, if the answer says so."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if found is None:
            raise ConnectionError("the server sends a part of the file without saying which")
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _validator(response: Any) -> str:
    """What tells this edition of a file from later ones: its strong ETag, else its date, else nothing (RFC 9110)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _validator_file(part: pathlib.Path) -> pathlib.Path:
    return part.with_name(f"{part.name}.etag")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", error)) or type(error).__name__


def _difference(asset: Asset, path: pathlib.Path) -> str:
    """In what a file differs from the published one; empty if in nothing that is known of it."""
    size = _size(path)
    if asset.size is not None and size != asset.size:
        return f"it has {size} bytes, expected {asset.size}"
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        pieces = iter(lambda: file.read(_MB), b"")
        for piece in track(pieces, total=math.ceil(size / _MB), description=f"checking {path.name}", unit="MB"):
            digest.update(piece)
    found = digest.hexdigest()
    if asset.sha256 is None:
        _say(f"no checksum of {asset.url} is known, so it is not verified; its sha256 is {found}")
    elif not found.startswith(asset.sha256):
        return f"its sha256 is {found}, expected {asset.sha256}"
    return ""


# --- archives


class _Member(NamedTuple):
    """What an archive says of one of its members, and how to read it."""

    name: str
    size: int
    kind: int  # a file type of the stat module; 0 where a .zip does not say, which means a file
    open: Callable[[], IO[bytes]]


def _extract(archive: pathlib.Path, scratch: pathlib.Path, wanted: Sequence[str]) -> list[str]:
    """Writes the wanted members under the scratch folder; their names."""
    try:
        with (_zip_members if archive.suffix == ".zip" else _tar_members)(archive) as members:
            files = _wanted_files(archive, members, wanted)
            size, free = sum(member.size for member in files.values()), shutil.disk_usage(scratch.parent).free
            if size > free:
                raise InputError(
                    f"{archive} unpacks to {size / _MB:.0f} MB, and {scratch.parent} has {free / _MB:.0f} MB free: "
                    "make room, or choose a folder on another disk"
                )
            description = f"unpacking {archive.name}"
            for name, member in track(files.items(), total=len(files), description=description, unit="files"):
                target = scratch / name
                target.parent.mkdir(parents=True, exist_ok=True)
                # Both libraries read no more than the size that was counted above.
                with member.open() as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                if target.stat().st_size != member.size:
                    raise EOFError(f"{name} is cut off")
    except (InputError, OSError):
        raise
    except Exception as error:  # damaged archives raise tarfile's, zipfile's and zlib's errors, IndexError and others
        raise InputError(f"{archive} is damaged ({reason(error)}): delete it, and it is downloaded again") from error
    return list(files)


@contextlib.contextmanager
def _zip_members(archive: pathlib.Path) -> Iterator[list[_Member]]:
    def member(info: zipfile.ZipInfo) -> _Member:
        kind = stat.S_IFDIR if info.is_dir() else stat.S_IFMT(info.external_attr >> 16)
        return _Member(info.filename, info.file_size, kind, lambda: file.open(info))

    with zipfile.ZipFile(archive) as file:
        yield [member(info) for info in file.infolist()]


@contextlib.contextmanager
def _tar_members(archive: pathlib.Path) -> Iterator[list[_Member]]:
    def member(info: tarfile.TarInfo) -> _Member:
        kind = stat.S_IFREG if info.isreg() else stat.S_IFDIR if info.isdir() else stat.S_IFLNK
        return _Member(info.name, info.size, kind, lambda: file.extractfile(info))

    with tarfile.open(archive, "r:") as file:
        members = [member(info) for info in file.getmembers()]
        file.fileobj.seek(file.offset)  # tarfile takes a header that it cannot read for the end, which has but zeros
        if file.fileobj.read(tarfile.BLOCKSIZE).strip(tarfile.NUL):
            raise EOFError("it is cut off")
        yield members


def _wanted_files(archive: pathlib.Path, members: list[_Member], wanted: Sequence[str]) -> dict[str, _Member]:
    files = {}
    for member in members:
        path = pathlib.PureWindowsPath(member.name)  # it knows both kinds of slashes, and drives
        if path.anchor or ".." in path.parts:
            raise InputError(f"{archive} is unsafe: its member {member.name[:80]!r} leads out of the folder; delete it")
        name = str(pathlib.PurePosixPath(member.name))
        if stat.S_ISDIR(member.kind) or not any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
            continue
        if not (stat.S_ISREG(member.kind) or member.kind == 0):
            raise InputError(f"{archive} is unsafe: its member {name[:80]!r} is a link or a device; delete it")
        files[name] = member
    for pattern in wanted:
        if not fnmatch.filter(files, pattern):
            raise InputError(f"{archive} holds no {pattern}: it is another archive, or cut off; delete it")
    return files


def _merge(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a folder's content, whole folders at once where there is none of that name."""
    for child in source.iterdir():
        if child.is_dir() and (target / child.name).is_dir():
            _merge(child, target / child.name)
        else:
            shutil.move(child, target / child.name)


_STAMP_ENCODING = {"encoding": "utf-8", "errors": "surrogateescape"}  # as tarfile decodes the names of members


def _stamp(archive_name: str, folder: pathlib.Path) -> pathlib.Path:
    """Says which files were unpacked from an archive; it is written when all of them are in their places."""
    return folder / f".{archive_name}.unpacked"


def _key(wanted: Sequence[str]) -> str:
    return " ".join(wanted)


def _is_unpacked(asset: Asset, folder: pathlib.Path) -> bool:
    return bool(asset.members and _unpacked_files(asset.filename, folder / asset.into, asset.members))


def _unpacked_files(archive_name: str, folder: pathlib.Path, wanted: Sequence[str]) -> list[str]:
    """The files unpacked earlier; empty unless all of them are still there."""
    stamp = _stamp(archive_name, folder)
    key, *names = stamp.read_text(**_STAMP_ENCODING).split("\n") if stamp.is_file() else [""]
    return names if key == _key(wanted) and all((folder / name).exists() for name in names) else []


# --- disk


def _need_space(assets: Sequence[Asset], folder: pathlib.Path) -> None:
    archives = sum(
        (asset.size or 0) - _size(folder / f"{asset.filename}.part")
        for asset in assets
        if not (folder / asset.filename).exists()
    )
    unpacked = sum(asset.unpacked for asset in assets)
    free = shutil.disk_usage(folder).free
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
    """A full disk, a read-only folder and the like are told in one line."""
    try:
        yield
    except OSError as error:
        where, reason = error.filename or folder, error.strerror or error
        raise InputError(f"{where} cannot be read or written: {reason}. Make room, or choose another folder") from error


def _lock(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Lets one process at a time write there."""
    return lock(folder / ".download.lock", f"another process that downloads to {folder}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

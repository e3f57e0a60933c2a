"""Photos on disk: which files are photos, where they lie, and how the names of tables lead to them."""

import contextlib
import functools
import os
import pathlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from PIL import Image

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand, photo_path, reason

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

_HEIC = (".heic", ".heif", ".hif")
# Photos for which Pillow may lack a decoder. It would open some raw files as TIFF and show their thumbnail.
_RAW = r"\.(3fr|arw|cr[23w]|dcr|dng|erf|iiq|kdc|mef|mrw|nef|nrw|orf|pef|raf|rw[2l]|sr[2fw]|x3f)"
_UNSUPPORTED = re.compile(rf"{_RAW}|\.(avif|hei[cf]|hif|jx[lr]|wdp)")
_NO_PHOTOS = ("BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")  # Pillow registers them all the same
_JUNK = re.compile(
    r"\..*|~\$.*|__macosx|@eadir|#recycle|\$recycle\.bin|system volume information|lost\+found",
    re.IGNORECASE | re.DOTALL,
)
# Not a path in the table's folder: an address, a path of Label Studio's server, a path on a Windows machine.
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]+://[^/]*/|/data/(upload|local-files)/|[a-z]:[\\/]", re.IGNORECASE)


@functools.cache
def _readable() -> frozenset[str]:
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind not in _NO_PHOTOS)


def is_junk(name: str) -> bool:
    """Whether a file or folder is a system's own: hidden, ``__MACOSX``, ``@eaDir`` and the like."""
    return bool(_JUNK.fullmatch(name))


def is_photo(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a photo by its ending, be it of a kind that cannot be read here."""
    ending = os.path.splitext(path)[1].lower()
    return ending in _readable() or bool(_UNSUPPORTED.fullmatch(ending))


def why_unsupported(path: str | os.PathLike[str]) -> str:
    """What to say of a photo of a kind that cannot be read here, with the way out; "" if it can be read."""
    ending = os.path.splitext(path)[1].lower()
    if ending in _readable() or not _UNSUPPORTED.fullmatch(ending):
        return ""
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(8).startswith((b"\xff\xd8\xff", b"\x89PNG")):  # the content counts, not the ending
                return ""
    way_out = "pip install pillow-heif, or convert to JPEG" if ending in _HEIC else "convert to JPEG"
    return f"cannot be read here ({ending[1:].upper()}): {way_out}"


def photos_below(folder: pathlib.Path) -> list[pathlib.Path]:
    """All photos of a folder and its sub-folders, sorted; those of hidden and system folders are no photos.

    Links to folders are followed, each folder once, so that loops end. ``InputError`` for a folder that cannot be read.
    """

    def complain(error: OSError) -> None:
        raise InputError(f"the folder {error.filename} cannot be read ({reason(error)}): allow it, or move it away")

    found, seen, tops = [], set(), [str(folder)]
    while tops:  # links after folders: a photo is named by its own folder where that is in reach
        links = []
        for top in tops:
            for place, folders, files in os.walk(top, onerror=complain):
                if (real := os.path.realpath(place)) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = [name for name in folders if not is_junk(name)]
                links += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
                found += [pathlib.Path(place, name) for name in files if is_photo(name) and not is_junk(name)]
        tops = links
    return sorted(found)


class Finder:
    """Finds the photos that a table or an annotation tool names.

    Args:
      folder: where the photos are, or below.
      anywhere: whether names may lead out of the folder.
      first: folders below it where names are looked up before.
    """

    def __init__(self, folder: pathlib.Path, anywhere: bool = False, first: Sequence[pathlib.Path] = ()) -> None:
        self._folder, self._anywhere, self._places = folder, anywhere, (*first, folder)
        self._tops = (f"{folder.absolute()}/", f"{folder.resolve()}/")
        self._spellings: dict[pathlib.Path, dict[str, list[str]]] = {}  # of a folder: plain name -> names
        self._named: dict[pathlib.Path, str] = {}  # photo -> what led to it

    def find(self, name: Any, where: str) -> pathlib.Path:
        """The photo of this name, or ``folder / name`` where there is none.

        A name that is not there exactly is tried with slashes for backslashes, then however accents and capitals are
        written; a name without a folder also as the only one of that name below. Of an address or a path on another
        machine, the longest end that leads to a photo counts, at last without the eight digits that Label Studio puts
        before. ``InputError``, naming ``where``, for what is no path of a photo, or when two names lead to one photo.
        """
        name = self._given(name)
        elsewhere = isinstance(name, str) and _ELSEWHERE.match(name)
        elsewhere = None if self._anywhere and os.path.exists(name) else elsewhere
        if elsewhere:
            paths = [photo_path(end, where, self._folder) for end in _ends(name, elsewhere.end())]
        else:
            given = photo_path(name, where, self._folder, self._anywhere)
            for place in self._places:
                if os.path.exists(place / given):
                    return self._once(place / given, str(given), where)
            paths = [photo_path(name.replace("\\", "/"), where, self._folder, self._anywhere)]
        alone = elsewhere or (len(paths[0].parts) == 1 and not self._anywhere)
        found = next(filter(None, (self._spelled(place, path) for path in paths for place in self._places)), None)
        for last in dict.fromkeys(path.name for path in paths if alone and not found):
            namesakes = self._by_name.get(folded(last), [])
            found = found or (namesakes[0] if len(namesakes) == 1 else None)
        return self._once(found, str(paths[0]), where) if found else self._folder / paths[0]

    def _given(self, name: Any) -> Any:
        """The name with ``~`` replaced where it may lead anywhere, else without the folder that it may begin with."""
        if not isinstance(name, str):
            return name
        if self._anywhere:
            return str(expand(name)) if name.startswith("~") else name
        return next((name.removeprefix(top) for top in self._tops if name.startswith(top)), name)

    def _once(self, photo: pathlib.Path, name: str, where: str) -> pathlib.Path:
        other = self._named.setdefault(photo, name)
        if folded(other) != folded(name):
            raise InputError(f"{where}: {name!r} and {other!r} would both be the photo {photo}: name it by its path")
        return photo

    def _spelled(self, place: pathlib.Path, path: pathlib.PurePosixPath) -> pathlib.Path | None:
        """The only file below ``place`` whose path is ``path`` but for accents and capitals."""
        for part in path.parts:
            if not os.path.exists(place / part):
                if place not in self._spellings:
                    self._spellings[place] = {}
                    with contextlib.suppress(OSError):
                        for name in os.listdir(place):
                            self._spellings[place].setdefault(folded(name), []).append(name)
                alike = self._spellings[place].get(folded(part), [])
                if len(alike) != 1:
                    return None
                part = alike[0]
            place /= part
        return place

    @functools.cached_property
    def _by_name(self) -> dict[str, list[pathlib.Path]]:
        found: dict[str, list[pathlib.Path]] = {}
        for photo in photos_below(self._folder):
            found.setdefault(folded(photo.name), []).append(photo)
        return found


def folded(name: str) -> str:
    """A name however its accents and capitals are written."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _ends(name: str, start: int) -> list[str]:
    """The ends of an address from its path to its last part, then the last part as it was before an upload."""
    path = name.partition("?d=")[2] or name[start:].partition("?")[0]
    path = unquote(path).replace("\\", "/").strip("/")
    parts = path.split("/")
    return [*("/".join(parts[i:]) for i in range(len(parts))), re.sub(r"^[0-9a-f]{8}-", "", parts[-1])]

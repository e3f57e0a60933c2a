"""Which files are photos, where they lie, and how names lead to them."""

import os

import pytest
from PIL import Image

from mlfsic_jax.data import photo_files
from mlfsic_jax.data.photo_files import Finder, is_photo, photos_below, why_unsupported
from mlfsic_jax.data.transforms import decode_photo
from mlfsic_jax.system.errors import InputError
from tests.made_up import save_photo


def found(folder):
    return [path.relative_to(folder).as_posix() for path in photos_below(folder)]


def test_photos_are_known_by_their_endings():
    for name in (
        "a.jpg",
        "A.JPEG",
        "b.png",
        "c.webp",
        "d.tif",
        "e.heic",
        "f.HEIF",
        "g.dng",
        "h.CR2",
        "i.avif",
        "j.jxl",
    ):
        assert is_photo(name), name
    for name in (
        "a.pdf",
        "b.mpg",
        "c.h5",
        "d.svg",
        "e.eps",
        "f.ps",
        "g.wmf",
        "h.txt",
        "i",
        "j.new",
        "k.hdf",
        "Thumbs.db",
    ):
        assert not is_photo(name), name


def test_what_systems_leave_is_passed_over(tmp_path):
    for name in ("a.png", "deep/er/b.png", "album 2/c.png"):
        save_photo(tmp_path / name)
    for name in ("__MACOSX/._a.png", "._a.png", ".thumbs/a.png", "@eaDir/a.png/x.png", "deep/.b.png", "#recycle/a.png"):
        save_photo(tmp_path / name)
    for name in ("Thumbs.db", "desktop.ini", "notes.txt", "deep/video.mpg"):
        (tmp_path / name).write_bytes(b"no photo")
    assert found(tmp_path) == ["a.png", "album 2/c.png", "deep/er/b.png"]
    assert found(tmp_path / ".thumbs") == ["a.png"]  # what is asked for by name is looked into


def test_links_to_folders_are_followed_once_and_loops_end(tmp_path):
    save_photo(tmp_path / "mine/z/a.png")
    save_photo(tmp_path / "elsewhere/b.png")
    (tmp_path / "mine/a_link").symlink_to(tmp_path / "mine/z")  # sorted before what it leads to
    (tmp_path / "mine/outside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "mine")
    (tmp_path / "mine/loop").symlink_to(tmp_path / "mine")
    (tmp_path / "mine/broken").symlink_to(tmp_path / "gone")
    assert found(tmp_path / "mine") == ["outside/b.png", "z/a.png"]
    (tmp_path / "mine/gone.png").symlink_to(tmp_path / "gone.png")
    assert found(tmp_path / "mine") == ["gone.png", "outside/b.png", "z/a.png"]  # reading it will tell


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    save_photo(tmp_path / "locked/a.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="the folder .*locked cannot be read .*Permission denied"):
        photos_below(tmp_path)


def test_kinds_that_cannot_be_read_come_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_files, "_readable", lambda: frozenset({".jpg", ".png"}))  # no pillow-heif
    for name, message in (
        ("a.HEIC", "cannot be read here (HEIC): pip install pillow-heif, or convert to JPEG"),
        ("a.dng", "cannot be read here (DNG): convert to JPEG"),
        ("a.avif", "cannot be read here (AVIF): convert to JPEG"),
        ("a.jpg", ""),
        ("a.xyz", ""),
    ):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
        assert why_unsupported(tmp_path / name) == message
    Image.new("RGB", (8, 8)).save(tmp_path / "b.heic", "JPEG")  # renamed, not converted
    assert why_unsupported(tmp_path / "b.heic") == ""
    assert decode_photo(tmp_path / "b.heic", "b.heic").shape == (8, 8, 3)
    monkeypatch.setattr(photo_files, "_readable", lambda: frozenset({".heic"}))
    assert why_unsupported(tmp_path / "a.HEIC") == ""


@pytest.mark.extras
def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.heic", quality=100)
    assert why_unsupported(tmp_path / "a.heic") == ""
    photo = decode_photo(tmp_path / "a.heic", "a.heic")
    assert photo.shape == (48, 64, 3) and abs(photo.astype(int) - [255, 0, 0]).max() < 8


def test_names_lead_to_photos(tmp_path):
    for name in ("a/Cat 1.png", "a/twin.png", "b/twin.png", "back\\slash.png", "0123abcd-up.png", "b/plain.png"):
        save_photo(tmp_path / name)
    finder = Finder(tmp_path, first=[tmp_path / "b"])
    for name, expected in (
        ("a/Cat 1.png", "a/Cat 1.png"),
        ("A\\CAT 1.PNG", "a/Cat 1.png"),
        ("back\\slash.png", "back\\slash.png"),  # a backslash of its own
        ("twin.png", "b/twin.png"),  # the folder to look into first
        ("a/twin.png", "a/twin.png"),
        ("/data/upload/7/0123abcd-up.png", "0123abcd-up.png"),
        ("/data/upload/7/89abcdef-plain.png", "b/plain.png"),
        ("gone/Cat 1.png", "gone/Cat 1.png"),  # not there: the folder is part of the name
        ("http://host/gone.png", "gone.png"),
    ):
        assert finder.find(name, "x").relative_to(tmp_path).as_posix() == expected, name
    for name in (
        "/etc/passwd",
        "../a.png",
        "..\\a.png",
        "http://host/../../a.png",
        "file:///a/%2e%2e/b.png",
        "",
        None,
        3,
    ):
        with pytest.raises(InputError, match="x: .* must be the path of a photo inside"):
            finder.find(name, "x")
    with pytest.raises(InputError, match="x: 'plain.png' and '7/89abcdef-plain.png' would both be the photo"):
        finder.find("plain.png", "x")


def test_names_that_may_lead_anywhere(tmp_path):
    save_photo(tmp_path / "data/upload/1/a.png")
    save_photo(tmp_path / "mine/Deep/B.png")
    finder = Finder(tmp_path / "mine", anywhere=True)
    absolute = str(tmp_path / "data/upload/1/a.png")
    assert str(finder.find(absolute, "x")) == absolute
    assert finder.find("..\\mine\\deep\\b.PNG", "x") == tmp_path / "mine/../mine/Deep/B.png"
    assert finder.find("s3://bucket/Deep/B.png", "x") == tmp_path / "mine/Deep/B.png"
    assert finder.find("B.png", "x") == tmp_path / "mine/B.png"  # a home folder is not searched for a bare name

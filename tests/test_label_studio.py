"""Predictions as tasks of Label Studio: its files, what comes back from there, and what is refused."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
import types
import urllib.request
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest

from mlfsic_jax.data import folder, tables
from mlfsic_jax.data.photo_files import Finder
from mlfsic_jax.run import label_studio
from mlfsic_jax.run.classifier import Classifier
from mlfsic_jax.system.errors import InputError
from tests.made_up import save_photo

NAMES = (
    *("tv monitor", "ça va", "\u6d77", "a \"quoted\" <b> & 'c'", "salt, sea", "a|b", "a  b", "&amp;", 'name="choice"'),
    *("1", "true", "nan", "C#", "$100", "US$image", "$image", "it costs $5 <i>& more</i>", "{{idx}}"),
)
PHOTOS = (
    *("a b.png", "\u6d77 \u00fc.png", "e\u0301.png", "q\"'<&>+%25#?;=$.png", " first.png", "x..png", "deep/a b.png"),
    *("deep/?d=x.png", "deep/%2Fdata.png"),
)


def fitted(names=NAMES, thresholds=0.5):
    return Classifier(
        predictor=None,
        trained=types.SimpleNamespace(n_shot=5),
        method="ridge",
        label_names=tuple(names),
        thresholds=np.full(len(names), thresholds),
        state=None,
        kept=None,
        note="",
    )


def proposals(root, photos=PHOTOS, names=NAMES):
    """Writes root.json and root.xml for photos in root/mine; the labels that each photo has, likeliest first."""
    rng = np.random.default_rng(0)
    paths = [root / "mine" / photo for photo in photos]
    for path in paths:
        save_photo(path)
    rows = [rng.uniform(size=len(names)).astype(np.float32) for _ in paths]
    rows[0][:], rows[-1][:] = 0.75, 0.25  # all of the labels, none of them
    out = root.with_suffix(".json")
    project = label_studio.prepare(names, paths, root)
    label_studio.write(out, project, fitted(names), list(zip(paths, rows, strict=True)))
    expected = {}
    for photo, row in zip(photos, rows, strict=True):
        likeliest = sorted(zip(row, names, strict=True), key=lambda pair: -pair[0])
        expected[f"mine/{photo}"] = [name for p, name in likeliest if p > 0.5]
    return out, expected


def accept(tasks):
    """The tasks as Label Studio exports them when all predictions were accepted."""
    return [task | {"annotations": [{"result": task["predictions"][0]["result"]}], "id": 1} for task in tasks]


def read(root):
    """What a dataset reads from the tables in a folder: photo -> its labels, sorted."""
    return {example.name: list(example.labels) for example in folder.scan(root).read().examples}


def test_the_tasks_and_the_labelling_configuration(tmp_path):
    project = label_studio.prepare(("cat", "dog & co"), [tmp_path / "a/1 2.png", tmp_path / "a/b/3.png"], tmp_path)
    rows = list(zip(project.addresses, np.float32([[0.625, 0.875], [0.25, 0.125]]), strict=True))
    out = tmp_path / "x.y.json"
    config = label_studio.write(out, project, fitted(("cat", "dog & co"), thresholds=[0.75, 0.5]), rows)
    assert config == tmp_path / "x.y.xml" and len(list(tmp_path.iterdir())) == 2
    assert config.read_text() == (
        "<View>\n"
        '  <Image name="image" value="$image" />\n'
        '  <Choices name="choice" toName="image" choice="multiple">\n'
        '    <Choice value="cat" />\n'
        '    <Choice value="dog &amp; co" />\n'
        "  </Choices>\n"
        "</View>\n"
    )
    first, second = json.loads(out.read_text())
    choices = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["dog & co"]}}
    assert first["data"] == {"image": "/data/local-files/?d=a/1%202.png"}
    (prediction,) = first["predictions"]
    assert prediction.pop("model_version").endswith(", ridge, 5-shot")
    assert prediction == {"score": 0.375, "result": [choices]}  # "no cat" has probability 1 - 0.625
    assert second["data"] == {"image": "/data/local-files/?d=a/b/3.png"}
    assert second["predictions"][0]["score"] == 0.75 and second["predictions"][0]["result"] == []


def test_names_of_any_characters_come_back_from_accepted_tasks(tmp_path):
    root = tmp_path / "root"
    out, expected = proposals(root)
    choices = ElementTree.parse(out.with_suffix(".xml")).findall("Choices/Choice")
    assert [choice.get("alias", choice.get("value")) for choice in choices] == list(NAMES)
    tasks = json.loads(out.read_text())
    assert [unquote(task["data"]["image"]) for task in tasks] == [f"/data/local-files/?d={photo}" for photo in expected]
    (root / "labels.json").write_text(json.dumps(accept(tasks)))
    shutil.move(out, root)  # labels.json comes before other tables
    assert read(root) == {photo: sorted(names) for photo, names in expected.items()}
    by_path = {root / photo: names for photo, names in expected.items()}
    assert tables.read_table(root / "labels.json", Finder(root)).labels == by_path
    assert tables.read_csv(root / "labels.json", anywhere=True)[0] == by_path  # as predict --support does
    assert expected["mine/a b.png"] == list(NAMES) and expected["mine/deep/%2Fdata.png"] == []


def test_proposals_that_nobody_accepted_are_no_labels(tmp_path):
    out, _ = proposals(tmp_path / "root")
    shutil.move(out, tmp_path / "root")
    with pytest.raises(InputError, match="no task has an annotation yet: submit some in Label Studio"):
        folder.scan(tmp_path / "root")


def test_photos_that_links_lead_to(tmp_path, monkeypatch):
    save_photo(tmp_path / "disk/mine/1.png")
    save_photo(tmp_path / "served/other/2.png")
    (tmp_path / "served/link").symlink_to(tmp_path / "disk/mine")
    (tmp_path / "way").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "served")

    def address(photo, root):
        return label_studio.prepare(["cat"], [Path(photo)], root).addresses[Path(photo)].partition("?d=")[2]

    assert address("link/1.png", ".") == "link/1.png"  # below the folder by its name, though it lies elsewhere
    assert address("../served/other/2.png", ".") == "other/2.png"
    assert address(tmp_path / "disk/mine/1.png", tmp_path / "way") == "mine/1.png"
    assert address("link/../mine/1.png", tmp_path / "disk") == "mine/1.png"  # ".." of where the link leads


@pytest.mark.parametrize(
    ("photo", "root", "label", "message"),
    [
        ("mine/1.png", None, "cat", "give it as --image_root=FOLDER"),
        ("mine/1.png", "", "cat", "give it as --image_root=FOLDER"),
        ("mine/1.png", "other", "cat", "photo mine/1.png lies outside of --image_root=other: give the folder that"),
        ("../x/1.png", ".", "cat", "photo ../x/1.png lies outside of --image_root=.: give"),
        ("mine/1.png", "mine", "cat", "photo mine/1.png lies directly in --image_root=mine: .* give the folder above"),
        ("mine/caf\udce9.png", ".", "cat", r"--images: 'mine/caf\\udce9.png' contains a character .* rename the photo"),
        ("mine/1\n2.png", ".", "cat", r"--images: 'mine/1\\n2.png' contains a character .* rename the photo"),
        ("mine/1\\2.png", ".", "cat", "the backslash would be read as a folder: rename"),
        ("mine/1.png", ".", "c\x01t", r"--labels: the label 'c\\x01t' contains a line break or control character"),
        ("mine/1.png", ".", "c\uffffat", r"--labels: the label 'c\\uffffat' contains a character that XML lacks"),
        ("mine/1.png", ".", "c" * 201, "--labels: a label of 201 characters"),
    ],
)
def test_what_label_studio_could_not_show_or_give_back_is_refused(photo, root, label, message):
    with pytest.raises(InputError, match=message) as caught:
        label_studio.prepare(["dog", label], [Path(photo)], root)
    assert "\n" not in str(caught.value)


# --- Label Studio itself


class Server:
    """A running Label Studio that serves the photos below a folder."""

    def __init__(self, port, token):
        self._address, self._token = f"http://127.0.0.1:{port}", token
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path, body=None):
        headers = {"Authorization": f"Token {self._token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(urllib.request.Request(self._address + path, data, headers), timeout=60) as answer:
            return answer.read()

    def call(self, path, body=None):
        return json.loads(self.get(path, body))


@pytest.fixture
def server(tmp_path):
    program = shutil.which(os.environ.get("LABEL_STUDIO", "label-studio"))
    if program is None:
        pytest.skip("no label-studio: install it (PyPI) into an environment of its own; LABEL_STUDIO is its command")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(20)
    settings = {
        **{"BASE_DATA_DIR": tmp_path / "studio", "USERNAME": "a@example.org", "PASSWORD": token[:16]},
        **{"USER_TOKEN": token, "ENABLE_LEGACY_API_TOKEN": "true"},
        **{"LOCAL_FILES_SERVING_ENABLED": "true", "LOCAL_FILES_DOCUMENT_ROOT": tmp_path / "root"},
        **{"COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false"},
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HOME": str(tmp_path)} | {f"LABEL_STUDIO_{name}": str(value) for name, value in settings.items()}
    (tmp_path / "studio").mkdir()
    command = [program, "start", "--no-browser", "--internal-host=127.0.0.1", f"--port={port}"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path / "studio", stdout=log, stderr=log)
    try:
        found, end = Server(port, token), time.monotonic() + 600
        while True:
            try:
                found.get("/health")
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]
                time.sleep(1)
        yield found
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_label_studio_shows_the_proposals_and_exports_what_people_make_of_them(tmp_path, server):
    root = tmp_path / "root"
    out, expected = proposals(root)
    tasks = json.loads(out.read_text())
    config = out.with_suffix(".xml").read_text()
    project = server.call("/api/projects", {"title": "proposals", "label_config": config})["id"]
    server.call("/api/storages/localfiles", {"project": project, "path": str(root / "mine")})
    taken = server.call(f"/api/projects/{project}/import", tasks)
    assert (taken["task_count"], taken["prediction_count"]) == (len(PHOTOS), len(PHOTOS))
    shown = sorted(server.call(f"/api/tasks?project={project}&fields=all")["tasks"], key=lambda task: task["id"])
    for task, own, photo in zip(shown, tasks, expected, strict=True):
        (prediction,) = task["predictions"]
        assert task["data"] == own["data"]
        assert {name: prediction[name] for name in own["predictions"][0]} == own["predictions"][0]
        assert server.get(task["data"]["image"]) == (root / photo).read_bytes()
    kept, open_photo = list(expected)[1:], next(iter(expected))  # nobody looks at the first
    corrected = kept[0]
    expected[corrected] = ["$100", "salt, sea"]
    for task, photo in zip(shown[1:], kept, strict=True):
        result = task["predictions"][0]["result"]
        if photo == corrected:
            result = [result[0] | {"value": {"choices": expected[photo]}}]
        server.call(f"/api/tasks/{task['id']}/annotations", {"result": result})
    export = f"/api/projects/{project}/export?exportType=JSON&download_all_tasks=true"
    (root / "labels.json").write_bytes(server.get(export))
    assert read(root) == {photo: sorted(names) for photo, names in expected.items() if photo != open_photo}

"""The HTTP interface, through a real socket."""

import http.client
import io
import json
import socket
import threading

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from mlfsic_jax.app.server import create_app  # noqa: E402
from mlfsic_jax.app.session import open_session  # noqa: E402
from mlfsic_jax.data.folder import read_csv  # noqa: E402


class Client:
    """JSON to and from the server."""

    def __init__(self, port):
        self.port = port

    def raw(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer, content

    def __call__(self, path, body=None, status=200):
        headers = {} if body is None else {"Content-Type": "application/json"}
        method = "GET" if body is None else "POST"
        answer, content = self.raw(method, path, None if body is None else json.dumps(body), **headers)
        assert answer.status == status, content
        return json.loads(content)


def serve(app):
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()  # connections wait until the server is up
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    return server, thread, Client(sock.getsockname()[1])


@pytest.fixture
def ask(session):
    server, thread, client = serve(create_app(session))
    yield client
    server.should_exit = True
    thread.join()


def test_a_folder_is_labelled_and_exported(session, ask, folder, tmp_path):
    state = ask("/api/state")
    assert state["folder"] == "photos" and state["photos"] == state["embedded"] == 10
    assert state["unreadable"][0]["name"] == "damaged.jpg" and state["names_used"]
    ask("/api/labels", {"name": "cow", "wordings": ["cow", "bull"]})
    assert [label["name"] for label in ask("/api/state")["labels"]] == ["cat", "dog", "hot dog", "cow"]
    found = ask("/api/photos?order=certain&label=dog&limit=3")
    assert found["total"] == 10 and len(found["photos"]) == 3
    first = found["photos"][0]
    before = ask("/api/state")["version"]
    decisions = [{"photo": first["id"], "label": name, "value": value} for name, value in (("dog", 1), ("cat", 0))]
    body = {"collection": state["collection"], "decisions": decisions}
    assert ask("/api/decide", body)["version"] == before + 1
    others = ask("/api/decide", body | {"collection": "0123"}, status=400)  # a page of before photos came
    assert "load the page again" in others["error"] and ask("/api/state")["version"] == before + 1
    assert ask("/api/photos?show=yes&label=dog")["photos"][0]["decided"] == {"dog": 1, "cat": 0}
    answer, content = ask.raw("GET", "/api/export?format=csv")
    assert "labels.csv" in answer.headers["Content-Disposition"]
    (folder / "labels.csv").write_bytes(content)
    assert read_csv(folder / "labels.csv", anywhere=True)[0] == {folder / first["name"]: ["dog"]}
    assert ask("/api/undo", {})["photos"] == [first["id"]]
    done = ask("/api/import", {"name": "labels.csv", "content": content.decode()})
    assert done["photos"] == 1 and done["labels"] == ["dog"] and done["skipped"] == []
    assert session.store.decisions() == {first["name"]: {"dog": 1}} and done["changed"] == 0
    # What is corrected elsewhere is taken over, in one step; labels that the file does not have stay.
    ask("/api/import", {"name": "a.csv", "content": f"file,labels\n{first['name']},cow\n1.png,cow\n"})
    corrected = f"file,labels\n{first['name']},\n1.png,cat\nphotos/2.png,cow\n"
    done = ask("/api/import", {"name": "corrected.csv", "content": corrected})
    assert done["changed"] == 2 and session.store.decisions() == {
        **{first["name"]: {"dog": 1, "cat": 0, "cow": 0}, "1.png": {"cat": 1, "cow": 0}, "2.png": {"cow": 1}}
    }
    ask("/api/undo", {})
    ask("/api/undo", {})
    assert session.store.decisions() == {first["name"]: {"dog": 1}}
    session.refit()
    reasons = ask(f"/api/photos/{first['id']}/reasons")
    assert {one["label"] for one in reasons["labels"]} == {"cat", "dog", "hot dog", "cow"}
    ask("/api/threshold", {"label": "dog", "value": 0.25})
    assert ask("/api/labels/dog")["threshold"] == 0.25
    ask("/api/labels/remove", {"name": "cow"})
    assert len(ask("/api/state")["labels"]) == 3


def test_photos_are_sent_upright_and_small(session, ask):
    i = session.collection.number["side.jpg"]
    for path, size in ((f"/thumb/{i}", (40, 44)), (f"/photo/{i}?side=22", (20, 22))):
        answer, content = ask.raw("GET", path)
        assert answer.headers["Content-Type"] == "image/jpeg" and Image.open(io.BytesIO(content)).size == size
    described = session.describe(i)
    assert (described["width"], described["height"]) == (40, 44)
    answer, content = ask.raw("GET", f"/thumb/{i}")
    assert ask.raw("GET", f"/thumb/{i}")[1] == content  # now from the cache
    tag = {"If-None-Match": answer.headers["ETag"]}
    assert ask.raw("GET", f"/thumb/{i}", **tag)[0].status == 304
    assert ask.raw("GET", "/thumb/0", **tag)[0].status == 200


def test_names_are_sent_as_they_are(session, ask):
    names = {photo["name"] for photo in ask("/api/photos")["photos"]}
    assert {"sub/<img src=x onerror=alert(1)>.png", 'sub/a "b" & c.png'} <= names
    ask("/api/labels", {"name": "<b>bold</b>"})
    answer, content = ask.raw("GET", "/api/state")
    assert answer.headers["Content-Type"] == "application/json" and b"<b>bold</b>" in content
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert ask("/api/labels/%3Cb%3Ebold%3C%2Fb%3E")["name"] == "<b>bold</b>"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/api/decide", {"decisions": [{"photo": 99, "label": "cat", "value": 1}]}, "no photo 99"),
        ("/api/decide", {"decisions": [{"photo": 0, "label": "cow", "value": 1}]}, "no label 'cow'"),
        ("/api/decide", {"decisions": [{"photo": 0, "label": "cat", "value": 7}]}, "no value 1, 0 or null"),
        ("/api/decide", {}, "decisions is missing"),
        ("/api/labels", {"name": "a\nb"}, "contains a line break"),
        ("/api/labels", {"name": 3}, "name is missing or wrong"),
        ("/api/labels", {"name": "y", "wordings": "abc"}, "wordings is missing or wrong"),
        ("/api/labels", {"name": "y", "wordings": [5]}, "wordings is missing or wrong"),
        ("/api/threshold", {"label": "cat", "value": 10**400}, "between 0 and 1"),
        ("/api/keywords", {"out": " "}, "out: ' ' is empty or contains"),
        ("/api/keywords", {"out": "a\0b"}, "out: 'a\\x00b' is empty or contains"),
        ("/api/import", {"name": "a.csv", "content": "nonsense"}, "a.csv"),
        ("/api/threshold", {"label": "cat", "value": 3}, "between 0 and 1"),
        ("/api/photos/99/reasons", None, "no photo 99"),
        ("/thumb/-1", None, "no photo -1"),
        ("/api/photos?order=odd", None, "order is one of"),
        ("/api/export?format=odd", None, "csv"),
        ("/api/keywords", {"out": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_mistakes_are_one_line(session, ask, path, body, message):
    session.store.decide([(session.collection.names[0], "cat", 1)])
    before = session.store.decisions()
    if path == "/api/decide":
        body = body | {"collection": session.collection.key}
    error = ask(path, body, status=400)["error"]
    assert message in error and "\n" not in error
    assert session.store.decisions() == before


@pytest.mark.parametrize(
    "path",
    ["/../labels.sqlite", "/static/../server.py", "/static/%2e%2e%2fserver.py", "/photos/0.png", "/openapi.json"],
)
def test_nothing_but_the_folders_photos_is_served(ask, path):
    assert ask.raw("GET", path)[0].status == 404


def test_other_sites_are_kept_out(ask):
    assert ask.raw("GET", "/api/state", Host="evil.example")[0].status == 403
    assert ask.raw("GET", "/api/state", Host=f"localhost:{ask.port}")[0].status == 200
    body = json.dumps({"name": "x"})
    assert ask.raw("POST", "/api/labels", body, **{"Content-Type": "text/plain"})[0].status == 415
    assert len(ask("/api/state")["labels"]) == 3


def test_elsewhere_a_token_is_needed(session):
    server, thread, ask = serve(create_app(session, token="secret"))
    for path in ("/", "/api/state", "/thumb/0", "/api/state?token=wrong"):
        assert ask.raw("GET", path)[0].status == 403
    answer, _ = ask.raw("GET", "/?token=secret", Host="my-computer:8765")
    cookie = answer.headers["Set-Cookie"]
    assert answer.status == 307 and answer.headers["Location"] == "/" and "HttpOnly" in cookie
    assert ask.raw("GET", "/api/state", Cookie=cookie.split(";")[0], Host="my-computer:8765")[0].status == 200
    server.should_exit = True
    thread.join()


def test_keywords_go_into_copies(session, ask, tmp_path):
    pytest.importorskip("exiv2")
    i = session.collection.number["side.jpg"]
    session.store.decide([("side.jpg", "hot dog", 1)])
    before = session.collection.path(i).read_bytes()
    assert ask("/api/keywords", {"out": str(tmp_path / "copies")})["written"] == 1
    assert session.collection.path(i).read_bytes() == before
    session.store.remove_label("hot dog")
    assert ask("/api/import/keywords", {})["photos"] == 0
    session.collection.path(i).write_bytes((tmp_path / "copies" / "side.jpg").read_bytes())
    assert ask("/api/import/keywords", {}) | {"version": 0} == {
        **{"version": 0, "photos": 1, "labels": ["hot dog"], "changed": 0, "skipped": []}
    }
    assert session.store.decisions() == {"side.jpg": {"hot dog": 1}}
    session.collection.path(i).write_bytes(before)
    with Image.open(tmp_path / "copies" / "side.jpg") as copy, Image.open(session.collection.path(i)) as original:
        assert b"hot dog" in copy.info["xmp"]
        np.testing.assert_array_equal(np.asarray(copy), np.asarray(original))


def test_an_export_has_decided_photos_that_cannot_be_read_any_more_and_says_what_it_leaves_out(session, ask):
    session.store.decide([("damaged.jpg", "cat", 1), ("0.png", "dog", 1)])
    answer, content = ask.raw("GET", "/api/export?format=csv")
    assert content == b"file,labels\r\n0.png,dog\r\ndamaged.jpg,cat\r\n"
    assert json.loads(answer.headers["X-Left-Out"]) == []


def test_an_export_says_what_it_leaves_out(folder, predictor, tmp_path):
    names = [f"{i}\n.png" for i in range(23)]
    for name in names:
        (folder / name).write_bytes((folder / "0.png").read_bytes())
    session = open_session(folder, None, predictor, tmp_path / "cache")
    session.store.decide([(name, "cat", 1) for name in ("0.png", *names)], ["cat"])
    server, thread, ask = serve(create_app(session))
    answer, content = ask.raw("GET", "/api/export?format=csv")
    told = json.loads(answer.headers["X-Left-Out"])
    assert content == b"file,labels\r\n0.png,cat\r\n" and len(told) == 21 and told[-1] == "and 3 more"
    assert "rename the photo" in told[0]
    server.should_exit = True
    thread.join()
    session.close()


def test_a_label_that_is_named_again_keeps_its_wordings(session, ask):
    ask("/api/labels", {"name": "cow", "wordings": ["cow", "bull"]})
    ask("/api/labels", {"name": "cow", "wordings": []})
    assert ask("/api/state")["labels"][-1]["wordings"] == ["cow", "bull"]


def test_proposals_are_exported_once_they_are_there(folder, predictor, tmp_path):
    session = open_session(folder, None, predictor, tmp_path / "cache")
    session.store.name_label("cat")
    server, thread, ask = serve(create_app(session))
    error = ask("/api/export?format=csv&proposals=1", status=400)["error"]
    assert error.startswith("10 photos have no probabilities yet")
    session.collection.embed_all(lambda: None)
    session.store.set_threshold("cat", 0.0)
    _, content = ask.raw("GET", "/api/export?format=csv&proposals=1")  # nothing was fitted before
    assert content.decode().splitlines()[0] == "file,labels" and content.decode().count(",cat") == 9
    server.should_exit = True
    thread.join()
    session.close()

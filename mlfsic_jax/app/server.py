"""The HTTP interface of the app: JSON for the page, JPEGs, and downloads.

It serves the photos of one folder by their numbers, never a path. Where it listens on the loopback address only, it
answers under a loopback name alone, so that no other site can reach it by a name of its own; elsewhere it wants the
token that stands in the address. What changes something has to be JSON, which other sites' pages cannot send.
"""

import hashlib
import hmac
import importlib.resources
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import Body, FastAPI, Query, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from mlfsic_jax.app import exchange, keywords
from mlfsic_jax.app.collection import Collection
from mlfsic_jax.app.reasons import Reasons
from mlfsic_jax.app.session import Session, marked
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand, printable, shown

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")  # as they stand in an address
_COOKIE = "mlfsic_token"
_MOST = 500  # photos in one answer
_MOST_TOLD = 20  # photos that an export leaves out
_SIDE = 2048  # pixels, of the largest photo that is sent
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'self'",
    **{"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"},
}


def create_app(session: Session, token: str = "") -> FastAPI:
    """The app for one folder. With ``token``, any name of this computer is answered to those who have it."""
    app = FastAPI(openapi_url=None)
    app.middleware("http")(_guard(token))
    app.exception_handler(InputError)(lambda _, error: JSONResponse({"error": str(error)}, 400))
    _add_page(app)
    _add_photos(app, session)
    _add_changes(app, session)
    _add_exchange(app, session)
    return app


def _guard(token: str):
    async def guard(request: Request, call_next):
        given = request.query_params.get("token", "") or request.cookies.get(_COOKIE, "")
        host = request.headers.get("host", "").rsplit(":", 1)[0]
        if token and not hmac.compare_digest(given.encode(), token.encode()):
            return JSONResponse({"error": "open the address that the app printed, with its token"}, 403)
        if not token and host not in LOOPBACK:
            return JSONResponse({"error": f"this app answers on {LOOPBACK[0]} only"}, 403)
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if request.method != "GET" and kind != "application/json":
            return JSONResponse({"error": "changes are sent as application/json"}, 415)
        if "token" in request.query_params and request.url.path == "/":
            response = RedirectResponse("/")
            response.set_cookie(_COOKIE, token, httponly=True, samesite="strict")
            return response
        response = await call_next(request)
        response.headers.update(_HEADERS)
        return response

    return guard


def _add_page(app: FastAPI) -> None:
    pages = importlib.resources.files("mlfsic_jax.app").joinpath("page")
    files = {file.name: file for file in pages.iterdir() if os.path.splitext(file.name)[1] in _TYPES}

    def send(name: str) -> Response:
        if name not in files:
            return JSONResponse({"error": "there is no such file"}, 404)
        kind = _TYPES[os.path.splitext(name)[1]]
        return Response(files[name].read_bytes(), media_type=kind, headers={"Cache-Control": "no-cache"})

    app.get("/")(lambda: send("index.html"))
    app.get("/static/{name}")(send)


def _add_photos(app: FastAPI, session: Session) -> None:
    collection, reasons = session.collection, Reasons(session)

    def number(i: int) -> int:
        if not 0 <= i < len(collection.names):
            raise InputError(f"there is no photo {i}")
        return i

    @app.get("/api/state")
    def state() -> Response:
        return _json(_state(session))

    @app.get("/api/photos")
    def photos(
        order: str = "suggested",
        label: str = "",
        show: str = "all",
        offset: int = 0,
        limit: int = 100,
        ids: list[int] = Query([]),  # noqa: B008, these photos, in this order
    ) -> Response:
        version = session.fitted_version
        found = [number(i) for i in ids] if ids else session.photos(order, show, label)
        some = found[max(0, offset) : max(0, offset) + min(max(0, limit), _MOST)]
        rows = [session.describe(int(i)) for i in some]
        return _json({"version": version, "total": len(found), "photos": rows})

    @app.get("/api/photos/{i}/reasons")
    def why(i: int) -> Response:
        return _json(reasons.describe(number(i)))

    @app.get("/api/labels/{name:path}")
    def label(name: str) -> Response:
        return _json(session.quality(name))

    @app.get("/thumb/{i}")
    def thumbnail(i: int, request: Request) -> Response:
        return _jpeg(request, collection, number(i), lambda: collection.thumbnail(i))

    @app.get("/photo/{i}")
    def photo(i: int, request: Request, side: int = 1600) -> Response:
        side = min(max(16, side), _SIDE)
        return _jpeg(request, collection, number(i), lambda: collection.jpeg(i, side))


def _jpeg(request: Request, collection: Collection, i: int, make: Callable[[], bytes]) -> Response:
    """A photo, unless the browser has it; numbers are given anew when photos come, so it has to ask."""
    state = f"{collection.names[i]} {collection.state(i)}"
    tag = f'"{hashlib.sha256(os.fsencode(state)).hexdigest()[:16]}"'
    headers = {"Cache-Control": "private, no-cache", "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(make(), media_type="image/jpeg", headers=headers)


def _state(session: Session) -> dict[str, Any]:
    collection, store, fitted = session.collection, session.store, session.fitted
    progress, counts = collection.progress(), session.counts()
    labels = [label._asdict() | counts.get(label.name, {}) for label in store.labels()]
    beta = 1.0 if fitted is None else float(fitted.classifier.state["fit"].beta)
    gone = "it was decided, but is not in the folder: move it back, its decisions are kept"
    unreadable = [{"name": collection.names[i], "why": why} for i, why in collection.errors.items()]
    unreadable += [{"name": name, "why": gone} for name in session.missing()]
    note = session.note
    if unread := session.unread():
        note += f"; the text encoder cannot read {', '.join(unread)}: add English wordings, as in chat = cat"
    return {
        **{"folder": collection.folder.resolve().name, "collection": collection.key},
        **{"version": store.version, "fitted": session.fitted_version},
        "fits": session.fits,  # so far: further features, too, change probabilities
        **{"photos": len(collection.names), "embedded": progress.embedded, "rate": progress.rate},
        **{"left_s": progress.left_s, "unreadable": unreadable[:20], "labels": labels, "can_undo": store.can_undo},
        **{"names_used": beta > 0, "note": note},
    }


def _add_changes(app: FastAPI, session: Session) -> None:
    store, collection = session.store, session.collection

    def answer(version: int, **more: Any) -> Response:
        session.changed()
        return _json({"version": version, **more})

    @app.post("/api/decide")
    def decide(body: dict[str, Any] = Body()) -> Response:  # noqa: B008, FastAPI's way
        if _get(body, "collection", str) != collection.key:  # photos came or went, and the app was started again
            raise InputError("the photos of the folder are others now: load the page again")
        found = []
        for one in _get(body, "decisions", list):
            i, value = _get(one, "photo", int), one.get("value")
            if not 0 <= i < len(collection.names) or value not in (None, 0, 1):
                raise InputError(f"no photo {shown(i)}, or no value 1, 0 or null: {shown(value)}")
            found.append((collection.names[i], _get(one, "label", str), value))
        return answer(store.decide(found))

    @app.post("/api/undo")
    def undo() -> Response:
        names = store.undo()
        numbers = [collection.number[name] for name in names if name in collection.number]
        return answer(store.version, photos=numbers)

    @app.post("/api/labels")
    def add(body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        wordings = [_typed(text, str, "wordings") for text in _typed(body.get("wordings", []), list, "wordings")]
        return answer(store.name_label(_get(body, "name", str), wordings))

    @app.post("/api/labels/remove")
    def remove(body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        return answer(store.remove_label(_get(body, "name", str)))

    @app.post("/api/threshold")
    def threshold(body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        return answer(store.set_threshold(_get(body, "label", str), _get(body, "value", (int, float))))


def _add_exchange(app: FastAPI, session: Session) -> None:
    store, collection = session.store, session.collection

    def photos(proposals: bool) -> Iterator[exchange.Marked]:
        if proposals:
            session.catch_up()
        for i, name in enumerate(collection.names):
            if i not in collection.errors or store.decided(name):
                yield exchange.Marked(name, collection.size(i), *marked(session, i))

    @app.get("/api/export")
    def export(format: str = "csv", proposals: bool = False) -> Response:
        names = [label.name for label in store.labels()]
        file, kind, content = exchange.export(
            *(photos(proposals), names, session.thresholds(), format, proposals),
            folder=collection.folder.resolve().name,
            skipped=(skipped := []),
        )
        more = len(skipped) - _MOST_TOLD
        told = skipped[:_MOST_TOLD] + [f"and {more} more"] * (more > 0)
        headers = {"Content-Disposition": f'attachment; filename="{file}"', "X-Left-Out": json.dumps(told)}
        return StreamingResponse(content, media_type=kind, headers=headers)

    @app.post("/api/import")
    def read(body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        name, content = _get(body, "name", str), _get(body, "content", str)
        labels, names, skipped = exchange.read(
            name, content.encode(errors="surrogatepass"), collection.names, collection.folder
        )
        return _json(_take(session, labels, names, corrects=True) | {"skipped": skipped})

    @app.post("/api/import/keywords")
    def read_keywords() -> Response:
        labels, skipped = {}, []
        for i, name in enumerate(collection.names):
            try:
                if found := keywords.read(collection.path(i)):
                    labels[name] = found
            except InputError as error:
                skipped.append(str(error))
        if len(skipped) == len(collection.names):  # the library is missing
            raise InputError(skipped[0])
        names = list(dict.fromkeys(word for words in labels.values() for word in words))
        return _json(_take(session, labels, names) | {"skipped": skipped})

    @app.post("/api/keywords")
    def write_keywords(body: dict[str, Any] = Body()) -> Response:  # noqa: B008
        out, thresholds = expand(printable(_get(body, "out", str), "out")), session.thresholds()
        given = []
        for one in photos(bool(body.get("proposals"))):
            above = [name for name, p in one.proposed.items() if p > thresholds[name]] if body.get("proposals") else []
            if one.yes or above:
                given.append((one.name, (*one.yes, *above)))
        skipped = keywords.write(Path(collection.folder), out, given)
        return _json({"written": len(given) - len(skipped), "out": str(out), "skipped": skipped})


def _take(session: Session, labels, names, corrects: bool = False) -> dict[str, Any]:
    """Takes labels over; with ``corrects`` also what a file no longer says, and that a photo has none of its labels."""
    store, found = session.store, {(photo, name): 1 for photo, given in labels.items() for name in given}
    decided = {photo: store.decided(photo) for photo in labels}
    for photo, given in labels.items() if corrects else ():
        former = decided[photo]
        found |= {(photo, name): 0 for name in names if name not in given and (former.get(name) or not given)}
    changed = sum(decided[photo].get(name, value) != value for (photo, name), value in found.items())
    store.decide(((photo, name, value) for (photo, name), value in found.items()), names)
    session.changed()
    return {"version": store.version, "photos": len(labels), "labels": list(names), "changed": changed}


def _json(value: Any) -> Response:
    # ensure_ascii: a photo's name need not be text in UTF-8
    return Response(json.dumps(value), media_type="application/json", headers={"Cache-Control": "no-store"})


def _get(body: Any, name: str, kind: Any) -> Any:
    if not isinstance(body, dict):
        raise InputError(f"{shown(body)} is no object with the field {name}")
    return _typed(body.get(name), kind, name)


def _typed(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{name} is missing or wrong: {shown(value)}")
    return value

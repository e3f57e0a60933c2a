"""Labels a folder of photos in the browser: python -m mlfsic_jax.app --images=DIR [--labels="cat,dog"].

The page proposes labels from their names and from what was confirmed so far. Decisions are kept in labels.sqlite in the
folder, at once; features and thumbnails in the cache.
"""

import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

from mlfsic_jax.run import ready
from mlfsic_jax.run.labels import parse_labels
from mlfsic_jax.system.command import Parser, cli_errors, prepare_jax, run_main
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import expand, reported, shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Flags in, a server that runs until it is interrupted."""
    parser = Parser("mlfsic_jax.app", __doc__)
    parser.add_argument("--images", required=True, help="the folder of photos")
    parser.add_argument("--labels", help='names to begin with: "cat,dog"; wordings as "dog = dog | puppy"')
    parser.add_argument("--state", help="where decisions are kept; default labels.sqlite in the folder")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other computers in, with a token")
    parser.add_argument("--port", type=int, default=8765, help="default 8765; 0 for any that is free")
    parser.add_argument("--quality", choices=ready.QUALITIES, default="standard", help="of the model")
    parser.add_argument("--workdir", help="an exported model in place of the one out of the box")
    parser.add_argument("--download", action="store_true", help="fetch the model's files where they are missing")
    parser.add_argument("--data_dir", default="data", help="where those files are; default data")
    parser.add_argument("--cache_dir", default="cache", help="where features and programs are kept; default cache")
    flags = parser.parse_args(arguments)
    prepare_jax(flags.cache_dir)
    with cli_errors("all decisions are kept"):
        _serve(flags)


def _serve(flags) -> None:
    try:
        import uvicorn

        from mlfsic_jax.app.server import LOOPBACK, create_app
        from mlfsic_jax.app.session import open_session
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install 'mlfsic_jax[app]'") from error
    folder, (names, wordings) = expand(flags.images), parse_labels(flags.labels) if flags.labels else ([], {})
    if not folder.is_dir():
        raise InputError(f"--images={flags.images} is no folder")
    host = flags.host.strip("[]")
    server = _listen(host, flags.port)
    predictor = ready.load(flags.workdir, quality=flags.quality, data_dir=flags.data_dir, fetch=flags.download)
    session = open_session(folder, Path(flags.state) if flags.state else None, predictor, expand(flags.cache_dir))
    try:
        for name in names:
            session.store.name_label(name, wordings.get(name, ()))
        written = f"[{host}]" if ":" in host else host
        token = "" if written in LOOPBACK else secrets.token_urlsafe(16)
        session.start()
        reached = socket.gethostname() if host in ("0.0.0.0", "::", "") else written
        address = f"http://{reached}:{server.getsockname()[1]}/" + (f"?token={token}" if token else "")
        done = session.collection.progress().embedded
        print(f"{len(session.collection.names)} photos, {done} ready; decisions go to {session.store.path}")
        if missing := session.missing():
            how = "decisions about them are kept until they are back"
            print(f"{len(missing)} decided photos are not in the folder, such as {shown(missing[0])}: {how}")
        print(f"open {address} and end with Ctrl-C", flush=True)
        app = create_app(session, token)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[server])
    finally:
        session.close()


def _listen(host: str, port: int) -> socket.socket:
    what = f"--host={host} --port={port} cannot be listened on"
    with reported(what, "give another --port, or --host", (OSError, OverflowError)):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.socket(family)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen()  # at once: else another app could take the same port while the model loads
    return server


if __name__ == "__main__":
    run_main(main)

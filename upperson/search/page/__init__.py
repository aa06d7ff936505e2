"""A page in the browser that searches an index, served on this computer."""

from __future__ import annotations

import importlib.util
import ipaddress
import secrets
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from upperson.errors import SearchError

if TYPE_CHECKING:
    from upperson.search.gallery import Gallery

SHORTEST_TOKEN = 16  # characters
BUSY = 64  # connections at once; further ones are refused
PATIENCE = 3  # seconds that a running search is given after Ctrl-C


def listen(host: str = "127.0.0.1", port: int = 8765, token: str | None = None) -> socket.socket:
    """The socket of a server. Raises SearchError if the page cannot be served there, before anything large is loaded.

    Port 0 lets the system choose. Other computers reach the socket if `host` is not an address of this computer alone.
    """
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise SearchError("the page needs starlette and uvicorn: pip install 'upperson[serve]'")
    if token is not None and not (len(token) >= SHORTEST_TOKEN and token.isascii() and token.isprintable()):
        raise SearchError(f"--token: expected at least {SHORTEST_TOKEN} printable ASCII characters")
    if not 0 <= port <= 65535:
        raise SearchError(f"--port: expected a number from 1 to 65535, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise SearchError(f"--host: {host!r} is not a name or an address of this computer ({error})") from error
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen()
    except OSError as error:
        opened.close()
        raise SearchError(
            f"cannot listen on port {port} of {host} ({error.strerror}); expected a free one, as with "
            f"--port {port + 1 if port < 65535 else 8765}"
        ) from error
    return opened


def serve(
    gallery: Gallery,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    *,
    opened: socket.socket | None = None,
) -> None:
    """Prints the address of the page, and serves it until Ctrl-C. `opened`: the socket of an earlier call of `listen`.

    On an address that other computers reach, a token is needed, and made if none is given. Raises SearchError as
    `listen` does.
    """
    with opened or listen(host, port, token) as bound:
        import uvicorn  # an optional extra

        from upperson.search.page.app import make_app

        address, port = bound.getsockname()[:2]
        local = ipaddress.ip_address(address).is_loopback
        if not local:
            token = token or secrets.token_urlsafe(24)
        names = (
            {host.lower(), address} if local else {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        )
        app = make_app(gallery, hosts=frozenset(names), any_address=not local, token=token)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="off",
                proxy_headers=False,
                limit_concurrency=BUSY,
                timeout_graceful_shutdown=PATIENCE,
            )  # fmt: skip
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"{gallery.name}: {len(gallery):,} images; Ctrl-C ends", flush=True)
        print(f"http://{shown}:{port}/" + (f"?token={token}" if token else ""), flush=True)
        with suppress(KeyboardInterrupt):  # raised by uvicorn once the running requests have been answered
            server.run(sockets=[bound])
        print("stopped", flush=True)

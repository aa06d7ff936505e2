"""Who may ask the server: the names that it answers to, its token, and no other site that the same browser shows."""

import hmac
import ipaddress
import re
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """ASGI middleware. `hosts`: the names in the Host header that are answered, in lower case without a port.

    With `any_address` every IP address is answered too: a foreign site can bind a name of its own to this server (DNS
    rebinding), but not an address. With a `token` each request must carry it: in the header `Authorization: Bearer`, in
    a cookie, or once in the address (?token=), which sets the cookie.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], any_address: bool = False, token: str | None = None):
        self.app = app
        self.hosts = hosts
        self.any_address = any_address
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self.refusal(scope) or self.admission(scope) or self.app
        await answer(scope, receive, send_guarded)

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that another site makes, or that reaches this server by a foreign name."""
        headers = Headers(scope=scope)
        host = host_name(headers.get("host", ""))
        if host is None or not (host in self.hosts or (self.any_address and is_address(host))):
            return PlainTextResponse("This server does not answer to this host name.\n", 421)
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if scope["method"] in ("GET", "HEAD"):
            # A link on another site may lead here, but that site may not embed the images or measure the answers.
            foreign = site in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate"
        else:
            foreign = (site or "same-origin") not in ("same-origin", "none") or (
                origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower()
            )
        return PlainTextResponse("Requests of other sites are refused.\n", 403) if foreign else None

    def admission(self, scope: Scope) -> Response | None:
        """The answer to a request without the token, or with the token in its address."""
        if self.token is None:
            return None
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.fits(bearer.strip()):
            return None
        name = f"upperson-{scope['server'][1] if scope.get('server') else ''}"  # cookies do not tell ports apart
        params = QueryParams(scope["query_string"])
        if scope["method"] == "GET" and self.fits(params.get("token", "")):
            rest = urlencode([(key, value) for key, value in params.multi_items() if key != "token"])
            answer = RedirectResponse("/?" + rest if rest else "/", 303)
            answer.set_cookie(name, self.token, httponly=True, samesite="lax")
            return answer
        if any(self.fits(value) for value in cookies(headers, name)):
            return None
        return PlainTextResponse(
            "This search needs a token. Open the address that `upperson search serve` printed, with its ?token=…\n",
            401,
            {"WWW-Authenticate": "Bearer"},
        )

    def fits(self, token: str) -> bool:
        return hmac.compare_digest(token.encode("utf-8", "surrogatepass"), (self.token or "").encode())


def cookies(headers: Headers, name: str) -> list[str]:
    """The values of a cookie."""
    found = []
    for header in headers.getlist("cookie"):
        try:
            cookie = SimpleCookie(header)
        except CookieError:
            continue
        if name in cookie:
            found.append(cookie[name].value)
    return found


def host_name(header: str) -> str | None:
    """The name or address in a Host header, in lower case; None for a header that is not a host."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+?)\.?)(?::[0-9]{1,5})?", header.lower())
    return (found[1] or found[2]) if found else None


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

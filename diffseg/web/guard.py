"""Which requests the explorer answers: those of its own page, on this machine or with a token."""

import hmac
import ipaddress
import json
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .pictures import TooLargeError

COOKIE = 'diffseg_token'
MIN_TOKEN = 16
SAFE = ('GET', 'HEAD')
SECURITY_HEADERS = {
    'content-security-policy': (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    'x-content-type-options': 'nosniff',
    'x-frame-options': 'DENY',
    'referrer-policy': 'no-referrer',
    'cross-origin-opener-policy': 'same-origin',
    'cross-origin-resource-policy': 'same-origin',
}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return host == 'localhost' or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, token: str | None) -> None:
    """Raise a ValueError if the page would be open to others without a token, or with one that is easily guessed."""
    if token is not None and len(token) < MIN_TOKEN:
        raise ValueError(f'the token has {len(token)} characters; take at least {MIN_TOKEN} random ones')
    if token is None and not is_loopback(host):
        raise ValueError(
            f'others can reach {host}; give --token, or better stay on 127.0.0.1 and forward the port with ssh -L'
        )


class Guard:
    """Refuse requests of other pages, by other names, without the token, or with too large a body.

    * Host names the page: a loopback name at any port (`ssh -L` changes it), the `host` it listens at, or where it
      listens at all addresses, any address and the name of this machine. So no other name that is made to lead here
      (DNS rebinding) reaches it.
    * Origin, where a browser sends it, is that of Host; Sec-Fetch-Site is 'same-origin', except for an address that a
      person typed and for links to the page. So other pages neither change nor read anything.
    * The token, if there is one, is in a cookie, which `/?token=...` sets, or in `Authorization: Bearer`.

    All responses have `SECURITY_HEADERS`.

    Args:
        app: what requests are passed to.
        host: at which the server listens.
        token: which requests need; None on loopback addresses.
        max_body: bytes of a body, other than those of a picture.
        max_upload: bytes of a picture.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None, max_body: int, max_upload: int) -> None:
        check_host(host, token)
        self.app = app
        self.wildcard = host in ('0.0.0.0', '::')
        self.names = {host.lower(), socket.gethostname().lower()} if self.wildcard else {host.lower()}
        self.token = token
        self.max_body = max_body
        self.max_upload = max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request."""
        if scope['type'] == 'lifespan':
            return await self.app(scope, receive, send)
        if scope['type'] != 'http':
            raise ValueError('only HTTP is spoken here')

        async def send_secured(message: Message) -> None:
            if message['type'] == 'http.response.start':
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault('cache-control', 'no-store')
            await send(message)

        headers = Headers(scope=scope)
        query = parse_qs(scope['query_string'].decode('latin-1'))
        refusal = self._refuse_origin(scope, headers)
        if refusal is None and self.token is not None:
            if scope['path'] == '/' and self._is_token(query.get('token', [''])[0]):
                cookie = f'{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/'
                return await respond(send_secured, 303, '', {'location': '/', 'set-cookie': cookie})
            if not self._is_token(token_of(headers)):
                refusal = 401, 'the token is missing or wrong; open the address that the explorer printed at its start'
        limit = self.max_upload if scope['path'] == '/api/pictures' else self.max_body
        if refusal is None and not headers.get('content-length', '0').isdecimal():
            refusal = 400, 'Content-Length is no number'
        if refusal is None and int(headers.get('content-length', '0')) > limit:
            refusal = 413, f'the request has {headers["content-length"]} bytes; at most {limit} are taken'
        if refusal is not None:
            return await respond(send_secured, refusal[0], json.dumps({'error': refusal[1]}))
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get('body', b''))
            if received > limit:
                raise TooLargeError(f'the request has more than {limit} bytes')
            return message

        await self.app(scope, receive_bounded, send_secured)

    def _refuse_origin(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        host = headers.get('host', '')
        try:
            name = urlsplit(f'//{host}').hostname or ''
        except ValueError:
            name = ''
        if not self._is_own(name):
            return 421, f'the host {host[:100]!r} is not that of the explorer; open the address that it printed'
        origin = headers.get('origin')
        if origin is not None and origin != f'{scope["scheme"]}://{host}':
            return 403, f'requests of {origin[:100]!r} are refused; only the page of the explorer may make them'
        site = headers.get('sec-fetch-site')  # absent where no browser asks
        opened = scope['method'] in SAFE and (site == 'none' or scope['path'] == '/')  # typed, or a link to the page
        if site not in (None, 'same-origin') and not opened:
            return 403, 'requests of other pages are refused'
        return None

    def _is_own(self, name: str) -> bool:
        if is_loopback(name) or name in self.names:
            return True
        if not self.wildcard:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _is_token(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), (self.token or '').encode())


def token_of(headers: Headers) -> str:
    """The token that a request carries; '' if none."""
    scheme, _, value = headers.get('authorization', '').partition(' ')
    if scheme.lower() == 'bearer':
        return value
    try:
        morsel = SimpleCookie(headers.get('cookie', '')).get(COOKIE)
    except CookieError:
        return ''
    return '' if morsel is None else morsel.value


async def respond(send: Send, status: int, body: str, headers: dict[str, str] | None = None) -> None:
    """Answer a request without the application."""
    fields = {'content-type': 'application/json', **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({'type': 'http.response.start', 'status': status, 'headers': raw})
    await send({'type': 'http.response.body', 'body': body.encode()})

"""The listening socket and the HTTP protocol class under the application."""

from __future__ import annotations

import errno
import socket
from typing import Any

import msgspec
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ..common.errors import ConfigError
from .errors import bad_request, error_object

BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Bind before the model is loaded, so that a taken port costs nothing. Raises ConfigError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"--host {host!r} cannot be used: {error.strerror or error}.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_error(host, port, error) from None
    listener.setblocking(False)
    return listener


def _bind_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"Port {port} on {host} is in use. Stop what listens there or choose another --port "
            "(0 takes any free one)."
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"Port {port} needs more rights. Choose a --port above 1023.")
    return ConfigError(f"{host}:{port} cannot be bound: {error.strerror}.")


def address_of(listener: socket.socket) -> str:
    """The URL under which a client on this machine reaches the listener."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


_Base: Any = AutoHTTPProtocol


class HttpProtocol(_Base):  # type: ignore[misc]
    """Uvicorn's protocol; bytes that are no HTTP get an error in the API's own shape."""

    def send_400_response(self, msg: str) -> None:
        error = bad_request(f"This is no HTTP request: {msg}", None, "invalid_http")
        body = msgspec.json.encode(error_object(error.body))
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()

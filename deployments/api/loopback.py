"""Who is on this machine: until callers have keys, only those may change what is served."""

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from cluster.errors import PeerRefused


def check_local(connection: HTTPConnection) -> None:
    """Raise `PeerRefused` unless an HTTP caller is on this machine and no web page speaks through its browser.

    A page of another site may send forms here, which says so in Origin; or it has its own name point here, which
    then stands in Host.
    """
    peer = None if connection.client is None else connection.client.host
    if not is_local(peer):
        raise PeerRefused(f"{peer} is another machine; domains are changed from this one only: call 127.0.0.1.")
    for header in ("host", "origin"):
        if (given := connection.headers.get(header)) is not None and not is_local(_host(given)):
            raise PeerRefused(
                f"The header {header} is {given[:100]!r}; domains are changed by callers of 127.0.0.1 only."
            )


def is_local(host: str | None) -> bool:
    """Whether a host, by name or address, is this machine as it calls itself."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _host(text: str) -> str | None:
    """The host of `127.0.0.1:8000` or of a URL."""
    try:
        return urlsplit(text if "://" in text else f"//{text}").hostname
    except ValueError:
        return None

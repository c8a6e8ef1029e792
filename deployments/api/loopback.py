"""Who is on this machine: where there are no keys, only those are served."""

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from cluster.errors import PeerRefused

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


def check_local(connection: HTTPConnection) -> None:
    """Raise `PeerRefused` unless an HTTP caller is on this machine and no web page speaks through its browser.

    A page of another site may send forms here, which says so in Origin; or it has its own name point here, which
    then stands in Host. What a proxy passes on comes from wherever: its headers may be anybody's, so that they are
    reason to refuse and never to believe.
    """
    peer = None if connection.client is None else connection.client.host
    if not is_local(peer):
        raise PeerRefused(
            f"{peer} is another machine; without keys only this one is served: call 127.0.0.1, or ask who runs the "
            "server to give out keys."
        )
    for header in _FORWARDED:
        if header in connection.headers:
            raise PeerRefused(
                f"The header {header} says that a proxy passed the request on; without keys only callers of "
                "127.0.0.1 itself are served: ask who runs the server to give out keys."
            )
    for header in ("host", "origin"):
        if (given := connection.headers.get(header)) is not None and not is_local(_host(given)):
            raise PeerRefused(
                f"The header {header} is {given[:100]!r}; without keys only callers of 127.0.0.1 are served."
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


def is_local_peer(peer: str) -> bool:
    """Whether a peer, as gRPC writes it, is this machine."""
    kind, _, address = peer.partition(":")
    host = address.rpartition(":")[0]
    return kind == "unix" or (kind == "ipv4" and host.startswith("127.")) or (kind == "ipv6" and host in _LOOPBACK_6)


_LOOPBACK_6 = ("%5B::1%5D", "[::1]", "%5B::ffff:127.0.0.1%5D", "[::ffff:127.0.0.1]")
"""gRPC writes the brackets escaped; an IPv6 socket sees IPv4 callers as ::ffff:."""


def _host(text: str) -> str | None:
    """The host of `127.0.0.1:8000` or of a URL."""
    try:
        return urlsplit(text if "://" in text else f"//{text}").hostname
    except ValueError:
        return None

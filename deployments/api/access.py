"""Who may do what, over both wires: by key where there are keys, else by being on this machine.

Decision 19 says why.
"""

from collections.abc import Sequence

from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.grpc_util import RayServegRPCContext
from starlette.requests import HTTPConnection

from cluster.config.serving import AppSettings
from cluster.errors import InvalidKey, PeerRefused, RoleRefused
from deployments.api.keys import Keys, Role
from deployments.api.loopback import check_local, is_local_peer

CALL_ROLES = {
    "Generate": Role.INFER,
    "Complete": Role.INFER,
    "Route": Role.INFER,
    "Classify": Role.INFER,
    "Feedback": Role.INFER,
    "ListDomains": Role.INFER,
    "GetDomain": Role.INFER,
    "AddDomain": Role.ADMIN,
    "RemoveDomain": Role.ADMIN,
    "RollbackDomain": Role.ADMIN,
}
"""What each method of zephyra.v1.Zephyra asks for. Over HTTP everything asks for infer (`gate.py`), and what changes
domains for admin (`domains_http.py`)."""


class Access:
    """The rule. With `keys` every caller needs one, on this machine too: behind a proxy all seem to be on it.

    Without keys callers on this machine may do everything; others nothing, or with `insecure` all but change domains.
    With `plain_grpc_local` whoever is elsewhere comes over TLS to be served over gRPC. Behind HAProxy nobody's place
    is known: `peers_known` is false.
    """

    def __init__(
        self,
        keys: Keys | None = None,
        insecure: bool = False,
        plain_grpc_local: bool = False,
        peers_known: bool = not RAY_SERVE_ENABLE_HA_PROXY,
    ) -> None:
        self._keys, self._insecure = keys, insecure
        self._plain_grpc_local, self._peers_known = plain_grpc_local, peers_known

    def check_request(self, connection: HTTPConnection, needed: Role) -> None:
        """Raise unless an HTTP caller may do what asks for `needed`.

        `InvalidKey` without a key that is known, `RoleRefused` with one that does not suffice, `PeerRefused` where
        there are no keys, `KeysUnavailable`.
        """
        if self._keys is not None:
            _check_key(self._keys, connection.headers.getlist("authorization"), needed)
        elif not self._is_open(needed):
            check_local(connection)

    def check_call(self, context: RayServegRPCContext, needed: Role) -> None:
        """The same of a gRPC caller."""
        is_local = is_local_peer(context.peer())
        if self._plain_grpc_local and not is_local and not _is_over_tls(context):
            raise PeerRefused(
                f"{context.peer()} is another machine; this port serves callers on its own machine: use one with TLS."
            )
        if self._keys is not None:
            values = [str(value) for name, value in context.invocation_metadata() if name == "authorization"]
            _check_key(self._keys, values, needed)
        elif not self._is_open(needed) and not is_local:
            raise PeerRefused(
                f"{context.peer()} is another machine; without keys only this one is served: call 127.0.0.1, or ask "
                "who runs the server to give out keys."
            )

    def _is_open(self, needed: Role) -> bool:
        """Whether anybody may, where there are no keys. Raises `PeerRefused` when it depends on what is not known."""
        if self._insecure and needed is Role.INFER:
            return True
        if not self._peers_known:
            raise PeerRefused(
                "Behind HAProxy every caller seems to be on this machine, so that nobody is served without keys; give "
                "out keys and set keys_file."
            )
        return False


def access_of(settings: AppSettings) -> Access:
    """The rule of these settings."""
    file = settings.resolved_keys_file()
    return Access(None if file is None else Keys(file), settings.insecure, settings.plain_grpc_local)


def _check_key(keys: Keys, values: Sequence[str], needed: Role) -> None:
    """Raise unless these values of `authorization` are one key that is known and suffices."""
    scheme, _, key = values[0].strip().partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not key:
        raise InvalidKey("There is no API key in the request; send one as `authorization: Bearer KEY`.")
    owner = keys.owner(key.strip())
    if owner is None:
        raise InvalidKey("The API key is not known, or not any more; ask who runs this server for one.")
    if not owner.role.allows(needed):
        raise RoleRefused(
            f"The key {owner.name} has the role {owner.role}, and this needs {needed}; ask who runs this server."
        )


def _is_over_tls(context: RayServegRPCContext) -> bool:
    return b"ssl" in context.auth_context().get("transport_security_type", ())

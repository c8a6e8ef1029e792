"""The gRPC service as Serve's proxy adds it: on the plain port that Ray opens, and on one with TLS where that is set.

Ray 2.60 has no option for a certificate, but it hands its server to this function before it starts it.
"""

import ssl
from pathlib import Path
from typing import Any

import grpc
from ray.serve._private.grpc_util import gRPCGenericServer

from cluster.environment import grpc_tls
from cluster.errors import InvalidInput
from deployments.protos import zephyra_pb2_grpc


def add_service(servicer: object, server: gRPCGenericServer) -> None:
    """Add zephyra.v1.Zephyra to `server`, and a port with TLS if the environment says so. Raises `InvalidInput`."""
    add: Any = zephyra_pb2_grpc.add_ZephyraServicer_to_server  # generated, untyped
    add(servicer, server)
    if (tls := grpc_tls()) is None:
        return
    check_certificate(tls.cert, tls.key)
    credentials = grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.cert.read_bytes())])
    server.add_secure_port(tls.address, credentials)


def check_certificate(cert: Path, key: Path) -> None:
    """Raise `InvalidInput` unless these are the PEM files of a certificate and of its private key, without password."""
    try:
        # Without a password given, OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{str(cert)!r} and {str(key)!r} cannot be used for TLS ({error}); expected PEM files of a certificate "
            "and its private key, without a password."
        ) from error

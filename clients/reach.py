"""Is the server there, and is it the one that the certificate vouches for: asked by one handshake.

Flower's own connection retries in silence when a port speaks another protocol; a plain TLS
handshake before it says at once what is wrong.
"""

import socket
import ssl
from pathlib import Path
from typing import Literal

from fedcunet.processes import host_and_port

Answer = Literal["ready", "away", "stranger", "wants TLS", "has no TLS"]

PROBE_SECONDS = 5.0


def probe(server: str, authority: Path | None) -> tuple[Answer, str]:
    """How the server answers, and the details in the system's words.

    Args:
        server: HOST:PORT.
        authority: certificate to check it against; None for a server without TLS.
    """
    host, port = host_and_port(server, "--server")
    try:
        with socket.create_connection((host, port), timeout=PROBE_SECONDS) as plain:
            if authority is None:
                return ("wants TLS", "") if _speaks_tls(plain) else ("ready", "")
            return _handshake(plain, host, authority)
    except OSError as error:
        return "away", error.strerror or str(error)


def _handshake(plain: socket.socket, host: str, authority: Path) -> tuple[Answer, str]:
    context = ssl.create_default_context(cafile=str(authority))
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(plain, server_hostname=host):
            return "ready", ""
    except ssl.SSLCertVerificationError as error:
        return "stranger", error.verify_message
    except ssl.SSLError as error:
        return "has no TLS", error.reason or str(error)
    except TimeoutError:  # a gRPC port without TLS says nothing to a handshake
        return "has no TLS", "no answer to a TLS handshake"


def _speaks_tls(plain: socket.socket) -> bool:
    """Whether the port answers a TLS handshake; nothing is trusted or sent after it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(plain):
            return True
    except OSError:
        return False

"""A certificate authority for a lab, a server's certificate from it, and checks of given ones.

ECDSA on P-256 with SHA-256, as gRPC and every browser take it. The authority's key signs one
certificate and can then be put away: nothing that runs needs it.
"""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcunet.errors import UserError
from fedcunet.files import write_atomically

# Flower's own processes reach the server's loopback port under the first, with this certificate.
ALWAYS = ("127.0.0.1", "localhost")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
DNS_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificates:
    """Files of TLS at the server.

    Attributes:
        authority: certificate that clients check the server against.
        certificate: the server's.
        key: the server's, readable by its owner only.
    """

    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def in_folder(cls, folder: Path) -> "Certificates":
        """`ca.pem`, `server.pem` and `server.key` in `folder`."""
        return cls(
            authority=folder / "ca.pem",
            certificate=folder / "server.pem",
            key=folder / "server.key",
        )

    def check(self) -> None:
        """Raises UserError if the files cannot serve: the line says which and why."""
        for path in (self.authority, self.certificate, self.key):
            if not path.is_file():
                raise UserError(
                    f"certificate {path}: not found; `python -m server certs` makes a set for a lab"
                )
        if self.key.stat().st_mode & 0o077:
            raise UserError(
                f"key {self.key}: others on this machine may read it; chmod 600 {self.key}"
            )
        found = _read(self.certificate)
        _read(self.authority)
        now = datetime.datetime.now(datetime.UTC)
        if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
            raise UserError(
                f"certificate {self.certificate}: valid from {found.not_valid_before_utc:%Y-%m-%d} "
                f"to {found.not_valid_after_utc:%Y-%m-%d}, today is {now:%Y-%m-%d}"
            )
        if "127.0.0.1" not in names_of(found):
            raise UserError(
                f"certificate {self.certificate}: expected 127.0.0.1 among its names, which "
                f"Flower's own processes use, found {', '.join(names_of(found)) or 'none'}"
            )


def names_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName)] + [
        str(address) for address in names.get_values_for_type(x509.IPAddress)
    ]


def names_of_file(path: Path) -> list[str]:
    """As `names_of`, of a file. Raises UserError if it cannot be read."""
    return names_of(_read(path))


def make_certificates(folder: Path, names: Sequence[str], days: int) -> Certificates:
    """Writes an authority and a server certificate for `names` and loopback into `folder`.

    Args:
        folder: made if it is not there, readable by its owner only; it must hold no certificate.
        names: DNS names and IP addresses under which clients reach the server.
        days: how long both are valid.

    Raises:
        UserError: there are certificates already, or a name is none.
    """
    files, authority_key_path = Certificates.in_folder(folder), folder / "ca.key"
    taken = [path for path in (files.authority, files.certificate, files.key) if path.exists()]
    if taken:
        raise UserError(f"certificate {taken[0]}: is there already; it is not overwritten")
    general_names = [_general_name(name) for name in dict.fromkeys([*ALWAYS, *names])]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    now = datetime.datetime.now(datetime.UTC)
    valid = (now - datetime.timedelta(minutes=5), now + datetime.timedelta(days=days))
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _authority(authority_key, valid)
    server = _server(server_key, authority, authority_key, general_names, valid)
    for path, key in ((authority_key_path, authority_key), (files.key, server_key)):
        write_secret(
            path,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )
    write_atomically(files.authority, authority.public_bytes(serialization.Encoding.PEM))
    write_atomically(files.certificate, server.public_bytes(serialization.Encoding.PEM))
    return files


def write_secret(path: Path, content: bytes) -> None:
    """A new file that only its owner can read, from its first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


Validity = tuple[datetime.datetime, datetime.datetime]


def _authority(key: ec.EllipticCurvePrivateKey, valid: Validity) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedcunet lab authority")])
    usage = _key_usage(signs_certificates=True)
    return (
        _builder(name, name, key.public_key(), valid)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    names: list[x509.GeneralName],
    valid: Validity,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedcunet server")])
    return (
        _builder(subject, authority.subject, key.public_key(), valid)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            # Python 3.13 and later ask for it (VERIFY_X509_STRICT).
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, valid: Validity
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=valid[0],
        not_valid_after=valid[1],
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    """An IP address as an address, everything else as a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not DNS_NAME.fullmatch(name):
        raise UserError(f"--name: expected a DNS name or an IP address, found '{name}'")
    return x509.DNSName(name)


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"certificate {path}: cannot be read: {error}") from None

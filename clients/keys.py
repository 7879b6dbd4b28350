"""A node's key: ECDSA on P-384 in OpenSSH's form, as Flower's node authentication takes it."""

import base64
import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcunet.errors import UserError


def make_key(path: Path, comment: str) -> Path:
    """Writes a new private key, readable by its owner only, and `PATH.pub`; returns the latter.

    Raises:
        UserError: there is a file already; keys are never overwritten.
    """
    public_path = path.with_name(path.name + ".pub")
    for taken in (path, public_path):
        if taken.exists():
            raise UserError(f"key {taken}: is there already; it is not overwritten")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
    public_path.write_text(f"{_public_text(key)} {comment}\n", encoding="utf-8")
    return public_path


def check_key(path: Path) -> str:
    """The fingerprint of a private key as `ssh-keygen -l` shows it.

    Raises:
        UserError: it is not there, not such a key, or others on this machine may read it.
    """
    try:
        mode = path.stat().st_mode
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise UserError(f"key {path}: not found; `python -m clients keygen` makes one") from None
    except Exception as error:
        raise UserError(f"key {path}: expected an OpenSSH private key: {error}") from None
    if mode & 0o077:
        raise UserError(f"key {path}: others on this machine may read it; chmod 600 {path}")
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"key {path}: expected ECDSA (`python -m clients keygen`), found another")
    return fingerprint(_public_text(key))


def fingerprint(public_text: str) -> str:
    """SHA-256 of a public key in OpenSSH's form."""
    digest = hashlib.sha256(base64.b64decode(public_text.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _public_text(key: ec.EllipticCurvePrivateKey) -> str:
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return public.decode()

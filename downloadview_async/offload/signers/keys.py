"""Reads and checks the keys of signers, and signs with private keys. No message has a part of a key."""

import binascii
import os
from base64 import b64decode
from collections.abc import Callable
from typing import Any

from downloadview_async.errors import ConfigurationError

_SHORTEST = 16
_MOST_BYTES = 1 << 20


def secret_text(name: str, secret: str | None) -> str:
    """Return a secret that is a text. Raises `ConfigurationError` for one that is missing, short or malformed."""
    if not secret or not secret.isprintable() or secret != secret.strip():
        raise ConfigurationError(
            f"{name}: missing, or with a blank around it: give the secret as the provider shows it"
        )
    _check_length(name, len(secret))
    return secret


def secret_base64(name: str, secret: str | None) -> bytes:
    """Return the bytes of a secret in base64. Raises `ConfigurationError`."""
    try:
        decoded = b64decode(secret_text(name, secret), validate=True)
    except ValueError:
        raise ConfigurationError(f"{name}: not base64: give the key as the provider shows it") from None
    _check_length(name, len(decoded))
    return decoded


def secret_hex(name: str, secret: str | None) -> bytes:
    """Return the bytes of a secret in hexadecimal digits. Raises `ConfigurationError`."""
    try:
        decoded = binascii.unhexlify(secret_text(name, secret))
    except ValueError:
        raise ConfigurationError(f"{name}: not an even number of hexadecimal digits: give such a key") from None
    _check_length(name, len(decoded))
    return decoded


def _check_length(name: str, length: int) -> None:
    if length < _SHORTEST:
        raise ConfigurationError(f"{name}: shorter than {_SHORTEST} bytes, so it could be guessed: use a longer one")


def read_key_file(name: str, path: str) -> bytes:
    """Return what a file with a key contains. Raises `ConfigurationError`."""
    try:
        with open(path, "rb") as opened:
            return opened.read(_MOST_BYTES)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or type(exc).__name__
        shown = repr(path) if os.path.isabs(path) else "the file"  # another text may be the key itself
        raise ConfigurationError(f"{name}: {shown} cannot be read ({reason}): give the path of the key") from None


def pem_of(name: str, value: str) -> bytes:
    """Return the text of a key in PEM: the value, or what the file with this name contains.

    Raises `ConfigurationError` if the file cannot be read.
    """
    return value.strip().encode() if value.lstrip().startswith("-----BEGIN") else read_key_file(name, value)


def private_key(name: str, pem: bytes, *, missing: Callable[[Any], str | None]) -> Any:
    """Return the private key in a text in PEM.

    missing: returns which key is needed instead, None for one that suits.

    Raises `ConfigurationError` for another key, one with a password, and if the package cryptography is not installed.
    """
    try:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ModuleNotFoundError as exc:
        raise ConfigurationError(
            f"{name}: signing with it needs cryptography: install downloadview_async with its extra `cdn`"
        ) from exc
    try:
        key = load_pem_private_key(pem, None)
    except TypeError:
        raise ConfigurationError(f"{name}: the key has a password: give one without a password") from None
    except Exception:
        raise ConfigurationError(
            f"{name}: not a private key in PEM: give the private key, not the public one"
        ) from None
    if (needed := missing(key)) is not None:
        raise ConfigurationError(f"{name}: not a key that the provider takes: give {needed}")
    return key


def rsa_bits(key: Any) -> int | None:
    """Return the size of an RSA key in bits, None for another key."""
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    return key.key_size if isinstance(key, RSAPrivateKey) else None


def curve_of(key: Any) -> str | None:
    """Return the name of the curve of an ECDSA key, such as secp256r1, None for another key."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

    return key.curve.name if isinstance(key, EllipticCurvePrivateKey) else None


def signing(name: str, key: Any, digest: str) -> Callable[[str], bytes]:
    """Return a function that signs a text with a private key, by RSA with PKCS #1 v1.5 or by ECDSA.

    digest: sha1 or sha256. Raises `ConfigurationError` if this machine's OpenSSL refuses such signatures.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding

    chosen = hashes.SHA1() if digest == "sha1" else hashes.SHA256()  # noqa: S303 - CloudFront's default
    arguments = (padding.PKCS1v15(), chosen) if rsa_bits(key) is not None else (ec.ECDSA(chosen),)

    def sign(text: str) -> bytes:
        signature: bytes = key.sign(text.encode(), *arguments)
        return signature

    try:
        sign("a text")
    except Exception as exc:
        raise ConfigurationError(f"{name}: OpenSSL refuses signatures with {digest} ({type(exc).__name__})") from None
    return sign

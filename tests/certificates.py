"""Certificates for TLS on the loopback, which nobody trusts unless a test does."""

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificate(directory: Path, name: str = "DNS:localhost") -> dict[str, str]:
    """Make a certificate for a name. Return the files of it and its key, as the options of uvicorn."""
    if shutil.which("openssl") is None:
        pytest.skip("TLS: openssl is not installed")
    files = {"ssl_certfile": str(directory / "cert.pem"), "ssl_keyfile": str(directory / "key.pem")}
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", f"subjectAltName={name}"]
    command += ["-keyout", files["ssl_keyfile"], "-out", files["ssl_certfile"]]
    subprocess.run(command, check=True, capture_output=True)
    return files

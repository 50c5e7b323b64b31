"""Certificates for servers of tests, made by the openssl command."""

import subprocess
from pathlib import Path


def certificate(folder: Path, host: str = "localhost", ip: str = "127.0.0.1") -> tuple[Path, Path]:
    """Make a self-signed certificate; return its file, which is its authority's too, and the file of its key."""
    cert, key = folder / f"{host}.pem", folder / f"{host}.key"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host},IP:{ip}"]
    subprocess.run(
        [*words, "-keyout", str(key), "-out", str(cert), "-days", "2", *names], check=True, capture_output=True
    )
    return cert, key

"""Removes secrets from texts for logs, errors and messages."""

import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, unquote

MASK = "***"
SHORTEST = 6
"""Fewest characters of a value that counts as a secret; shorter ones are too common in ordinary text."""

_SECRET_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|COOKIE|SIGNATURE|_PASS$|_PWD$|^PASS$|_AUTH$", re.IGNORECASE
)
_WORDS = "secret|password|passwd|credential"
_USERINFO = re.compile(r"(\w://)([^/@\s]*)@")
_RULES = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*-----|\Z)", re.DOTALL), MASK),
    (_USERINFO, rf"\1{MASK}@"),
    (re.compile(r"\b(bearer|basic)\s+[^\s\"',;]{8,}", re.IGNORECASE), rf"\1 {MASK}"),
    (re.compile(r"\bsk-[\w-]{6,}"), f"sk-{MASK}"),
    (re.compile(rf"((?:key|token|signature|{_WORDS})[\"']?\s*=\s*[\"']?)[^\s&\"',;]+", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(rf"((?:api[_-]?key|_token|{_WORDS})[\"']?\s*:\s*[\"']?)[^\s&\"',;}}]+", re.IGNORECASE), rf"\1{MASK}"),
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Return `text` without secrets.

    The secrets of this process's environment are replaced. So are bearer and basic tokens, `sk-…` keys, private keys,
    userinfo in URLs, and values that follow the name of a secret.

    Args:
        secrets: Further secrets, for example an API key in code.
    """
    known = {*secrets_of(os.environ), *(secret for secret in secrets if secret)}
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern, mask in _RULES:
        text = pattern.sub(mask, text)
    return text


def secrets_of(environment: Mapping[str, str]) -> set[str]:
    """Return the values of variables with names of secrets, and the passwords in URLs, also in URL encoding."""
    secrets: set[str] = set()
    for name, value in environment.items():
        if _SECRET_NAME.search(name):
            secrets.update((value, value.strip()))
        for _, userinfo in _USERINFO.findall(value):
            password = userinfo.partition(":")[2] or userinfo
            secrets.update((password, unquote(password)))
    return {form for secret in secrets if len(secret) >= SHORTEST for form in (secret, quote(secret, safe=""))}

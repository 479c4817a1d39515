"""Remove what belongs to this machine and its user from a text that will be published, such as a model card.

Removed are credentials in URLs, tokens and keys, absolute paths and URLs of object stores, e-mail addresses, and the
names of this machine and its user. `***` stands in their place.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
from functools import cache
from pathlib import Path

from minimind_ray.config.paths import STORES, masked
from minimind_ray.data.package import SHAPES, machine_tokens

MASK = "***"
COMMON = ("root", "user", "users", "admin", "ubuntu", "debian", "ec2-user", "azureuser", "nobody", "localhost", "home")
"""Names of users and machines that identify nobody."""
SHORTEST_NAME = 4
_KEYS = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_ASSIGNED = re.compile(
    r"((?:api[_-]?key|access[_-]?key|token|secret|passw(?:or)?d)[\w-]*[\"']?\s*[=:]\s*[\"']?)(?!\*)[^\s\"'&]{6,}", re.I
)
_PLACES = (
    re.compile(rf"\b(?:{'|'.join(STORES)}|s3a|s3n|file|ssh|scp|sftp|smb|nfs)://[^\s\"'<>)\]]+", re.I),
    re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    re.compile(
        r"(?<![A-Za-z0-9./:])/(?:home|Users|root|tmp|mnt|var|opt|srv|etc|usr|private|scratch|Volumes|media|workspace)"
        r"(?:/[^\s\"'`<>|,;:)\]]*|\b)"
    ),
    re.compile(r"(?<![\w./:~-])~?/(?:[\w.@+~-]+/)+[\w.@+*~-]*"),
    re.compile(r"(?<![\w/])~[\w-]*/[^\s\"'`<>|,;:)\]]+"),
    re.compile(r"\b[A-Za-z]:\\[^\s\"'`<>|]+|\\\\[\w.-]+\\[^\s\"'`<>|]+"),
)


def redact(text: str) -> str:
    """Return the text with *** in place of secrets, places and names of this machine."""
    tokens, names = machine()
    text = _KEYS.sub(MASK, masked(text))
    text = SHAPES.sub(MASK.encode(), text.encode("utf-8", "replace")).decode("utf-8", "replace")
    for token in tokens:
        text = text.replace(token, MASK)
    text = _ASSIGNED.sub(rf"\1{MASK}", text)
    for place in _PLACES:
        text = place.sub(MASK, text)
    return names.sub(MASK, text) if names else text


def holds_secret(text: str) -> bool:
    """Whether a text has a private key, or a key or token of a known form or of this machine."""
    return bool(SHAPES.search(text.encode("utf-8", "replace"))) or any(token in text for token in machine()[0])


@cache
def machine() -> tuple[list[str], re.Pattern[str] | None]:
    """Return this machine's tokens and keys, and a pattern of the names of the machine, its user and the home."""
    tokens = [token.decode("utf-8", "replace") for token in machine_tokens()]
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = ""
    host = socket.gethostname()
    home = Path(os.path.expanduser("~")).name  # noqa: PTH111 (Path raises an error where there is no home)
    found = {user, host, host.partition(".")[0], home}
    names = sorted((n for n in found if len(n) >= SHORTEST_NAME and n.lower() not in COMMON), key=len, reverse=True)
    pattern = rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})(?![\w-])"
    return tokens, re.compile(pattern, re.IGNORECASE) if names else None

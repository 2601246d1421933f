# Copyright 2026 The VisualChat team. Licensed under the Apache License, Version 2.0.
"""Looks for secrets in files before they are published. docs/hub.md lists the kinds, and what is not found."""

import re
from dataclasses import dataclass
from pathlib import Path


# For each kind what a secret of it has in it, in small letters (looked for first, which is quick), and its form, as its
# issuer publishes it. A token begins where no letter or digit stands before it, so that words of a vocabulary are none
KINDS: dict[str, tuple[tuple[bytes, ...], bytes]] = {
    "an access token of Hugging Face": (
        (b"hf_", b"api_org_"),
        rb"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    ),
    "an access token of GitHub": (
        (b"gho_", b"ghp_", b"ghs_", b"ghu_", b"ghr_", b"github_pat_"),
        rb"(?<![A-Za-z0-9])(?:gh[opsur]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})",
    ),
    "an access token of GitLab": (
        (b"gl",),
        rb"(?<![A-Za-z0-9])gl(?:pat|dt|rt|ptt|cbt|ft|soat|agent|oas)-[A-Za-z0-9_-]{20,}",
    ),
    "an access token of Bitbucket or Atlassian": (
        (b"atbb", b"atatt3"),
        rb"(?<![A-Za-z0-9])(?:ATBB[A-Za-z0-9]{24,}|ATATT3[A-Za-z0-9_=-]{20,})",
    ),
    "an access token of PyPI or npm": (
        (b"pypi-age", b"npm_"),
        rb"(?<![A-Za-z0-9])(?:pypi-AgE[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{36})",
    ),
    "an API key (sk-…)": (
        (b"sk-",),
        rb"(?<![A-Za-z0-9])sk-(?:(?:proj|ant|svcacct|admin|or|lf|None)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{20,})",
    ),
    "a key of Stripe": ((b"k_live_",), rb"(?<![A-Za-z0-9])[rs]k_live_[A-Za-z0-9]{20,}"),
    "an access key of AWS": ((b"akia", b"asia"), rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    "a secret key of AWS": (
        (b"aws",),
        rb"(?i:aws_?secret_?(?:access_?)?key)[\s\"'\\:=]{1,8}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
    ),
    "a key of Google": (
        (b"aiza", b"gocspx-", b"ya29."),
        rb"(?<![A-Za-z0-9])(?:AIza[A-Za-z0-9_-]{35}|GOCSPX-[A-Za-z0-9_-]{24,}|ya29\.[A-Za-z0-9_-]{30,})",
    ),
    "a key of Azure": (
        (b"accountkey=", b"sharedaccesskey=", b"q~"),
        rb"(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{40,}={0,2}|[\w~.-]{3}\dQ~[\w~.-]{31,34}(?![\w~.-])",
    ),
    "a signed URL": (
        (b"sig=", b"x-amz-signature=", b"x-goog-signature="),
        rb"[?&](?:sig=[A-Za-z0-9%+/]{40,}|X-Amz-Signature=[0-9a-f]{64}|X-Goog-Signature=[0-9a-f]{64,})",
    ),
    "an access token of Slack": (
        (b"xox", b"xapp-"),
        rb"(?<![A-Za-z0-9])(?:xox[abceoprs]|xapp)-[A-Za-z0-9-]{10,}",
    ),
    "a webhook of Slack or Discord": (
        (b"hooks.slack.com/", b"/api/webhooks/"),
        rb"hooks\.slack\.com/services/T\w+/B\w+/\w{20,}|discord(?:app)?\.com/api/webhooks/\d+/[\w-]{30,}",
    ),
    "a key of Weights & Biases": (
        (b"wandb",),
        rb"(?i:wandb)[^\0]{0,120}?(?i:key|password)[\s\"'\\:=]{1,8}[0-9a-f]{40}(?![0-9a-f])",
    ),
    "a password of a .netrc file": ((b"machine",), rb"machine\s+\S+\s+login\s+\S+\s+password\s+\S+"),
    "a private key": ((b"private key",), rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"),
    "an authorization header": (
        (b"authorization",),
        rb"(?i:authorization)[\s\"'\\:=]{1,8}(?i:bearer|basic|token)\s+[A-Za-z0-9_.~+/=-]{20,}",
    ),
    "a JSON Web Token": (
        (b"eyj",),
        rb"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    ),
    # Not <password>, ${PASSWORD}, {password}, $PASSWORD or ***
    "a password in a URL": (
        (b"://",),
        rb"://[^\s/:@\"'<>`\\\0]{1,100}:(?![<{$*%])[^\s/:@\"'<>`\\\0]{3,200}@[A-Za-z0-9\[]",
    ),
}


@dataclass(frozen=True)
class Finding:
    """
    What looks like a secret, without the secret.

    Args:
        name (`str`): The file.
        kind (`str`): One of [`KINDS`], or "an access token", the one that is used for publishing.
        line (`int`): From 1.
    """

    name: str
    kind: str
    line: int

    def __str__(self) -> str:
        return f"{self.name} contains {self.kind} (line {self.line})"


def find_secrets(name: str, content: bytes, token: str | None = None) -> list[Finding]:
    """
    Args:
        name (`str`): Of the file, which the findings take.
        content (`bytes`): What to look through.
        token (`str`, *optional*): A secret that must not be there, of whatever form.

    Returns:
        The first finding of each kind.
    """
    small = content.lower()
    found = []

    def note(kind: str, start: int) -> None:
        found.append(Finding(name, kind, content.count(b"\n", 0, start) + 1))

    if token and token.encode() in content:
        note("an access token", content.index(token.encode()))
    for kind, (parts, pattern) in KINDS.items():
        if any(part in small for part in parts) and (match := re.search(pattern, content)):
            note(kind, match.start())
    return found


def read_text_of(path: Path) -> bytes:
    """What a person may have written in a file: of safetensors the header, with its metadata, of other files all."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size))

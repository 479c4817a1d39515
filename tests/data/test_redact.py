"""What must not enter a published text."""

from __future__ import annotations

import pytest

from minimind_ray.data import redact as redaction
from minimind_ray.data.redact import redact

pytestmark = pytest.mark.unit

TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "wintermute")
    monkeypatch.setattr("socket.gethostname", lambda: "straylight-7.example.org")
    monkeypatch.setenv("MY_API_KEY", "a-key-of-this-machine")
    redaction.machine.cache_clear()
    yield
    redaction.machine.cache_clear()


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"token {TOKEN} here", TOKEN),
        ("the key a-key-of-this-machine", "a-key-of-this-machine"),
        ("s3://key:secretsecret@bucket/rows.jsonl", "secretsecret"),
        ("https://u:pass@host/x?token=abcdef", "pass@"),
        ("read s3://my-bucket/private/rows.jsonl now", "my-bucket"),
        ("PASSWORD = hunter22", "hunter22"),
        ('{"api_key": "0123456789"}', "0123456789"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----", "MIIabc"),
        ("in /home/alice/rows.jsonl", "alice"),
        ("路径/home/alice/rows.jsonl", "alice"),
        ("in /nfs4/team/rows.jsonl.", "team"),
        ("in ~/rows.jsonl and ~bob/rows", "bob"),
        (r"in C:\Users\alice\rows.jsonl", "alice"),
        ("write to alice@example.org", "alice"),
        ("logged in as Wintermute on straylight-7", "intermute"),
        ("logged in as wintermute on straylight-7", "straylight"),
        ("/tmp", "/tmp"),
    ],
)
def test_secrets_places_and_names_are_removed(text: str, secret: str) -> None:
    assert secret not in redact(text) and "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "and/or, 1/2, 男/女/老, 和/或, /think", "optim.lr 0.001, 12,345 tokens: many", "Qwen/Qwen3-0.6B",
        "https://huggingface.co/Qwen/Qwen3-0.6B", r"\frac{1}{2} \\ x", "the root of the tree", "train.jsonl",
        "A fox sees a river. What is it?", "base_model: me/model", "at 10:30, ratio 3:4",
    ],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text

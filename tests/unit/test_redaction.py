"""Secrets in texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.bus.logs import log_fields
from loom.bus.logs.redaction import MASK, redact, secrets_of


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "OPENAI_API_KEY": "canary-of-a-key",
        "STRIPE_TOKEN": "canary/with+signs",
        "DATABASE_URL": "postgres://app:canary%40pass@db/main",
        "SMTP_PASS": "canary-mail",
        "NATS_URL": "nats://canary-token@127.0.0.1:4222",
        "ONE_LETTER_KEY": "a",
        "HOME_FOLDER": "canary of no secret",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "text",
    [
        "the key canary-of-a-key was refused",
        "canary/with+signs",
        "https://x/?t=canary%2Fwith%2Bsigns",
        "authentication failed for canary@pass",
        "canary%40pass",
        "535 canary-mail",
        "token canary-token",
        "Authorization: Bearer canary.abc123",
        "authorization: basic Y2FuYXJ5OnNlY3JldA==",
        "sk-canary1234567890",
        "GET https://user:canary@example.org/x failed",
        "GET https://api.example/?key=canary-EXCEPTION failed",
        '{"api_key": "canary-in-json", "model": "m"}',
        "x-api-key: canary-in-header",
        "password=canary",
        "-----BEGIN RSA PRIVATE KEY-----\ncanary\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\ncanary, cut",
    ],
)
def test_a_secret_is_redacted(text: str) -> None:
    assert "canary" not in redact(text)
    assert MASK in redact(text)
    assert "canary" not in log_fields.summary(ValueError(text))


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 'name'",
        "prompt tokens: 12",
        "Unexpected token: <",
        "user@example.org wrote",
        "canary of no secret",
        "basic usage is free",
        "a line\nand another",
    ],
)
def test_ordinary_words_stay(text: str) -> None:
    assert redact(text) == text


def test_a_secret_given_in_code_is_also_redacted() -> None:
    assert redact("refused: given-in-code", ["given-in-code", ""]) == f"refused: {MASK}"


@given(st.dictionaries(st.sampled_from(["A_KEY", "B_TOKEN", "C"]), st.text()))
def test_no_environment_makes_short_texts_secrets(environment: dict[str, str]) -> None:
    assert all(len(secret) >= 6 for secret in secrets_of(environment))


class Odd(Exception):
    def __init__(self, text: object) -> None:
        self.text = text

    def __str__(self) -> str:
        if isinstance(self.text, BaseException):
            raise self.text
        return self.text  # type: ignore[return-value]  # what users do


@pytest.mark.parametrize("text", [ValueError("x"), KeyboardInterrupt(), SystemExit(), GeneratorExit(), 42, None])
def test_an_exception_without_a_usable_str_is_described_by_its_type(text: object) -> None:
    assert log_fields.summary(Odd(text)).startswith("Odd: (its __str__ raised ")


def test_a_long_text_of_an_exception_is_neither_read_nor_shown_whole() -> None:
    assert len(log_fields.summary(ValueError("x" * 50_000_000))) == log_fields.MAX_MESSAGE_CHARS


def test_a_class_name_is_printable_and_bounded() -> None:
    class Named(Exception):
        pass

    Named.__name__ = "x\n\x1b[31m" + "y" * 1000
    assert log_fields.type_name(Named()) == "x[31m" + "y" * (log_fields.MAX_NAME_CHARS - 5)
    Named.__name__ = "\n"
    assert log_fields.type_name(Named()) == "an unnamed exception"


class Meta(type):
    @property
    def __name__(cls) -> str:
        raise KeyboardInterrupt


class Hidden(Exception, metaclass=Meta):
    pass


def test_a_metaclass_cannot_hide_the_name() -> None:
    assert log_fields.type_name(Hidden()) == "Hidden"

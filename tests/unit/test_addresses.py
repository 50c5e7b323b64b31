"""Addresses of servers: the accepted forms, and errors that repeat no part of a secret."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.bus.bus import Bus
from loom.bus.natsio.transport.addresses import Login, parse_addresses, shown
from loom.schemas.errors import BusUnavailable

LETTERS = st.characters(codec="utf-8", exclude_categories=["Cs"])


@pytest.mark.parametrize(
    ("text", "url", "login"),
    [
        ("nats://h:1", "nats://h:1", None),
        ("h:1", "nats://h:1", None),
        ("h", "nats://h:4222", None),
        ("nats://h:", "nats://h:4222", None),
        ("tls://h", "tls://h:4222", None),
        ("TLS://h", "tls://h:4222", None),
        (" nats://h:1/ ", "nats://h:1", None),
        ("nats://[::1]:1", "nats://[::1]:1", None),
        ("[::1]", "nats://[::1]:4222", None),
        ("nats://münchen.invalid", "nats://münchen.invalid:4222", None),
        ("nats://u:p@h", "nats://h:4222", Login(user="u", password="p")),
        ("u:p@h:1", "nats://h:1", Login(user="u", password="p")),
        ("nats://t0ken@h", "nats://h:4222", Login(token="t0ken")),
        ("nats://u:@h", "nats://h:4222", Login(user="u", password="")),
        ("nats://@h", "nats://h:4222", None),
        ("nats://u:s3cr%2Cet%40x@h", "nats://h:4222", Login(user="u", password="s3cr,et@x")),
        ("nats://u%3Av:p%25%2F@h", "nats://h:4222", Login(user="u:v", password="p%/")),
        ("nats://t%C3%B6ken@h", "nats://h:4222", Login(token="töken")),
        ("nats://u:p@ss:w/rd@h:1", "nats://h:1", Login(user="u", password="p@ss:w/rd")),
    ],
)
def test_an_address_is_split_into_its_parts(text: str, url: str, login: Login | None) -> None:
    [address] = parse_addresses(text)

    assert (address.url, address.login) == (url, login)


def test_spaces_and_empty_parts_of_a_list_are_left_out_and_it_is_shown_as_written() -> None:
    addresses = parse_addresses(" nats://a:1 ,, tls://u:p@b ,c:3/,")

    assert [address.url for address in addresses] == ["nats://a:1", "tls://b:4222", "nats://c:3"]
    assert shown(addresses) == "nats://a:1,tls://b,c:3"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "list of servers is empty"),
        (" , ", "list of servers is empty"),
        ("http://h:1", "neither nats:// nor tls://"),
        ("redis://h:1", "neither nats:// nor tls://"),
        ("nats://a,ws://h:1", "server 2 of 2 is a websocket"),
        ("wss://h", "websocket"),
        ("nats://", "has no host"),
        ("nats://u:secret@", "has no host"),
        ("nats://:4222", "has no valid host"),
        ("nats://:", "has no host"),
        ("nats://h:port", "port of the server's address is not a number from 1 to 65535"),
        ("nats://h:0", "port"),
        ("nats://h:65536", "port"),
        ("nats://h:99999999999999999999", "port"),
        ("nats://h:٤٢", "port"),
        ("nats://a:1,nats://h:-1", "port of server 2 of 2"),
        ("nats:h:1", "IPv6 address needs brackets"),
        ("::1", "IPv6 address needs brackets"),
        ("nats://[::1", "IPv6 address needs brackets"),
        ("nats://[::1]x", "IPv6 address needs brackets"),
        ("nats://a b:1", "no valid host"),
        ("nats://h:1?tls=true", "has text after its port"),
        ("nats://h:1/path", "has text after its port"),
    ],
)
def test_an_invalid_address_is_refused_with_the_reason(text: str, words: str) -> None:
    with pytest.raises(BusUnavailable) as caught:
        parse_addresses(text)

    assert words in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "nats://u:s3cr,et@x@127.0.0.1:1",
        "nats://u:12,secret@127.0.0.1:1",
        "u:12,34,secret@127.0.0.1:1",
        "nats://a:1,u:12,secret@b:2",
        "nats://secret,token@h",
        "nats://u:,secret@h",
    ],
)
def test_a_comma_in_a_secret_is_refused_with_the_way_to_write_it_and_no_part_of_it(text: str) -> None:
    with pytest.raises(BusUnavailable, match="write a comma as %2C") as caught:
        parse_addresses(text)

    rendered = f"{caught.value!r} {vars(caught.value)} {Bus(text).connection.address}"
    assert not any(part in rendered for part in ("s3cr", "et@x", "secret", "12", "34"))


@given(user=st.text(LETTERS, min_size=1, max_size=20), password=st.text(LETTERS, max_size=20))
def test_any_credentials_come_back_from_their_percent_encoding(user: str, password: str) -> None:
    [address, other] = parse_addresses(f"tls://{quote(user, safe='')}:{quote(password, safe='')}@h:1,tls://h:2")

    assert address.login == Login(user=user, password=password)
    assert (address.shown, other.login) == ("tls://h:1", None)


@given(st.text(LETTERS, max_size=60), st.sampled_from(["", "nats://", "tls://u:", "nats://a:1,", "nats://u:p@"]))
def test_any_text_gives_addresses_or_one_sentence(text: str, prefix: str) -> None:
    try:
        addresses = parse_addresses(prefix + text)
    except BusUnavailable:
        assert Bus(prefix + text).connection.address == "the servers of NATS_URL"
    else:
        assert all(1 <= address.port <= 65_535 and address.host for address in addresses)

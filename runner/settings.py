"""Settings from the environment: one table, read once, handed down."""

import os
from collections.abc import Mapping
from typing import Annotated, get_origin

import msgspec
from msgspec import Meta

from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError


class InvalidSetting(LoomError):
    """An environment variable does not hold what it should; `field` names it."""

    code = "invalid_setting"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bus is and how this process behaves. Every field is an environment variable."""

    nats_url: str = ""
    """NATS_URL. Servers, comma separated; empty: an embedded server."""
    loom_namespace: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}\Z")] = "loom"
    """LOOM_NAMESPACE. First token of every subject."""
    loom_model: str = "gpt-4o-mini"
    """LOOM_MODEL. Model the phases ask, for judging and planning, when OPENAI_API_KEY or OPENAI_BASE_URL is set."""
    loom_log_level: Annotated[str, Meta(pattern=r"^(debug|info|warning|error)?\Z")] = ""
    """LOOM_LOG_LEVEL. debug, info, warning or error; empty: info for services, warning inside your own program."""
    loom_store: str = ""
    """LOOM_STORE. Folder in which `loom up` keeps its streams; empty: private, gone at the end."""
    loom_sync_interval: Annotated[str, Meta(pattern=r"^(always|[1-9][0-9]{0,5}(ms|s|m|h))?\Z")] = ""
    """LOOM_SYNC_INTERVAL. How often a server started here flushes streams to the disk: always, or every 10s, 2m, …;
    empty: every 2 minutes. A killed process loses nothing either way, a lost machine what was not flushed."""
    cluster: ClusterConfig = ClusterConfig()
    """LOOM_<FIELD> for each field of ClusterConfig, for example LOOM_MAX_ATTEMPTS."""


_WANTED = {  # a variable is text whatever it says
    "Expected `int`, got `str`": "must be a whole number",
    "Expected `float`, got `str`": "must be a number",
    "Expected `bool`, got `str`": "must be true or false",
}


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings the environment gives.

    Raises:
        InvalidSetting: A variable's value does not fit; `field` names the variable.
    """
    own = _given(Settings, "", environment)
    cluster = _given(ClusterConfig, "LOOM_", environment)
    return msgspec.convert({**own, "cluster": cluster}, Settings, strict=False)


def _given(shape: type[msgspec.Struct], prefix: str, environment: Mapping[str, str]) -> dict[str, object]:
    """The values the environment gives for fields of `shape`, each one checked."""
    given: dict[str, object] = {}
    for field in msgspec.structs.fields(shape):
        name, variable = field.name, prefix + field.name.upper()
        value = environment.get(variable)
        if not value or name == "cluster":
            continue
        try:
            given[name] = _pairs(value) if get_origin(field.type) is dict else value
            msgspec.convert({name: given[name]}, shape, strict=False)
        except ValueError as error:  # msgspec's are such
            reason = str(error).partition(" - at")[0].removeprefix(f"{shape.__name__}.{name} ")
            reason = _WANTED.get(reason, reason)
            raise InvalidSetting(f"{variable}: {reason}", field=variable) from None
    return given


def _pairs(value: str) -> dict[str, str]:
    """What `name=value,name=value` says.

    Raises:
        ValueError: It is something else, or names one twice.
    """
    pairs = [[part.strip() for part in pair.split("=")] for pair in value.split(",")]
    whole = all(len(pair) == 2 and all(pair) for pair in pairs)  # noqa: PLR2004 - a name and a value
    if not whole or len({pair[0] for pair in pairs}) < len(pairs):
        raise ValueError("must be name=value, or several with commas between, each name once")
    return dict(pairs)

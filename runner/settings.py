"""Settings from the environment: one table, read once, handed down."""

import difflib
import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, get_origin

import msgspec
from msgspec import Meta

from loom.bus.logs.logger import get_logger
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError
from loom.schemas.identity import LOCAL_OWNER, PERSON, PUBLIC, RESERVED, Identity

log = get_logger()


class InvalidSetting(LoomError):
    """An environment variable does not hold what it should; `field` names it."""

    code = "invalid_setting"


NAME_PATTERN = rf"^(?!({'|'.join(sorted(RESERVED))})\Z)[A-Za-z0-9_-]{{1,64}}\Z"
Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
"""A name under which a process speaks on the bus."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bus is and how this process behaves. Every field is an environment variable."""

    nats_url: str = ""
    """NATS_URL. Servers, comma separated; empty: an embedded server."""
    loom_namespace: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}\Z")] = "loom"
    """LOOM_NAMESPACE. First token of every subject."""
    loom_submitter: Name = PUBLIC
    """LOOM_SUBMITTER. Whose tasks this process submits: 1 to 64 letters, digits, - or _."""
    loom_owner: Name = LOCAL_OWNER
    """LOOM_OWNER. Whose nodes this process hosts; nodes of other owners are named OWNER.NODE."""
    loom_source: Name = PERSON
    """LOOM_SOURCE. As whom this process judges results."""
    loom_model: str = "gpt-4o-mini"
    """LOOM_MODEL. Model the phases ask, for judging and planning, when OPENAI_API_KEY or OPENAI_BASE_URL is set."""
    loom_log_level: Annotated[str, Meta(pattern=r"^(debug|info|warning|error)?\Z")] = ""
    """LOOM_LOG_LEVEL. debug, info, warning or error, in any case; empty: info for services, warning for other commands.
    In your own program empty leaves it to logging.getLogger("loom"); a level writes lines to standard error."""
    loom_event_loop: Annotated[str, Meta(pattern=r"^(auto|uvloop|asyncio)\Z")] = "auto"
    """LOOM_EVENT_LOOP. Event loop of the commands: auto, uvloop or asyncio; auto: uvloop where it is installed."""
    loom_store: str = ""
    """LOOM_STORE. Folder in which a server started here keeps its streams. Empty: `loom up` uses a folder of the
    namespace in the user's data folder, all others a temporary folder."""
    loom_token: Annotated[str, Meta(pattern=r"^([A-Za-z0-9._~-]{16,256})?\Z")] = ""
    """LOOM_TOKEN. What a server started here asks of its clients: they connect to nats://TOKEN@host:port; empty:
    nothing."""
    loom_sync_interval: Annotated[str, Meta(pattern=r"^(always|[1-9][0-9]{0,5}(ms|s|m|h))?\Z")] = ""
    """LOOM_SYNC_INTERVAL. How often a server started here flushes streams to the disk: always, or every 10s, 2m, …;
    empty: every 2 minutes. A killed process loses nothing either way, a lost machine what was not flushed."""
    cluster: ClusterConfig = ClusterConfig()
    """LOOM_<FIELD> for each field of ClusterConfig, for example LOOM_MAX_ATTEMPTS."""

    @property
    def identity(self) -> Identity:
        """The names under which this process speaks on the bus."""
        return Identity(submitter=self.loom_submitter, owner=self.loom_owner, source=self.loom_source)


_FORMS = {
    "loom_namespace": "must be 1 to 32 small letters, digits, - or _, and begin with a letter or a digit",
    "loom_log_level": "must be debug, info, warning or error",
    "loom_sync_interval": "must be always, or a time such as 500ms, 10s, 2m or 1h",
    "loom_token": "must be 16 to 256 letters, digits, - . _ or ~",
    "loom_event_loop": "must be auto, uvloop or asyncio",
    "judge_weights": "must be name=weight, or several with commas between; each weight a number from 0 to 1000",
}
_FORMS |= dict.fromkeys(
    ("loom_submitter", "loom_owner", "loom_source"),
    f"must be 1 to 64 letters, digits, - or _, and not one of the reserved names {', '.join(sorted(RESERVED))}",
)
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
_BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_NEAR = 0.7
"""How alike a misspelt variable and a known one are, from 0 to 1."""


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
        if name in {"loom_log_level", "loom_event_loop"}:
            value = value.strip().lower()
        try:
            given[name] = _pairs(value) if get_origin(field.type) is dict else value
            msgspec.convert({name: given[name]}, shape, strict=False)
        except ValueError as error:  # msgspec's are such
            reason = _FORMS.get(name) or _sentence(str(error).removeprefix(f"{shape.__name__}.{name} "))
            raise InvalidSetting(f"{variable}: {reason}", field=variable) from None
    return given


def _sentence(error: str) -> str:
    """Return an error of msgspec about a number as a sentence."""
    kind = re.match(r"Expected `(\w+)`(?: (>=|<=|>|<) (\S+))?", error)
    if kind is None or kind[1] not in _KINDS:
        return error.partition(" - at")[0]
    bound = f" of {_BOUNDS[kind[2]]} {kind[3]}" if kind[2] else ""
    return f"must be {_KINDS[kind[1]]}{bound}"


def warn_of_misspelt_settings() -> None:
    """Log each variable of the environment that looks like a misspelt setting, once in a process."""
    for variable, nearest in misspelt().items():
        _warn(variable, nearest)


@cache
def _warn(variable: str, nearest: str) -> None:
    log.warning("unknown_setting", variable=variable, hint=f"is {nearest} meant?")


def misspelt(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the unknown variables that resemble a known one: name -> the nearest known name."""
    known = {field.name.upper() for field in msgspec.structs.fields(Settings)} - {"CLUSTER"}
    known |= {f"LOOM_{field.name.upper()}" for field in msgspec.structs.fields(ClusterConfig)}
    by_rest = {name.removeprefix("LOOM_"): name for name in known}
    found = {}
    for variable in sorted(environment):
        if variable.upper().startswith("LOOM_") and variable not in known:
            near = difflib.get_close_matches(variable.upper().removeprefix("LOOM_"), by_rest, n=1, cutoff=_NEAR)
            if near:
                found[variable] = by_rest[near[0]]
    return found


def _pairs(value: str) -> dict[str, str]:
    """Return the pairs of `name=value,name=value`.

    Raises:
        ValueError: It is something else, or names one twice.
    """
    pairs = [[part.strip() for part in pair.split("=")] for pair in value.split(",")]
    whole = all(len(pair) == 2 and all(pair) for pair in pairs)  # noqa: PLR2004 - a name and a value
    if not whole or len({pair[0] for pair in pairs}) < len(pairs):
        raise ValueError("must be name=value, or several with commas between, each name once")
    return dict(pairs)

"""Where a model is reached. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from loom.agents.llm.checks import key_fault, url_fault
from loom.agents.llm.config import AgentConfig
from loom.schemas.errors import AgentFailed

OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"
"""Sent to servers of one's own, which need no key: the openai library requires one."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server of models, and how a request to it is made."""

    url: str
    """Without a query."""
    key: str = field(repr=False)
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    azure: bool = False
    """Whether the path of a request has the deployment, as Azure's has, and the key goes into `api-key`."""

    @property
    def host(self) -> str:
        """Host and port, for messages."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def secrets(self) -> list[str]:
        """Values that no message may hold: key, headers and password; ordinary words are left out."""
        values = [self.key, *self.headers.values(), urlsplit(self.url).password or ""]
        return [value for value in values if _looks_secret(value)]


def endpoint_of(config: AgentConfig, environment: Mapping[str, str], *, key_required: bool = True) -> Endpoint:
    """Return the endpoint that a config and the environment describe.

    Args:
        config: What it sets wins over the environment.
        environment: Of `OPENAI_BASE_URL`, `OPENAI_API_KEY`, and Azure's variables of these kinds.
        key_required: False: a missing key is left empty.

    Raises:
        AgentFailed: A variable holds what cannot be used, or a key is missing; `field` names it.
    """
    azure = ("AZURE_OPENAI_ENDPOINT",) if config.api_version else ()
    url, url_from = _first(config.base_url, "base_url", (*azure, "OPENAI_BASE_URL"), environment, url_fault)
    azure = ("AZURE_OPENAI_API_KEY",) if config.api_version else ()
    key, _ = _first(config.api_key, "api_key", (*azure, "OPENAI_API_KEY"), environment, key_fault)
    if config.api_version and not url_from:
        raise AgentFailed("api_version needs the address of the Azure server: set base_url", field="base_url")
    parts = urlsplit(url.strip() or OPENAI_URL)
    bare = urlunsplit(parts._replace(query="", fragment="", path=parts.path.rstrip("/")))
    given = {name.lower() for name in config.headers} & {"authorization", "api-key"}
    if key_required and not key and not given and (config.api_version or bare == OPENAI_URL):
        raise AgentFailed("the model needs an API key: set OPENAI_API_KEY, or api_key in AgentConfig", field="api_key")
    query, headers = dict(parse_qsl(parts.query, keep_blank_values=True)), dict(config.headers)
    versioned = parts.path.rstrip("/").endswith("/v1")  # Azure's newer API has the paths of OpenAI's
    if config.api_version:
        query["api-version"] = config.api_version
        if versioned and key:
            headers.setdefault("api-key", key)
    return Endpoint(
        url=bare,
        key=key or NO_KEY,
        query=query,
        headers=headers,
        azure=bool(config.api_version) and not versioned,
    )


def _first(
    value: str | None,
    name: str,
    variables: tuple[str, ...],
    environment: Mapping[str, str],
    fault_of: Callable[[str], str | None],
) -> tuple[str, str]:
    """Return the configured value, or that of the first variable that is set, and its name."""
    if value:
        return value, name
    for variable in variables:
        found = environment.get(variable, "").strip()
        if found:
            fault = fault_of(found)
            if fault:
                raise AgentFailed(f"{variable} {fault}", field=variable)
            return found, variable
    return "", ""


def _looks_secret(value: str) -> bool:
    """Whether a value is not one of the words that guides write in the place of a key, as `ollama`."""
    return len(value) >= 8 and (len(value) >= 16 or not value.replace("-", "").replace("_", "").isalpha())  # noqa: PLR2004

"""The address and the credentials of a model's server. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from loom.agents.llm.checks import key_fault, url_fault
from loom.agents.llm.config import AgentConfig
from loom.schemas.errors import AgentFailed

OPENAI_URL = "https://api.openai.com/v1"
NO_KEY = "none"
"""Sent to servers that need no key, because the openai library requires one."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The address of a server, and the headers and query of its requests."""

    url: str
    """The URL without its query."""
    key: str = field(repr=False)
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    azure: bool = False
    """Whether the path contains the deployment and the header `api-key` the key, as with Azure."""

    @property
    def host(self) -> str:
        """Host and port, for messages."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def secrets(self) -> list[str]:
        """Values that must not appear in messages: key, headers and password, except for ordinary words."""
        values = [self.key, *self.headers.values(), urlsplit(self.url).password or ""]
        return [value for value in values if _looks_secret(value)]


def endpoint_of(config: AgentConfig, environment: Mapping[str, str], *, key_required: bool = True) -> Endpoint:
    """Return the endpoint for a config and the environment.

    Args:
        config: Its settings override the environment.
        environment: Variables such as `OPENAI_BASE_URL`, `OPENAI_API_KEY`, and those of Azure.
        key_required: Whether a missing key raises.

    Raises:
        AgentFailed: A variable has an invalid value, or the key is missing; `field` names it.
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
    versioned = parts.path.rstrip("/").endswith("/v1")  # the newer API of Azure has the same paths as OpenAI
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
    """Return the configured value, or the value of the first variable that is set, with its name."""
    if value:
        return value, name
    for variable in variables:
        from_environment = environment.get(variable, "").strip()
        if from_environment:
            fault = fault_of(from_environment)
            if fault:
                raise AgentFailed(f"{variable} {fault}", field=variable)
            return from_environment, variable
    return "", ""


def _looks_secret(value: str) -> bool:
    """Return whether a value is not a placeholder for a key, such as `ollama`."""
    return len(value) >= 8 and (len(value) >= 16 or not value.replace("-", "").replace("_", "").isalpha())  # noqa: PLR2004

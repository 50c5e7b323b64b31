"""Identity of a process: tokens in its subjects, which the permissions of a server can enforce."""

from loom.schemas.base import Message
from loom.schemas.tokens import Token

PUBLIC = "public"
LOCAL_OWNER = "local"
PERSON = "person"
ADAPT = "adapt"
"""Source of ADAPT's own entries in the stream of rewards."""
RULES = "rules"
"""Source of EVALUATE's rewards by fixed rules."""
JUDGE = "judge"
"""Source of EVALUATE's rewards by a model."""
RESERVED = frozenset(
    {"sense", "match", "scale", "execute", "evaluate", "adapt", "rules", "judge", "import", "eval"},
)
"""Names of phases and reward sources; submitters, owners and people must have other names."""


class Identity(Message, frozen=True, kw_only=True):
    """Names that belong to the credentials of a process; a single user needs none.

    Example:
        >>> Identity(owner="acme").owner
        'acme'
    """

    submitter: Token = PUBLIC
    """Submitter of its tasks."""
    owner: Token = LOCAL_OWNER
    """Owner of its nodes."""
    source: Token = PERSON
    """Source of its rewards."""


LOCAL = Identity()
"""The identity of a single user."""


def qualified(owner: str, name: str) -> str:
    """Return the name of an owner's node or host, with the owner unless it is `local`.

    Example:
        >>> qualified("acme", "coder"), qualified("local", "coder")
        ('acme.coder', 'coder')
    """
    return name if owner == LOCAL_OWNER else f"{owner}.{name}"


def node_key(owner: str, node_id: str) -> str:
    """Return the key of the stored profile of a node.

    Example:
        >>> node_key("acme", "coder"), node_key("local", "coder")
        ('acme.coder', 'local.coder')
    """
    return f"{owner}.{node_id}"


def split_qualified(text: str) -> tuple[str, str]:
    """Return the owner and the name in a text that `qualified` or `node_key` returned.

    Example:
        >>> split_qualified("acme.coder"), split_qualified("coder"), split_qualified("local.coder")
        (('acme', 'coder'), ('local', 'coder'), ('local', 'coder'))
    """
    owner, dot, name = text.rpartition(".")
    return (owner, name) if dot else (LOCAL_OWNER, name)

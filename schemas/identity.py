"""Who a process speaks as: tokens that its subjects carry, so that the permissions of a server can pin them."""

from loom.schemas.base import Message
from loom.schemas.tokens import Token

PUBLIC = "public"
LOCAL_OWNER = "local"
PERSON = "person"
ADAPT = "adapt"
"""Source of what ADAPT itself puts into the stream of rewards."""
RULES = "rules"
"""Source of EVALUATE's rewards by rule."""
JUDGE = "judge"
"""Source of EVALUATE's rewards by the opinion of a model."""
RESERVED = frozenset(
    {"sense", "match", "scale", "execute", "evaluate", "adapt", "rules", "judge", "import", "eval"},
)
"""Names of phases and of sources of rewards: no submitter, owner or person may have one of them."""


class Identity(Message, frozen=True, kw_only=True):
    """The names that come with the credentials of a process; a single user needs none of them.

    Example:
        >>> Identity(owner="acme").owner
        'acme'
    """

    submitter: Token = PUBLIC
    """Whose tasks it submits."""
    owner: Token = LOCAL_OWNER
    """Whose nodes it hosts."""
    source: Token = PERSON
    """As whom it judges results."""


LOCAL = Identity()
"""A single user on one machine."""


def qualified(owner: str, name: str) -> str:
    """Return the name of an owner's node or host as people and messages write it: `local` is never shown.

    Example:
        >>> qualified("acme", "coder"), qualified("local", "coder")
        ('acme.coder', 'coder')
    """
    return name if owner == LOCAL_OWNER else f"{owner}.{name}"


def node_key(owner: str, node_id: str) -> str:
    """Return the key under which the profile of a node is stored.

    Example:
        >>> node_key("acme", "coder"), node_key("local", "coder")
        ('acme.coder', 'local.coder')
    """
    return f"{owner}.{node_id}"


def split_qualified(text: str) -> tuple[str, str]:
    """Return the owner and the name that `qualified` or `node_key` has put together.

    Example:
        >>> split_qualified("acme.coder"), split_qualified("coder"), split_qualified("local.coder")
        (('acme', 'coder'), ('local', 'coder'), ('local', 'coder'))
    """
    owner, dot, name = text.rpartition(".")
    return (owner, name) if dot else (LOCAL_OWNER, name)

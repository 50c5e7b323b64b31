"""Events in the lives of nodes."""

from typing import Literal

from loom.schemas.base import CheckedMessage, Name, Names, Note, Timestamp
from loom.schemas.identity import LOCAL_OWNER
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.tokens import Token

LifecycleKind = Literal["joined", "left", "spawned", "retired", "changed", "learned"]


class Lifecycle(CheckedMessage, frozen=True, kw_only=True):
    """An event in the life of a node."""

    kind: LifecycleKind
    node_id: Token
    owner: Token = LOCAL_OWNER
    host_id: Name = ""
    at: Timestamp
    task_ids: Names = ()
    """learned: tasks whose rewards are new in the profile."""
    profile: NodeProfile | None = None
    """learned: the new profile."""
    reason: Note = ""

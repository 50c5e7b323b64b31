"""Errors of the JetStream API and their codes."""

from enum import IntEnum

from loom.schemas.base import Count, Message, Text
from loom.schemas.errors import LoomError, Overloaded


class ServerErrorCode(IntEnum):
    """The error codes that loom distinguishes, with shortened names of nats-server's errors.json."""

    NO_PEERS = 10008
    """Replicas are electing a leader, which takes seconds."""
    NO_QUORUM = 10009
    CONSUMER_NOT_FOUND = 10014
    INSUFFICIENT_RESOURCES = 10023
    NO_MESSAGE = 10037
    STORE_FAILED = 10047
    """The disk is full."""
    STREAM_NOT_FOUND = 10059
    WRONG_LAST_SEQUENCE = 10071
    STREAM_FULL = 10077
    NO_LEADER = 10118
    MSG_ID_IN_PROCESS = 10158
    """An earlier message of this id is not stored on enough replicas yet."""
    WRONG_LAST_SEQUENCE_CONSTANT = 10164


NO_LEADER = frozenset({ServerErrorCode.NO_PEERS, ServerErrorCode.NO_QUORUM, ServerErrorCode.NO_LEADER})
FULL = frozenset({ServerErrorCode.STREAM_FULL, ServerErrorCode.INSUFFICIENT_RESOURCES, ServerErrorCode.STORE_FAILED})
WRONG_LAST = frozenset({ServerErrorCode.WRONG_LAST_SEQUENCE, ServerErrorCode.WRONG_LAST_SEQUENCE_CONSTANT})
MISSING = frozenset({ServerErrorCode.STREAM_NOT_FOUND, ServerErrorCode.CONSUMER_NOT_FOUND})


class Refused(LoomError):
    """The server refused a JetStream call; `err_code` is the code of its error."""

    code = "bus_unavailable"

    def __init__(self, message: str, err_code: int) -> None:
        super().__init__(message)
        self.err_code = err_code


class Conflict(Refused):
    """Another writer has stored a value under the key since it was read."""


class ApiError(Message, frozen=True, kw_only=True):
    """The error in a reply of the JetStream API."""

    code: Count = 0
    err_code: Count = 0
    description: Text = ""

    def to_exception(self) -> LoomError:
        """Return the exception for a publish into a stream that failed with this error."""
        if self.err_code in WRONG_LAST:
            return Conflict(self.description, self.err_code)
        if self.err_code in FULL:
            return Overloaded("the bus is full; try again later")
        return Refused(self.description, self.err_code)

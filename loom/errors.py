"""The errors, by the import path and, where they have others, the names of loom-agent 0.6."""

from loom.compat.lifecycle import ApoptosisRejected, MitosisError
from loom.schemas.errors import (
    AgentFailed,
    BudgetExceeded,
    BusUnavailable,
    Cancelled,
    DeadLettered,
    DeadlineExceeded,
    InvalidPlan,
    InvalidTask,
    LoomError,
    NoBids,
    NodeBusy,
    NodeLost,
    Overloaded,
    RejectedResult,
    SubtaskFailed,
    UnknownTask,
)

ApoptosisRejectedError = ApoptosisRejected
AuctionNoWinnerError = NoBids

__all__ = [
    "AgentFailed",
    "ApoptosisRejected",
    "ApoptosisRejectedError",
    "AuctionNoWinnerError",
    "BudgetExceeded",
    "BusUnavailable",
    "Cancelled",
    "DeadLettered",
    "DeadlineExceeded",
    "InvalidPlan",
    "InvalidTask",
    "LoomError",
    "MitosisError",
    "NoBids",
    "NodeBusy",
    "NodeLost",
    "Overloaded",
    "RejectedResult",
    "SubtaskFailed",
    "UnknownTask",
]

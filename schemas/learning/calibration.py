"""Calibration of estimates of complexity."""

from typing import Annotated

from msgspec import Meta

from loom.schemas.base import CheckedMessage, Count
from loom.schemas.tokens import Token

BIAS = "bias."
"""Prefix of the keys of calibrations in the bucket `tuning`; the domain_token follows."""


class Calibration(CheckedMessage, frozen=True, kw_only=True):
    """Error of SENSE's estimates in one domain."""

    domain_token: Token
    bias: Annotated[float, Meta(ge=-1, le=1)] = 0.0
    """Moving average of actual less estimated complexity."""
    count: Count = 0
    """Number of tasks in the average."""
    last_seq: Count = 0
    """Sequence in REWARDS of the last reward folded."""

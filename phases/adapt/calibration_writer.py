"""The bias of SENSE's complexity estimates in each domain: actual minus estimated complexity."""

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.server_errors import Conflict
from loom.bus.topology import stream_state
from loom.schemas.base import Undecodable
from loom.schemas.identity import JUDGE, RULES
from loom.schemas.learning.calibration import BIAS, Calibration
from loom.schemas.learning.reward import Reward

log = get_logger()

NEWEST_WEIGHT = 0.3
"""Weight of the newest task in the moving average."""
SUCCESS = 0.5
FULL_TOKENS, FULL_SECONDS = 8192, 30.0
"""Tokens and seconds from which on a task has the greatest complexity."""
TOKENS_SHARE = 0.6
MAX_DOMAINS = 1000
"""Domains that are calibrated, at most: an ad may name any domain, and a stored calibration is never deleted."""


def actual_complexity(reward: Reward) -> float:
    """Return the actual complexity of a task, 0 to 1: .6 min(tokens / 8192, 1) + .4 min(seconds / 30, 1)."""
    by_tokens, by_time = min(reward.tokens, FULL_TOKENS) / FULL_TOKENS, min(reward.seconds, FULL_SECONDS) / FULL_SECONDS
    return TOKENS_SHARE * by_tokens + (1 - TOKENS_SHARE) * by_time


def recalibrated(known: Calibration, reward: Reward, seq: int) -> Calibration:
    """Return the calibration after the reward at stream sequence `seq`; `known` itself if nothing changes.

    Only EVALUATE's reward for a success counts, once for each task: a failure does not show the complexity.
    """
    ruled = reward.kind == "reward" and reward.source in (RULES, JUDGE) and reward.score >= SUCCESS
    if seq <= known.last_seq or reward.estimated is None or not ruled:
        return known
    bias = NEWEST_WEIGHT * (actual_complexity(reward) - reward.estimated) + (1 - NEWEST_WEIGHT) * known.bias
    return replace(known, bias=bias, count=known.count + 1, last_seq=seq)


class CalibrationWriter:
    """Applies rewards to the calibrations and writes them to the bucket `tuning`.

    A calibration that another replica has written from more rewards is adopted. Only the first `MAX_DOMAINS` domains
    are calibrated; in later ones SENSE's estimates stay unchanged.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = bus.bucket("tuning", Calibration)
        self._known: dict[str, Calibration] = {}
        self._revisions: dict[str, int] = {}
        self._unwritten: set[str] = set()

    async def start(self, last_seq: int) -> None:
        """Load the stored calibrations.

        Args:
            last_seq: Last sequence of the stream of rewards. A calibration with a higher one does not rest on this
                stream and is reset.
        """
        reader = self._bucket.reader(f"{BIAS}*")
        try:
            while not reader.caught_up:
                for entry in await reader.batch():
                    known = entry.value
                    if entry.key != BIAS + known.domain_token:
                        continue
                    if known.last_seq > last_seq:
                        known = Calibration(domain_token=known.domain_token)
                        self._unwritten.add(known.domain_token)
                    self._known[known.domain_token], self._revisions[known.domain_token] = known, entry.revision
        finally:
            await reader.stop()

    def on_stream_reset(self) -> None:
        """Keep every calibration, and accept rewards of the new stream from its first sequence on."""
        self._known = {domain_token: replace(known, last_seq=0) for domain_token, known in self._known.items()}
        self._unwritten = set(self._known)

    def apply(self, seq: int, reward: Reward) -> bool:
        """Apply a reward; return whether a calibration has to be written."""
        new = reward.domain_token not in self._known
        known = Calibration(domain_token=reward.domain_token) if new else self._known[reward.domain_token]
        after = recalibrated(known, reward, seq)
        if after is known or (new and len(self._known) >= MAX_DOMAINS):
            return False
        self._known[reward.domain_token] = after
        self._unwritten.add(reward.domain_token)
        if new and len(self._known) == MAX_DOMAINS:
            log.warning("calibration_limit_reached", domains=MAX_DOMAINS)
        return True

    async def flush(self) -> None:
        """Write the changed calibrations.

        Raises:
            BusUnavailable: The server has not answered.
        """
        for domain_token in sorted(self._unwritten):
            await self._write(domain_token)

    async def _write(self, domain_token: str) -> None:
        while True:
            own = self._known[domain_token]
            try:
                self._revisions[domain_token] = await self._bucket.update(
                    BIAS + domain_token, own, self._revisions.get(domain_token, 0)
                )
                written = own
            except Conflict:
                stored = await self._read_stored(domain_token)
                if stored is None or stored.last_seq < own.last_seq:
                    continue  # the own value rests on more of the same stream
                written = stored
                if written.last_seq > self._known[domain_token].last_seq:
                    self._known[domain_token] = written
            if self._known[domain_token].last_seq <= written.last_seq:
                self._unwritten.discard(domain_token)
                log.debug("calibrated", domain_token=domain_token, bias=round(written.bias, 3), tasks=written.count)
            return

    async def _read_stored(self, domain_token: str) -> Calibration | None:
        """Return the stored calibration and keep its revision; None without a valid one."""
        try:
            entry = await self._bucket.get(BIAS + domain_token)
        except Undecodable:
            self._revisions[domain_token] = await self._bucket.revision(BIAS + domain_token)
            return None
        self._revisions[domain_token] = entry.revision if entry else 0
        if entry is None or entry.value.domain_token != domain_token:
            return None
        beyond_stream = entry.value.last_seq > int((await stream_state(self._bus, "REWARDS"))["last_seq"])
        return None if beyond_stream else entry.value

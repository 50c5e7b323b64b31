"""How far SENSE is off in each domain: what tasks turned out to be, against what it had taken them for."""

from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.server_errors import Conflict
from loom.bus.topology import stream_state
from loom.schemas.base import Undecodable
from loom.schemas.identity import JUDGE, RULES
from loom.schemas.learning import BIAS, Calibration, Reward

log = get_logger()

NEWEST = 0.3
"""Weight of the newest task in the moving average."""
SUCCESS = 0.5
TOKENS, SECONDS = 8192, 30.0
"""From which on a task counts as hard as can be."""
TOKENS_SHARE = 0.6
MOST = 1000
"""Domains that are calibrated: an ad may name any domain, and what is stored of one is stored for ever."""


def actual(reward: Reward) -> float:
    """Return how hard a task turned out to be: .6 min(tokens / 8192, 1) + .4 min(seconds / 30, 1)."""
    by_tokens, by_time = min(reward.tokens, TOKENS) / TOKENS, min(reward.seconds, SECONDS) / SECONDS
    return TOKENS_SHARE * by_tokens + (1 - TOKENS_SHARE) * by_time


def recalibrated(known: Calibration, reward: Reward, seq: int) -> Calibration:
    """Return the calibration after the reward at stream sequence `seq`; the same where it tells nothing.

    Only EVALUATE's reward for a success counts, once for each task: a failure has not shown how hard the task is.
    """
    ruled = reward.kind == "reward" and reward.source in (RULES, JUDGE) and reward.score >= SUCCESS
    if seq <= known.last_seq or reward.estimated is None or not ruled:
        return known
    bias = NEWEST * (actual(reward) - reward.estimated) + (1 - NEWEST) * known.bias
    return replace(known, bias=bias, count=known.count + 1, last_seq=seq)


class Calibrating:
    """Keeps the calibrations of the bucket `tuning`; what another replica has written further is taken over.

    The first `MOST` domains are calibrated. In any that come later SENSE's guesses stay as they are.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = bus.bucket("tuning", Calibration)
        self._known: dict[str, Calibration] = {}
        self._revisions: dict[str, int] = {}
        self._unwritten: set[str] = set()

    async def start(self, last_seq: int) -> None:
        """Read what is known.

        Args:
            last_seq: Of the stream of rewards; what claims to hold more cannot rest on it and is forgotten.
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

    def start_over(self) -> None:
        """Keep what is known: the stream it rests on was lost, and another has begun."""
        self._known = {domain_token: replace(known, last_seq=0) for domain_token, known in self._known.items()}
        self._unwritten = set(self._known)

    def fold(self, seq: int, reward: Reward) -> bool:
        """Take in a reward; return whether there is anything to write."""
        new = reward.domain_token not in self._known
        known = Calibration(domain_token=reward.domain_token) if new else self._known[reward.domain_token]
        after = recalibrated(known, reward, seq)
        if after is known or (new and len(self._known) >= MOST):
            return False
        self._known[reward.domain_token] = after
        self._unwritten.add(reward.domain_token)
        if new and len(self._known) == MOST:
            log.warning("no_further_domain_is_calibrated", domains=MOST)
        return True

    async def flush(self) -> None:
        """Write what has changed.

        Raises:
            BusUnavailable: No answer.
        """
        for domain_token in sorted(self._unwritten):
            await self._put(domain_token)

    async def _put(self, domain_token: str) -> None:
        while True:
            mine = self._known[domain_token]
            try:
                self._revisions[domain_token] = await self._bucket.update(
                    BIAS + domain_token, mine, self._revisions.get(domain_token, 0)
                )
                written = mine
            except Conflict:
                stored = await self._stored(domain_token)
                if stored is None or stored.last_seq < mine.last_seq:
                    continue  # ours holds more of the same stream
                written = stored
                if written.last_seq > self._known[domain_token].last_seq:
                    self._known[domain_token] = written
            if self._known[domain_token].last_seq <= written.last_seq:
                self._unwritten.discard(domain_token)
                log.debug("calibrated", domain_token=domain_token, bias=round(written.bias, 3), tasks=written.count)
            return

    async def _stored(self, domain_token: str) -> Calibration | None:
        """Return the stored calibration and note its revision; None where there is none that can be believed."""
        try:
            entry = await self._bucket.get(BIAS + domain_token)
        except Undecodable:
            self._revisions[domain_token] = await self._bucket.revision(BIAS + domain_token)
            return None
        self._revisions[domain_token] = entry.revision if entry else 0
        if entry is None or entry.value.domain_token != domain_token:
            return None
        beyond = entry.value.last_seq > int((await stream_state(self._bus, "REWARDS"))["last_seq"])
        return None if beyond else entry.value

"""Each message of `loom tap` as a line."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from loom.bus.tap import TappedMessage
from loom.runner.cli.views.tables import one_line, short
from loom.schemas.auction import CallForBids, HostAnnouncement, Offer, RetireRequest, SpawnRequest
from loom.schemas.base import encode
from loom.schemas.envelope import Envelope, Split
from loom.schemas.events import SubtaskEvent, ToolCallEnd, ToolCallStart
from loom.schemas.identity import LOCAL_OWNER, qualified
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.reward import Reward
from loom.schemas.notices import ParentEnded, PlanTimeout, SubtaskEnded
from loom.schemas.run import Delta, RunEvent, RunRequest, Stop
from loom.schemas.task import Submission, TaskAd, TaskResult

WORDS = 60
"""Most characters of a description or an answer in a line."""
RESET, BOLD, DIM, YELLOW, CYAN = (f"\x1b[{code}m" for code in (0, 1, 2, 33, 36))


def json_line(seen: TappedMessage) -> str:
    """Return a message whole, as a line of JSON."""
    return encode(as_object(seen)).decode() + "\n"


class MessageLines:
    """Formats messages as lines; colours them and cuts them to the width of the screen on a terminal only."""

    def __init__(self, screen: Console) -> None:
        self._coloured = screen.is_terminal and not screen.no_color
        self._width = screen.width if screen.is_terminal else None

    def __call__(self, seen: TappedMessage) -> str:
        """Return a message as a line, after a line with the number of messages that were skipped."""
        at = datetime.fromtimestamp(seen.at).strftime("%H:%M:%S.%f")[:-3]  # noqa: DTZ006 - the reader's own time
        kind, about, facts = describe(seen)
        parts = [(f"{at} ", DIM), (f"{kind:<16} ", CYAN), (f"{about:<12} " if facts else about, BOLD), (facts, "")]
        skipped = f"{seen.skipped} skipped: more than could be shown"
        return (self._line([(skipped, YELLOW)]) if seen.skipped else "") + self._line(parts)

    def _line(self, parts: list[tuple[str, str]]) -> str:
        left, line = self._width, ""
        for text, style in parts:
            shown = text
            if left is not None:
                shown = text if len(text) < left and text.isascii() else set_cell_size(text, min(left, cell_len(text)))
                left -= cell_len(shown)
            line += f"{style}{shown}{RESET}" if style and self._coloured else shown
        return line + "\n"


def as_object(seen: TappedMessage) -> dict[str, Any]:
    """Return a message as free JSON; bytes that cannot be decoded are under `raw`, in base64."""
    read = not isinstance(seen.message, bytes)
    return {
        "at": seen.at,
        "subject": seen.subject,
        "family": seen.family,
        "tokens": seen.tokens,
        "size": seen.size,
        "skipped": seen.skipped,
        "headers": seen.headers,
        "message" if read else "raw": seen.message,
    }


def describe(seen: TappedMessage) -> tuple[str, str, str]:
    """Return kind, what it is about (a task, node or host) and the facts of a message, each on one line."""
    tokens = seen.tokens
    kind = {"task": f"task {tokens.get('phase')}", "lifecycle": tokens.get("kind", "")}.get(seen.family, seen.family)
    task_id = tokens.get("task_id") or tokens.get("parent_id")
    about = short(task_id or _named(tokens, "node_id") or _named(tokens, "host_id"))
    message = seen.message
    if isinstance(message, bytes):
        facts = seen.headers.get("Loom-Dead-reason") or (f"{seen.size} bytes" if seen.size else "")
        return kind or "?", about or ("" if kind else one_line(seen.subject, WORDS)), one_line(facts)
    if isinstance(message, (TaskAd, RunRequest, SpawnRequest)):
        about = short(message.task_id or "")
    if isinstance(message, CallForBids):
        about = short(message.lots[0].task_id)
    text = _news_of_division(seen, message) if isinstance(message, Envelope) else ""
    if isinstance(message, PlanTimeout) and seen.family == "later":
        text = f"divided: parked for its subtasks, at most {max(0.0, message.envelope.deadline - seen.at):.0f} s"
    return kind, about, one_line(text or _FACTS[type(message)](message), 2 * WORDS)


def _named(tokens: dict[str, str], token: str) -> str:
    """The node or host of a subject as people write it; empty where the subject names none."""
    return qualified(tokens.get("owner", LOCAL_OWNER), tokens[token]) if token in tokens else ""


def _news_of_division(seen: TappedMessage, envelope: Envelope) -> str:
    """That the subtasks of a divided task are done; empty for any other hop."""
    if seen.tokens.get("phase") == "execute" and envelope.inputs and envelope.award is not None:
        return f"its subtasks are done: {envelope.award.node} puts {len(envelope.inputs)} outputs together"
    return ""


def _ad(ad: TaskAd) -> str:
    return f'{ad.priority} "{one_line(ad.description, WORDS)}"'


def _call(call: CallForBids) -> str:
    first, others = call.lots[0], len(call.lots) - 1
    more = f", and {others} more tasks" if others else ""
    return f"who bids in {call.domain_token}? complexity {first.complexity:.2f}, attempt {first.attempt}{more}"


def _offer(offer: Offer) -> str:
    if not offer.bids:
        return f"no bid: {offer.decline or 'no reason given'}"
    return ", ".join(f"{bid.node_id} {bid.self_rating:.2f}, load {bid.load:.2f}" for bid in offer.bids)


def _run(request: RunRequest) -> str:
    return f"run on {request.node_id}, attempt {request.attempt}, {request.remaining_s:.0f} s left"


def _host(host: HostAnnouncement) -> str:
    load = f"{host.running} of {host.slots} slots taken, {host.queued} queued"
    return f"{', '.join(host.node_ids) or 'no nodes'}; {load}" + (", draining" if host.draining else "")


def _subtask(event: SubtaskEvent) -> str:
    named = f"subtask {event.subtask} ({short(event.child_id)})"
    if event.state == "begun":
        return f'{named} has begun: "{one_line(event.description, WORDS)}"'
    by = f" on {qualified(event.owner or LOCAL_OWNER, event.node_id)}" if event.node_id else ""
    return f"{named} has {event.child_state}{by}" + (f": {event.error}" if event.error else "")


def _news(news: Lifecycle) -> str:
    domains = sorted(news.profile.domains.items()) if news.profile else []
    learned = ", ".join(f"{domain_token} {known.mean:.2f} of {known.count}" for domain_token, known in domains)
    return news.reason or learned or (f"host {news.host_id}" if news.host_id else "")


def _reward(reward: Reward) -> str:
    if reward.snapshot is not None:
        return f"what is known of {reward.node}, for a rebuild to start at {reward.snapshot.through}"
    return f"{reward.score:.2f} in {reward.domain_token} for {short(reward.task_id)}, by {reward.source}"


def _where(envelope: Envelope) -> str:
    """What the last phase added."""
    attempt = f", attempt {envelope.attempt}" if envelope.attempt > 1 else ""
    if envelope.error is not None:
        return f"{envelope.error.code}: {one_line(envelope.error.message, WORDS)}{attempt}"
    if envelope.result is not None:
        return f"result of {envelope.result.duration_s:.2f} s: {one_line(envelope.result.content, WORDS)}"
    if envelope.award is not None:
        award = envelope.award
        won = "pinned" if award.pinned else f"{award.score:.2f}, {len(award.bids)} bids"
        return f"awarded to {award.node} ({won}){attempt}"
    if envelope.spec is not None:
        spec = envelope.spec
        if spec.no_offers_since is not None:
            return f"no bids in {spec.domain_token} so far{attempt}"
        return f"{', '.join(spec.domains)}, complexity {spec.complexity:.2f} ({spec.method}){attempt}"
    quoted = f'"{one_line(envelope.ad.description, WORDS)}"'
    return f"{_origin(envelope.split)}{quoted}"


def _origin(split: Split | None) -> str:
    if split is None:
        return ""
    of = f"subtask {split.subtask} of {short(split.parent)}" if split.subtask else f"delegated by {short(split.parent)}"
    return f"{of} with {', '.join(split.inputs)}: " if split.inputs else f"{of}: "


def _progress(delta: Delta) -> str:
    match delta.event:
        case ToolCallStart(name=name):
            return f"calls {name}"
        case ToolCallEnd(name=name, failed=failed):
            return f"{name} {'failed' if failed else 'answered'}"
        case event:
            text = getattr(event, "text", "")
            return f'"{one_line(text, WORDS)}"' if text else event.type.replace("_", " ")


def _result(result: TaskResult) -> str:
    if result.error is not None:
        return f"{result.state}, {result.error.code}: {one_line(result.error.message, WORDS)}"
    return f"{result.state} on {result.node}, attempt {result.attempts}: {one_line(result.content, WORDS)}"


_FACTS: dict[type, Callable[[Any], str]] = {
    TaskAd: _ad,
    Submission: lambda submission: _ad(submission.ad),
    Envelope: _where,
    SubtaskEnded: lambda notice: f"subtask {notice.subtask} has ended: {short(notice.child_id)}",
    PlanTimeout: lambda _: "the deadline has passed before all of its subtasks had ended",
    ParentEnded: lambda _: "has ended, and so have its subtasks",
    CallForBids: _call,
    Offer: _offer,
    RunRequest: _run,
    HostAnnouncement: _host,
    SpawnRequest: lambda wanted: f"a node for {wanted.domain_token} is wanted: {wanted.reason}",
    RetireRequest: lambda order: f"{order.node_id} is to retire: {order.reason}",
    Delta: _progress,
    TaskResult: _result,
    Reward: _reward,
    Lifecycle: _news,
    SubtaskEvent: _subtask,
    RunEvent: lambda event: f"event {event.seq}: {event.kind}",
    Stop: lambda stop: f"attempt {stop.attempt} is to stop: {stop.why}",
}

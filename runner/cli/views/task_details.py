"""One task in full: its state, hops, bids, subtasks, attempts, rewards and answer."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loom.bus.queries import FoundTask
from loom.runner.cli.common import add_row, clock, span
from loom.runner.cli.views.award_explanation import rests_on, why
from loom.runner.cli.views.run_progress import STYLES
from loom.runner.cli.views.subtask_tree import Division, progress_of, tree
from loom.runner.cli.views.tables import one_line, printable, show, table_of
from loom.runner.cli.views.task_timeline import Try, submitted_at, tries, turns
from loom.schemas.auction import Award, ScoredBid
from loom.schemas.identity import JUDGE, PUBLIC, RULES
from loom.schemas.learning.reward import Reward
from loom.schemas.plan import SplitPlan
from loom.schemas.record import TaskRecord
from loom.schemas.task import Submission, TaskError

ANSWER_LINES = 12
ANSWER_CHARS = 1200
WORDS = 300


def show_waiting(screen: Console, submission: Submission) -> None:
    """Print a submission that waits for admission."""
    ad = submission.ad
    screen.print(Text(f'{ad.task_id} waits for admission: {ad.priority} "{one_line(ad.description, 60)}"'))


def show_task(screen: Console, found: FoundTask, division: Division, rewards: Sequence[Reward], now: float) -> None:
    """Print a task that has a record; `now` is server time."""
    record = found.record
    if record is None:
        return
    envelope = record.envelope
    for line in _head(record, _where(record, found.phase, division.plan), now):
        screen.print(line)
    _print(screen, _hops(record), _bids(envelope.award, envelope.domain))
    if envelope.award is not None:
        screen.print(Text(one_line(why(envelope.award))))
        if envelope.award.bids:
            screen.print(Text(one_line(rests_on(envelope.award)), "dim"))
    _print(screen, tree(division, now), _attempts(tries(record, rewards)), _earned(rewards))
    _show_answer(screen, record)


def _print(screen: Console, *tables: Table) -> None:
    show(screen, [table for table in tables if table.row_count])


def _head(record: TaskRecord, where: str, now: float) -> Iterator[Text]:
    envelope, ad = record.envelope, record.envelope.ad
    start = submitted_at(record)
    state = Text.assemble((record.task_id, "bold"), "  ", (record.state, STYLES.get(record.state, "cyan")))
    if record.ended_at is not None:
        state.append(f" after {span(max(0.0, record.ended_at - start))}")
        state.append(", short of what was asked" if record.below_threshold else "")
    else:
        state.append(f" for {span(max(0.0, now - start))}{where}, ")
        state.append(f"{span(max(0.0, envelope.deadline - now))} left")
    yield state
    yield Text(f'"{one_line(ad.description, WORDS)}"')
    facts = [f"submitted {clock(start)}", f"priority {ad.priority}"]
    if envelope.spec is not None:
        spec = envelope.spec
        facts += [f"domain {', '.join(spec.domains)}", f"complexity {spec.complexity:.2f} ({spec.method})"]
    elif envelope.domain:
        facts.append(f"domain {envelope.domain}")
    if envelope.spec is not None and envelope.spec.no_offers_since is not None and not record.ended:
        facts.append(f"no bids for {span(max(0.0, now - envelope.spec.no_offers_since))}")
    if envelope.submitter != PUBLIC:
        facts.append(f"submitter {envelope.submitter}")
    if ad.required_tools:
        facts.append(f"needs {', '.join(ad.required_tools)}")
    facts += [f"{name}={value}" for name, value in ad.labels.items()]
    if ad.token_budget is not None:
        facts.append(f"at most {ad.token_budget} tokens, {envelope.budget} left")
    yield Text(one_line(", ".join(facts)), "dim")
    if envelope.split is not None:
        what = f"subtask {envelope.split.subtask}" if envelope.split.subtask else "delegated work"
        yield Text(f"{what} of {envelope.split.parent}", "dim")
    if envelope.spec is not None and envelope.spec.note:
        yield Text(one_line(envelope.spec.note, WORDS), "yellow")


def _where(record: TaskRecord, phase: str, plan: SplitPlan | None) -> str:
    """What a running task is doing."""
    if plan is not None and plan.state == "running":
        return f", divided, {progress_of(plan)}"
    if phase == "later":
        return ", waiting for its next call"
    on = f" on {record.claim.node}" if phase == "execute" and record.claim.attempt == record.envelope.attempt else ""
    return f", in {phase}{on}" if phase else ""


def _hops(record: TaskRecord) -> Table:
    columns = ("at", "phase", "attempt", "waited", "worked", "instance")
    table = table_of(columns, title="Hops", right=("at", "attempt", "waited", "worked"), ratios={"instance": 1})
    end = "was cancelled in it" if record.state == "cancelled" else "ended the task"
    for turn in turns(record):
        if turn.after_gap:
            add_row(table, "…")
        waited = "" if turn.waited_s is None else span(turn.waited_s)
        instance = turn.instance or f"({end}; waiting included)"
        add_row(
            table, f"+{span(turn.at_s)}", turn.phase, str(turn.attempt), waited, span(turn.worked_s), Text(instance)
        )
    return table


def _bids(award: Award | None, domain: str) -> Table:
    numbers = ("claim", "evidence", "count", "trust", "bonus", "load", "tools", "total")
    title = f"Bids in {one_line(domain, 40)}, best first"
    table = table_of(("node", *numbers), title=title, right=numbers, ratios={"node": 1})
    for bid in award.bids if award else ():
        add_row(table, bid.node, *_weighed(bid))
    return table


def _weighed(bid: ScoredBid) -> Iterator[str]:
    yield f"{bid.self_rating:.2f}"
    yield "-" if bid.evidence is None else f"{bid.evidence:.2f}"
    yield str(bid.count)
    for part in (bid.trust, bid.bonus, bid.load, bid.tools, bid.score):
        yield f"{part:.2f}"


def _attempts(known: Sequence[Try]) -> Table:
    numbers = ("attempt", "tokens", "time")
    columns = ("attempt", "node", "outcome", "reason", "tokens", "time")
    table = table_of(columns, title="Attempts", right=numbers, ratios={"reason": 1})
    table.columns[1].max_width = table.columns[2].max_width = None
    for one in known:
        style = STYLES.get(one.outcome, "cyan" if one.outcome == "running" else "red")
        time = span(one.duration_s) if one.duration_s else ""
        tokens = str(one.tokens) if one.tokens else ""
        add_row(table, str(one.attempt), one.node, Text(one.outcome, style), one_line(one.reason, WORDS), tokens, time)
    return table


def _earned(rewards: Sequence[Reward]) -> Table:
    columns = ("attempt", "node", "by", "score", "signal", "reason")
    table = table_of(columns, title="Rewards", right=("attempt", "score", "signal"), ratios={"reason": 1})
    for reward in rewards:
        signal = f"{reward.signal.total:.2f}" if reward.source in (RULES, JUDGE) else ""
        reason = one_line(reward.reason, WORDS)
        add_row(table, str(reward.attempt), reward.node, reward.source, f"{reward.score:.2f}", signal, reason)
    return table


def _show_answer(screen: Console, record: TaskRecord) -> None:
    envelope, result = record.envelope, record.envelope.result
    for label, error in (("Error", record.error), ("Error of the attempt before", envelope.last_error)):
        if error is not None:
            screen.print()
            screen.print(Text.assemble((f"{label}: ", "red"), _complaint(error)))
    if envelope.excluded:
        screen.print(Text(f"Excluded: {', '.join(envelope.excluded)}"))
    for warning in envelope.warnings:
        screen.print(Text(f"Warning: {printable(warning)}", "yellow"))
    for phase, usage in envelope.phase_usage.items():
        guessed = "about " if usage.estimated else ""
        asked = f"{usage.requests} questions to a model, {guessed}{usage.tokens} tokens"
        screen.print(Text(f"{phase.upper()}: {asked}", "dim"))
    if result is None:
        _show_refused(screen, record.error)
        return
    guessed = "about " if result.estimated_usage else ""
    tokens = f"{guessed}{result.prompt_tokens} + {result.completion_tokens} tokens" if result.tokens else "no tokens"
    judged = f", judged {record.score:.2f}" if record.score is not None else ""
    screen.print()
    title = "Answer, the best of those refused" if record.below_threshold else "Answer"
    screen.print(Text(f"{title} ({tokens}, {result.steps} steps, {span(result.duration_s)}{judged})", "bold"))
    _show_text(screen, result.content, truncated=result.truncated)


def _show_refused(screen: Console, error: TaskError | None) -> None:
    """Print the best refused answer of a task that failed, if there is one."""
    best = error.best_rejected if error is not None else None
    if best is not None:
        screen.print()
        judged = f", judged {best.score:.2f}" if best.score else ""
        screen.print(Text(f"Best refused answer ({best.node}{judged})", "bold"))
        _show_text(screen, best.content, truncated=best.truncated)


def _show_text(screen: Console, content: str, *, truncated: bool) -> None:
    lines = printable(content[:ANSWER_CHARS]).strip().splitlines()
    screen.print(Text("\n".join(lines[:ANSWER_LINES])))
    if len(lines) > ANSWER_LINES or len(content) > ANSWER_CHARS or truncated:
        cut = " and was longer still" if truncated else ""
        screen.print(Text(f"… {len(content)} characters in all{cut}; --json has them", "dim"))


def _complaint(error: TaskError) -> str:
    on = f" ({error.node_id})" if error.node_id else ""
    return f"{error.code}: {one_line(error.message, WORDS)}{on}"

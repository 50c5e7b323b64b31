"""Explains why the winner of an auction won, in the terms of its award policy. No I/O."""

from loom.phases.match.scoring import AVAILABILITY_WEIGHT, TOOLS_WEIGHT, TRUST_WEIGHT
from loom.schemas.auction import Award, ScoredBid

CLOSE = 0.005
"""Scores nearer than this look the same with two decimals."""
BY_EVIDENCE = ("", "glr_ucb", "ucb", "greedy")
"""Policies whose trust is evidence and claim blended, plus a bonus; empty: an award without a policy."""
TRUST = {
    "": "the bonus being part of trust",
    "glr_ucb": "the bonus being part of trust",
    "ucb": "the bonus being part of trust",
    "greedy": "trust being without a bonus",
    "thompson": "trust being a draw, and the bonus what it is above the evidence",
    "round_robin": "trust being 1 / (1 + tasks of the domain)",
    "random": "trust being drawn at random",
}
"""Policy -> what the trust of a bid is; any other is a function's own."""


def why(award: Award) -> str:
    """Return in one sentence why the winner won."""
    if award.pinned:
        return f"{award.node} was given the task without an auction: the task is pinned to it."
    if not award.bids:
        return f"{award.node} won; the bids are not known."
    best = award.bids[0]
    if len(award.bids) == 1:
        trusted = f" ({_trusted(best)})" if award.policy in BY_EVIDENCE else ""
        return f"{best.node} won with {best.score:.2f}: no other node bid{trusted}."
    second = award.bids[1]
    result = f"{best.node} won with {best.score:.2f} to {second.score:.2f} of {second.node}"
    if second.comes_last and not best.comes_last:
        return f"{result}, which comes last: another newcomer of the owner {second.owner} has failed the task."
    parts = sorted(_advantages(award.policy, best, second), reverse=True)
    if best.score - second.score < CLOSE and parts[0][0] < CLOSE:
        return f"{result}: they are equal, and the task's id decided."
    against = parts[-1]
    although = f", although {_worse(award.policy, against[1], best, second)}" if against[0] <= -CLOSE else ""
    return f"{result}: {_better(award.policy, parts[0][1], best, second)}{although}."


def rests_on(award: Award) -> str:
    """Return what the scores of the bids rest on, and what they are made of."""
    if award.evidence_seq:
        evidence = f"by rewards up to {award.evidence_seq}"
    elif award.policy in (*BY_EVIDENCE, "thompson"):
        evidence = "by claims alone: no rewards were known"
    else:
        evidence = "no rewards were known"
    if award.policy == "random":
        basis = "policy random"
    else:
        basis = f"policy {award.policy}, {evidence}" if award.policy else evidence
    weights = f"{TRUST_WEIGHT} trust + {AVAILABILITY_WEIGHT} (1 - load) + {TOOLS_WEIGHT} tools"
    trust = TRUST.get(award.policy, "trust and bonus being its own")
    return f"{basis[0].upper()}{basis[1:]}; total = {weights}, {trust}."


def _advantages(policy: str, best: ScoredBid, second: ScoredBid) -> list[tuple[float, str]]:
    """What each part of the score adds to the lead; only where trust is evidence is its bonus a part by itself."""
    bonus = best.bonus - second.bonus if policy in BY_EVIDENCE else 0.0
    parts = [
        (TRUST_WEIGHT * (best.trust - second.trust - bonus), "trust"),
        (AVAILABILITY_WEIGHT * (second.load - best.load), "load"),
        (TOOLS_WEIGHT * (best.tools - second.tools), "tools"),
    ]
    return [*parts, (TRUST_WEIGHT * bonus, "bonus")] if policy in BY_EVIDENCE else parts


def _better(policy: str, part: str, best: ScoredBid, second: ScoredBid) -> str:
    return {
        "trust": _difference(policy, best, second, more=True),
        "bonus": f"less is known about it, which earns a bonus of {best.bonus:.2f} against {second.bonus:.2f}",
        "load": f"it is less busy, {best.load:.0%} against {second.load:.0%}",
        "tools": f"it has more of the tools, {best.tools:.0%} against {second.tools:.0%}",
    }[part]


def _worse(policy: str, part: str, best: ScoredBid, second: ScoredBid) -> str:
    return {
        "trust": _difference(policy, best, second, more=False),
        "bonus": f"the other has the bonus of the little known, {second.bonus:.2f} against {best.bonus:.2f}",
        "load": f"it is busier, {best.load:.0%} against {second.load:.0%}",
        "tools": f"it has fewer of the tools, {best.tools:.0%} against {second.tools:.0%}",
    }[part]


def _difference(policy: str, best: ScoredBid, second: ScoredBid, *, more: bool) -> str:
    """Return how the policy distinguishes two bids; `more`: the difference favours the winner."""
    amount = "more" if more else "less"
    if policy in BY_EVIDENCE:
        return f"it is trusted {amount}, for {_trusted(best)} against {_trusted(second)}"
    if policy == "round_robin":
        return f"it has had {'fewer' if more else 'more'} tasks of the domain lately"
    numbers = f"{best.trust:.2f} against {second.trust:.2f}"
    if policy == "thompson":
        return f"its draw is {'higher' if more else 'lower'}, {numbers}"
    if policy == "random":
        return f"drawn at random, {numbers}" if more else f"its draw is lower, {numbers}"
    return f"{policy} trusts it {amount}, {numbers}"


def _trusted(bid: ScoredBid) -> str:
    if bid.shared_count:
        return f"a claim of {bid.self_rating:.2f} and the {bid.shared_count} attempts of {bid.owner}'s newcomers"
    if bid.evidence is None:
        return f"a claim of {bid.self_rating:.2f} and no evidence"
    return f"a claim of {bid.self_rating:.2f} and a mean reward of {bid.evidence:.2f} over {bid.count}"

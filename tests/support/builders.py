"""Builders of messages with defaults that a test overrides where they matter."""

from typing import Any

from msgspec.structs import replace

from loom.schemas.auction import Award, CallForBids, Lot
from loom.schemas.base import new_id
from loom.schemas.envelope import Envelope, Spec
from loom.schemas.learning.reward import Reward
from loom.schemas.task import Submission, TaskAd


def call_for_bids(domain: str = "code", *, answer_to: str = "match-1.c1", **facts: Any) -> CallForBids:
    """Return a call of one lot, the task `t1`; `facts` of a lot or of the call replace those of this one."""
    about = {name: facts.pop(name) for name in list(facts) if name in Lot.__struct_fields__}
    lot = Lot(**{"task_id": "t1", "attempt": 1, "complexity": 0.5, "remaining_s": 60.0, **about})
    return CallForBids(**{"call_id": "c1", "domain": domain, "lots": (lot,), "answer_to": answer_to, **facts})


def ad(description: str = "add two numbers", **facts: Any) -> TaskAd:
    """Return an ad, by default in the domain `code`."""
    return TaskAd(description=description, **{"domain": "code", "estimated_complexity": 0.3, **facts})


def envelope(task: TaskAd | None = None, *, left_s: float = 60, now: float, **facts: Any) -> Envelope:
    """Return the envelope of an admitted task, `left_s` before its deadline."""
    task = task or ad()
    spec = Spec(complexity=0.3, domains=(task.domain or "general",), method="given")
    return Envelope(ad=task, **{"deadline": now + left_s, "spec": spec, "budget": task.token_budget, **facts})


def awarded(env: Envelope, node_id: str = "n1", host_id: str = "h1", **facts: Any) -> Envelope:
    """Return the envelope with an award, as MATCH publishes it."""
    return replace(env, award=Award(node_id=node_id, host_id=host_id, score=0.7, **facts))


def submission(task: TaskAd, **facts: Any) -> Submission:
    """Return the submission of an ad."""
    return Submission(ad=task, **{"submission": new_id(), **facts})


def reward(n: int, node: str = "n1", score: float = 1.0, **facts: Any) -> Reward:
    """Return the reward of the source `rules` for the first attempt at task `t<n>`, which ended at second `n`."""
    wanted: dict[str, Any] = {"domain_token": "code", "tokens": 10, "seconds": 0.5, **facts}
    return Reward(
        reward_id=f"t{n}:1:rules", task_id=f"t{n}", attempt=1, node_id=node, score=score, ended_at=float(n), **wanted
    )

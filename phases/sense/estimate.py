"""How hard a task is and which domains it belongs to, by a look at its words; and whether it is to be divided."""

import re
from typing import Annotated, Any

from msgspec import Meta
from msgspec.structs import replace

from loom.phases.shared.scale_rule import PLAN_KEY, with_undivided_note
from loom.schemas.base import CheckedMessage, Unit
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Spec
from loom.schemas.task import TaskAd
from loom.schemas.text.model_json import read_model_json

GENERAL = "general"

_KEYWORDS: dict[str, tuple[str, ...]] = {
    "code": ("code", "function", "class", "bug", "refactor", "implement", "python", "javascript", "api", "algorithm",
             "compile", "unit test", "代码", "函数", "算法", "实现", "编程", "程序"),
    "data": ("data", "csv", "table", "column", "statistic", "dataset", "sql", "average", "chart", "sales",
             "数据", "统计", "分析", "表格", "销售"),
    "writing": ("write", "essay", "article", "summar", "text", "translate", "email", "story", "letter", "key sentence",
                "写", "文章", "摘要", "总结", "翻译", "文本"),
    "math": ("calculate", "equation", "proof", "integral", "probability", "matrix", "solve",
             "数学", "计算", "方程", "证明"),
    "research": ("research", "compare", "survey", "investigate", "literature", "sources",
                 "研究", "调查", "文献", "比较"),
}  # fmt: skip

_SENTENCE_END = re.compile(r"(?<![.!?。！？])[.!?。！？]++(?:\s|\Z)")  # noqa: RUF001 - full-width on purpose
"""Marks at the end of a word; the look behind keeps a long row of marks from being read once for each of them."""
_WIDE_MARK = re.compile(r"[。！？]")  # noqa: RUF001 - full-width on purpose
"""Ends a sentence without white space after it."""
_LIST_ITEM = re.compile(r"^[^\S\n]*+(?:[-*•]|\d++[.)])\s", re.MULTILINE)
_CJK = re.compile(r"[\u3400-\u9fff\u3040-\u30ff\uac00-\ud7af]")
_CJK_OR_MARK = re.compile(_CJK.pattern + r"|[\u3000-\u303f\uff01-\uff0f\uff1a-\uff20]")

CJK_PER_WORD = 2  # Chinese words are about two characters long


class Estimate(CheckedMessage, frozen=True, kw_only=True):
    """A model's answer, in the shape it is asked for."""

    complexity: Unit
    domains: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...], Meta(min_length=1, max_length=4)]


def estimate_schema() -> dict[str, Any]:
    """Return the JSON Schema of an `Estimate`."""
    return {
        "type": "object",
        "properties": {
            "complexity": {"type": "number", "minimum": 0, "maximum": 1},
            "domains": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
        },
        "required": ["complexity", "domains"],
        "additionalProperties": False,
    }


def find_domains(text: str) -> tuple[str, ...]:
    """Return the domains whose keywords occur in `text`, most keywords first; empty when none do."""
    lowered = text.casefold()
    hits = {domain: sum(word in lowered for word in words) for domain, words in _KEYWORDS.items()}
    return tuple(sorted((d for d, n in hits.items() if n), key=lambda d: (-hits[d], list(_KEYWORDS).index(d))))


def complexity_of(text: str, domains: int) -> float:
    """Return how hard `text` looks, 0 to 0.9: the seed's heuristic.

    min(words / 200, .5), + .15 for more than two sentences, + .1 for a list, + .15 for more than two domains.
    A CJK character counts as half a word.
    """
    cjk = len(_CJK.findall(text))
    words = len(_CJK_OR_MARK.sub(" ", text).split()) + cjk / CJK_PER_WORD
    score = min(words / 200, 0.5)
    rest, ends = _SENTENCE_END.subn(" ", text)
    if ends + len(_WIDE_MARK.findall(rest)) > 2:  # noqa: PLR2004 - the seed's number
        score += 0.15
    if _LIST_ITEM.search(text):
        score += 0.1
    if domains > 2:  # noqa: PLR2004 - the seed's number
        score += 0.15
    return round(score, 4)


def estimate_task(ad: TaskAd) -> tuple[Spec, bool]:
    """Return the spec by the ad's own words, and whether the ad says too little to trust it."""
    found = find_domains(ad.description)
    domains = (ad.domain, *(d for d in found if d != ad.domain))[:8] if ad.domain.strip() else (found or (GENERAL,))
    given = bool(ad.domain.strip()) and ad.estimated_complexity is not None
    complexity = ad.estimated_complexity
    if complexity is None:
        complexity = complexity_of(ad.description, len(found))
    spec = Spec(complexity=complexity, domains=domains, method="given" if given else "heuristic")
    return spec, not ad.domain.strip() and not found


def with_division(spec: Spec, ad: TaskAd, depth: int, config: ClusterConfig) -> Spec:
    """Return the spec with whether the task is to be divided, and how deep divisions may go.

    The ad's limits only narrow the settings. No phase after this one asks its own settings about it.

    Args:
        depth: Divisions above the task.
    """
    divide, deepest = _is_to_be_divided(spec, ad, config), config.max_depth
    if ad.limits is not None and ad.limits.max_depth is not None:
        deepest = min(deepest, ad.limits.max_depth)
    spec = replace(spec, divide=divide, deepest=deepest)
    return (
        with_undivided_note(spec, f"at most {deepest} divisions deep are allowed")
        if divide and depth >= deepest
        else spec
    )


def _is_to_be_divided(spec: Spec, ad: TaskAd, config: ClusterConfig) -> bool:
    """Whether the ad gives or wants a plan, or the task is hard and may go to any node."""
    if ad.context.get(PLAN_KEY) not in (None, False):
        return True
    threshold = config.mitosis_threshold
    if ad.limits is not None and ad.limits.mitosis_threshold is not None:
        threshold = max(threshold, ad.limits.mitosis_threshold)
    return ad.node_id is None and spec.complexity > threshold


def read_estimate(answer: str) -> Estimate:
    """Return the estimate in a model's answer, which may stand in prose, in a code fence or after its reasoning.

    Raises:
        Undecodable: There is none.
    """
    return read_model_json(answer, Estimate)


def prompt(ad: TaskAd) -> str:
    """Return the question put to a model."""
    return (
        "Classify this task. Answer with JSON only: complexity (0 trivial to 1 very hard) and domains "
        "(one to four lower-case words, best first).\n\nTask:\n" + ad.description[:4000]
    )

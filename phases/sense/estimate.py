"""Estimates complexity and domains of a task from its text, and decides whether it is divided. Pure."""

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
"""Punctuation at the end of a word; the lookbehind keeps a long row of marks from quadratic time."""
_WIDE_MARK = re.compile(r"[。！？]")  # noqa: RUF001 - full-width on purpose
"""Full-width marks end a sentence without white space after them."""
_LIST_ITEM = re.compile(r"^[^\S\n]*+(?:[-*•]|\d++[.)])\s", re.MULTILINE)
_CJK = re.compile(r"[\u3400-\u9fff\u3040-\u30ff\uac00-\ud7af]")
_CJK_OR_MARK = re.compile(_CJK.pattern + r"|[\u3000-\u303f\uff01-\uff0f\uff1a-\uff20]")

CJK_PER_WORD = 2  # Chinese words are about two characters long


class Estimate(CheckedMessage, frozen=True, kw_only=True):
    """An estimate by a model."""

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
    """Return the domains whose keywords occur in `text`, most keywords first; may be empty."""
    lowered = text.casefold()
    hits = {domain: sum(word in lowered for word in words) for domain, words in _KEYWORDS.items()}
    return tuple(sorted((d for d, n in hits.items() if n), key=lambda d: (-hits[d], list(_KEYWORDS).index(d))))


def complexity_of(text: str, domains: int) -> float:
    """Return the complexity of `text` by the heuristic of loom-agent 0.6, 0 to 0.9.

    min(words / 200, .5), + .15 for more than two sentences, + .1 for a list, + .15 for more than two domains.
    A CJK character counts as half a word.

    Args:
        domains: Number of domains found in the text.
    """
    cjk = len(_CJK.findall(text))
    words = len(_CJK_OR_MARK.sub(" ", text).split()) + cjk / CJK_PER_WORD
    score = min(words / 200, 0.5)
    rest, ends = _SENTENCE_END.subn(" ", text)
    if ends + len(_WIDE_MARK.findall(rest)) > 2:  # noqa: PLR2004 - the number of loom-agent 0.6
        score += 0.15
    if _LIST_ITEM.search(text):
        score += 0.1
    if domains > 2:  # noqa: PLR2004 - the number of loom-agent 0.6
        score += 0.15
    return round(score, 4)


def estimate_task(ad: TaskAd) -> tuple[Spec, bool]:
    """Return the spec estimated from the ad's text, and whether the estimate is unsure: no domain is given or found."""
    domains_found = find_domains(ad.description)
    domains = (
        (ad.domain, *(d for d in domains_found if d != ad.domain))[:8]
        if ad.domain.strip()
        else (domains_found or (GENERAL,))
    )
    is_given = bool(ad.domain.strip()) and ad.estimated_complexity is not None
    complexity = ad.estimated_complexity
    if complexity is None:
        complexity = complexity_of(ad.description, len(domains_found))
    spec = Spec(complexity=complexity, domains=domains, method="given" if is_given else "heuristic")
    return spec, not ad.domain.strip() and not domains_found


def with_division(spec: Spec, ad: TaskAd, depth: int, config: ClusterConfig) -> Spec:
    """Return the spec with the decision whether the task is divided, and how deep divisions may go.

    The ad's limits can only narrow the settings. Later phases use this decision instead of their own settings.

    Args:
        depth: Number of divisions above the task.
    """
    divide, deepest = _should_divide(spec, ad, config), config.max_depth
    if ad.limits is not None and ad.limits.max_depth is not None:
        deepest = min(deepest, ad.limits.max_depth)
    spec = replace(spec, divide=divide, deepest=deepest)
    return (
        with_undivided_note(spec, f"at most {deepest} divisions deep are allowed")
        if divide and depth >= deepest
        else spec
    )


def _should_divide(spec: Spec, ad: TaskAd, config: ClusterConfig) -> bool:
    """Return whether the ad contains or requests a plan, or a complex task may go to any node."""
    if ad.context.get(PLAN_KEY) not in (None, False):
        return True
    threshold = config.mitosis_threshold
    if ad.limits is not None and ad.limits.mitosis_threshold is not None:
        threshold = max(threshold, ad.limits.mitosis_threshold)
    return ad.node_id is None and spec.complexity > threshold


def read_estimate(answer: str) -> Estimate:
    """Return the estimate in a model's answer, which may be in prose, in a code fence or after its reasoning.

    Raises:
        Undecodable: The answer contains no estimate.
    """
    return read_model_json(answer, Estimate)


def prompt(ad: TaskAd) -> str:
    """Return the prompt for a model's estimate."""
    return (
        "Classify this task. Answer with JSON only: complexity (0 trivial to 1 very hard) and domains "
        "(one to four lower-case words, best first).\n\nTask:\n" + ad.description[:4000]
    )

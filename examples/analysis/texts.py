"""Finds keywords and key sentences of English and Chinese texts."""

import math
import re
from collections import Counter
from pathlib import Path

from analysis.input_files import read_input
from loom.schemas.errors import AgentFailed

COMMON = frozenset(Path(__file__).with_name("common_words.txt").read_text(encoding="utf-8").split())
"""English words that are not keywords."""
CJK_GLUE = "的了在是就和也都很把不用会到要一有里以下同种么没去又个让为这那其最多少更比时候们自己可得因所第"
"""Chinese characters with a grammatical function, which are rarely part of a keyword."""
CJK_RUN = re.compile(rf"[^\W\d_a-zA-Z{CJK_GLUE}]{{2,}}")
CJK = re.compile(r"[\u3400-\u9fff]")
STOP = r".!?\u3002\uff01\uff1f"
SENTENCE = re.compile(rf"[^{STOP}\n]+(?:[.!?](?!\s|$)[^{STOP}\n]*)*[{STOP}]+")
KEY_SENTENCES = 3


def sentences_of(text: str) -> list[str]:
    """Return the sentences of an English or Chinese text."""
    return [sentence.strip() for sentence in SENTENCE.findall(text)]


def words_of(text: str) -> list[str]:
    """Return the lower-case words without common ones; for Chinese text, pairs of characters."""
    if _is_chinese(text):
        runs = [run for run in CJK_RUN.findall(text) if CJK.match(run)]
        return [run[index : index + 2] for run in runs for index in range(len(run) - 1)]
    return [word for word in re.findall(r"[a-z]+", text.casefold()) if len(word) > 2 and word not in COMMON]  # noqa: PLR2004


def text_keywords(file: str) -> str:
    """Return the number of words and sentences of a text, its keywords and its readability."""
    text = read_input(file)
    sentences = sentences_of(text)
    if not sentences:
        raise AgentFailed(f"{file} holds no sentence")
    chinese = _is_chinese(text)
    size = len(CJK.findall(text)) if chinese else len(re.findall(r"[A-Za-z']+", text))
    common = [f"{word} ({count})" for word, count in Counter(words_of(text)).most_common(8) if count > 1]
    return "\n".join(
        [
            f"{file}: {size} {'characters' if chinese else 'words'}, {len(sentences)} sentences",
            f"keywords: {', '.join(common) or 'none occurs twice'}",
            f"readability: {_readability(text, size, len(sentences))}",
        ]
    )


def text_summary(file: str) -> str:
    """Return the keywords and the readability of a text, and the key sentences with its most frequent words."""
    text = read_input(file)
    weights = Counter(words_of(text))
    sentences = sentences_of(text)

    def weight(index: int) -> float:
        words = set(words_of(sentences[index]))
        return sum(weights[word] for word in words) / math.sqrt(len(words)) if words else 0.0

    best = sorted(range(len(sentences)), key=weight, reverse=True)[:KEY_SENTENCES]
    return "\n".join([text_keywords(file), "key sentences:", *(f"  - {sentences[index]}" for index in sorted(best))])


def _is_chinese(text: str) -> bool:
    return len(CJK.findall(text)) > len(re.findall(r"[A-Za-z]", text))


def _readability(text: str, size: int, sentences: int) -> str:
    per_sentence = size / sentences
    if _is_chinese(text):
        return f"{per_sentence:.0f} characters per sentence"
    vowel_groups = sum(max(1, len(re.findall(r"[aeiouy]+", word))) for word in re.findall(r"[a-z']+", text.casefold()))
    ease = 206.835 - 1.015 * per_sentence - 84.6 * vowel_groups / size  # Flesch reading ease
    level = "easy" if ease >= 70 else "plain" if ease >= 50 else "difficult"  # noqa: PLR2004
    return f"{level}, Flesch reading ease {ease:.0f}, {per_sentence:.0f} words per sentence"

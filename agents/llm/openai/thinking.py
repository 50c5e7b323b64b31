"""Separates a block of reasoning at the start of a text from the answer. Pure."""

OPENING, CLOSING = "<think>", "</think>"


class ThinkBlock:
    """Separates `<think>…</think>` at the start of a streamed text from the answer.

    Servers without a parser for reasoning leave such blocks in the text. A tag may be split between pieces. A block
    without a closing tag continues to the end.
    """

    def __init__(self) -> None:
        self._state = "start"  # start: before a block; inside: in a block; answer: after the blocks
        self._held = ""  # text that may be a part of a tag
        self._had_block = False

    def split(self, text: str) -> tuple[str, str]:
        """Add a piece, and return the reasoning and the answer text that are certain after it."""
        if self._state == "answer":
            return "", text
        self._held += text
        thoughts = ""
        while True:
            if self._state == "start":
                rest = self._held.lstrip()
                if OPENING.startswith(rest):
                    return thoughts, ""
                if not rest.startswith(OPENING):
                    self._state = "answer"
                    answer = rest if self._had_block else self._held
                    self._held = ""
                    return thoughts, answer
                self._state, self._held, self._had_block = "inside", rest.removeprefix(OPENING), True
            before, tag, rest = self._held.partition(CLOSING)
            if not tag:
                kept = _tail(self._held)
                thoughts, self._held = (
                    thoughts + self._held[: len(self._held) - kept],
                    self._held[-kept:] if kept else "",
                )
                return thoughts, ""
            self._state, self._held, thoughts = "start", rest, thoughts + before

    def rest(self) -> tuple[str, str]:
        """Return the remaining reasoning and answer text after the last piece."""
        held, self._held = self._held, ""
        if self._state == "inside":
            return held, ""
        return "", held.lstrip() if self._had_block else held


def without_thoughts(text: str) -> tuple[str, str]:
    """Return the reasoning at the start of a whole text, and the answer without it."""
    block = ThinkBlock()
    thoughts, answer = block.split(text)
    more, rest = block.rest()
    return thoughts + more, answer + rest


def _tail(text: str) -> int:
    """Return the number of characters at the end of `text` that may be the start of the closing tag."""
    return next((size for size in range(len(CLOSING) - 1, 0, -1) if text.endswith(CLOSING[:size])), 0)

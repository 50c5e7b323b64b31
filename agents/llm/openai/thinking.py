"""A block of reasoning that a model writes at the start of its text. Pure."""

OPENING, CLOSING = "<think>", "</think>"


class ThinkBlock:
    """Separates `<think>…</think>` at the start of an answer from the answer, over any number of pieces.

    Servers without a parser for a model's reasoning leave such blocks in the text. A tag may be cut anywhere; a block
    that is never closed lasts to the end.
    """

    def __init__(self) -> None:
        self._state = "start"  # start: a block may begin; inside: of a block; answer: no block can begin any more
        self._held = ""  # text that may turn out to be a part of a tag
        self._found = False

    def split(self, text: str) -> tuple[str, str]:
        """Return the thoughts and the answer's text that are certain once `text` has come."""
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
                    answer = rest if self._found else self._held
                    self._held = ""
                    return thoughts, answer
                self._state, self._held, self._found = "inside", rest.removeprefix(OPENING), True
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
        """Return what was held back, as `split` does, after the last piece."""
        held, self._held = self._held, ""
        if self._state == "inside":
            return held, ""
        return "", held.lstrip() if self._found else held


def without_thoughts(text: str) -> tuple[str, str]:
    """Return the thoughts at the start of a whole answer, and the answer without them."""
    block = ThinkBlock()
    thoughts, answer = block.split(text)
    more, rest = block.rest()
    return thoughts + more, answer + rest


def _tail(text: str) -> int:
    """How many characters at the end of `text` may begin the closing tag."""
    return next((size for size in range(len(CLOSING) - 1, 0, -1) if text.endswith(CLOSING[:size])), 0)

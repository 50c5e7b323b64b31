"""A block of reasoning that a model writes at the start of its text. Pure."""

OPENING, CLOSING = "<think>", "</think>"


class ThinkBlock:
    """Separates a leading `<think>…</think>` from the text that follows, however the text is cut into pieces.

    A block that is never closed is reasoning to its end.
    """

    def __init__(self) -> None:
        self._state = "start"  # then "inside" and "after"
        self._held = ""

    def split(self, text: str) -> tuple[str, str]:
        """Return the reasoning and the text that the next piece holds; a part of a tag is held back."""
        if self._state == "text":
            return "", text
        self._held += text
        if self._state == "start":
            start = self._held.lstrip()
            if not start.startswith(OPENING):
                if OPENING.startswith(start):
                    return "", ""
                self._state = "text"
                return "", self._take()
            self._state, self._held = "inside", start.removeprefix(OPENING)
        reasoning = ""
        if self._state == "inside":
            reasoning, closing, after = self._held.partition(CLOSING)
            if not closing:
                kept = _overlap(self._held)
                reasoning, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
                return reasoning, ""
            self._state, self._held = "after", after
        self._held = self._held.lstrip()  # the line breaks between the block and the answer
        if self._held:
            self._state = "text"
        return reasoning, self._take()

    def rest(self) -> tuple[str, str]:
        """Return what is held back at the end, as reasoning and text."""
        inside = self._state == "inside"
        held = self._take()
        return (held, "") if inside else ("", held)

    def _take(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str) -> int:
    """Return how many characters at the end of `text` may be the start of the closing tag."""
    return next((n for n in range(min(len(text), len(CLOSING) - 1), 0, -1) if CLOSING.startswith(text[-n:])), 0)

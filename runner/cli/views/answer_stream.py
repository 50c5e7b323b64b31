"""An answer on a terminal, while it is written."""

import sys

from loom.runner.cli.views.tables import printable


class Transcript:
    """Prints an answer piece by piece, and at its end only what has not been printed yet."""

    def __init__(self) -> None:
        self._attempt = 0
        self._pieces: list[str] = []
        self._fresh_line = True

    def add(self, attempt: int, text: str) -> None:
        """Print a piece of an attempt's answer; a later attempt starts on a new line."""
        if attempt != self._attempt:
            self.break_line()
            self._attempt, self._pieces = attempt, []
        self._pieces.append(text)
        self._write(text)

    def break_line(self) -> None:
        """Start a new line, unless one has just begun."""
        if not self._fresh_line:
            self._write("\n")

    def close(self, content: str) -> None:
        """Print the part of the whole answer that has not been printed."""
        written = "".join(self._pieces)
        if content.startswith(written):
            self._write(content[len(written) :])
        elif content.strip() not in written:  # pieces were lost, or the final answer differs from the streamed text
            self.break_line()
            self._write(content)

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(printable(text))
            sys.stdout.flush()
            self._fresh_line = text.endswith("\n")

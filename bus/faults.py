"""Unexpected exceptions as facts for a log line: what and where, never the values that were around."""

import traceback


def describe(error: BaseException | None) -> dict[str, str]:
    """Return type, message and innermost place of `error`."""
    if error is None:
        return {"error": "none"}
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
    return {"error": f"{type(error).__name__}: {error}"[:500], "at": where}

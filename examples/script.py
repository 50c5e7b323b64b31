"""A script without an event loop: `python examples/script.py`."""

from loom import Runtime, TaskAd
from loom.types import CapabilityProfile


def count_words(description: str) -> str:
    """Return the number of words in the description."""
    return f"{len(description.split())} words"


with Runtime() as rt:
    rt.add_agent(count_words, name="counter", capabilities=CapabilityProfile(scores={"writing": 0.8}))
    for text in ("how many words are these", "and these"):
        print(rt.submit_sync(TaskAd(domain="writing", description=text)))

"""The subscriptions of a client to the results of its tasks: one for many open tasks of a submitter."""

import time
from collections.abc import Callable
from typing import Final

from loom.bus.natsio.connection import Subscription
from loom.bus.natsio.requests import Requests
from loom.bus.natsio.transport.message import Msg
from loom.bus.subjects import Subjects

FOREIGN_LIMIT: Final = 256
"""Results of other clients by which they may exceed the client's own ones on a shared subscription."""
SEPARATE_S: Final = 60.0
"""Seconds for which each task has a subscription of its own after this limit was exceeded."""

ResultReader = Callable[[Msg], None]
"""Called with each message on the result subject of a task."""


class ResultSubscriptions:
    """Passes the results of tasks to their readers.

    The tasks of a submitter share one subscription while several are open; a single one has a subscription of its own.
    Clients with the same submitter receive each other's results on the shared subscription. If these are the majority,
    each task gets a subscription of its own for a while.
    """

    def __init__(self, requests: Requests, subjects: Subjects) -> None:
        self._requests = requests
        self._subjects = subjects
        self._by_submitter: dict[str, _SubmitterResults] = {}

    async def add(self, submitter: str, task_id: str, reader: ResultReader) -> None:
        """Call `reader` with the results of a task that are published from now on.

        Raises:
            InvalidTask: The task id is not a token.
            BusUnavailable: The connection is closed.
            WrongEventLoop: The connection is open in another event loop.
        """
        self._requests.connection.check_loop()
        subject = self._subjects.of("result", submitter, task_id)
        results = self._by_submitter.get(submitter)
        if results is None:
            results = _SubmitterResults(self._requests, self._subjects.of("result", submitter, "*"))
            self._by_submitter[submitter] = results
        await results.add(subject, reader)

    def remove(self, submitter: str, task_id: str, reader: ResultReader) -> None:
        """End the calls of a reader; safe to call twice."""
        results = self._by_submitter.get(submitter)
        if results is not None:
            results.remove(self._subjects.of("result", submitter, task_id), reader)

    def reset(self) -> None:
        """Drop all readers; to be called before each `connect`, because subscriptions end with their connection."""
        self._by_submitter.clear()


class _SubmitterResults:
    """The subscriptions to the results of one submitter's tasks.

    Args:
        subjects: Pattern of the result subjects of all tasks of the submitter.
    """

    def __init__(self, requests: Requests, subjects: str) -> None:
        self._requests = requests
        self._connection = requests.connection
        self._subjects = subjects
        self._readers: dict[str, list[ResultReader]] = {}
        """Result subject of an open task -> its readers."""
        self._shared: Subscription | None = None
        self._separate: dict[str, Subscription] = {}
        """Result subject of an open task -> its own subscription, if it has one."""
        self._separate_until = 0.0
        """Monotonic time until which no shared subscription is opened."""
        self._foreign = 0
        """Results of other clients since the shared subscription was opened, less those of the own tasks; at least 0.
        """

    @property
    def _lacks_shared(self) -> bool:
        """Whether there is no shared subscription, although open tasks have no other one."""
        return self._shared is None and len(self._readers) > len(self._separate)

    async def add(self, subject: str, reader: ResultReader) -> None:
        self._readers.setdefault(subject, []).append(reader)
        try:
            await self._subscribe(subject)
        except BaseException:  # a cancelled caller cannot remove its reader
            self.remove(subject, reader)
            raise

    def remove(self, subject: str, reader: ResultReader) -> None:
        readers = self._readers.get(subject, [])
        if reader not in readers:
            return
        readers.remove(reader)
        if readers:
            return
        del self._readers[subject]
        separate = self._separate.pop(subject, None)
        if separate is not None:
            self._connection.unsubscribe(separate)
        if self._shared is not None and len(self._readers) == len(self._separate):
            self._connection.unsubscribe(self._shared)
            self._shared = None

    async def _subscribe(self, subject: str) -> None:
        """Subscribe to the results of an open task, unless a subscription includes them."""
        if subject in self._separate or not self._lacks_shared:
            return
        if len(self._readers) == 1 or time.monotonic() < self._separate_until:
            # For tasks one after the other: a server changes a subscription with a wildcard at a higher cost.
            await self._subscribe_separately(subject)
            return
        subscription = await self._connection.subscribe_sync(self._subjects, self._on_shared)
        if self._lacks_shared:
            self._shared, self._foreign = subscription, 0
        else:  # another reader has subscribed in the meantime, or all tasks have ended
            self._connection.unsubscribe(subscription)

    async def _subscribe_separately(self, subject: str) -> None:
        subscription = await self._connection.subscribe_sync(subject, self._on_separate)
        if subject in self._readers and subject not in self._separate:
            self._separate[subject] = subscription
        else:
            self._connection.unsubscribe(subscription)

    def _on_separate(self, msg: Msg) -> None:
        for reader in tuple(self._readers.get(msg.subject, ())):
            reader(msg)

    def _on_shared(self, msg: Msg) -> None:
        readers = self._readers.get(msg.subject)
        if readers is not None:
            self._foreign = max(0, self._foreign - 1)
            for reader in tuple(readers):
                reader(msg)
            return
        self._foreign += 1
        if self._foreign == FOREIGN_LIMIT:
            self._separate_until = time.monotonic() + SEPARATE_S
            self._connection.tasks.spawn(self._separate_all(), name="separate result subscriptions")

    async def _separate_all(self) -> None:
        """Give each open task a subscription of its own, and end the shared one when all of them are in effect."""
        shared, self._shared = self._shared, None
        try:
            for subject in [subject for subject in self._readers if subject not in self._separate]:
                await self._subscribe_separately(subject)
        finally:
            if shared is not None:
                await self._requests.drain(shared)

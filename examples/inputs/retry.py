import asyncio
import random
import time
from functools import wraps


class GaveUp(Exception):
    pass


def backoff(attempt, base=0.1, cap=10.0, jitter=random.random):
    """Return how many seconds to wait before `attempt`, doubling up to `cap`."""
    return min(cap, base * 2**attempt) * (0.5 + jitter() / 2)


def retry(times=3, on=(OSError,), wait=time.sleep):
    def decorate(function):
        @wraps(function)
        def call(*args, **kwargs):
            for attempt in range(times):
                try:
                    return function(*args, **kwargs)
                except on as error:
                    if attempt + 1 == times:
                        raise GaveUp(f"{function.__name__} failed {times} times") from error
                    wait(backoff(attempt))

        return call

    return decorate


async def retry_async(function, *args, times=3, on=(OSError, asyncio.TimeoutError), timeout=None):
    """Await `function(*args)` until it succeeds, at most `times` times."""
    for attempt in range(times):
        try:
            if timeout is not None:
                return await asyncio.wait_for(function(*args), timeout)
            return await function(*args)
        except on as error:
            if attempt + 1 == times:
                raise GaveUp(f"{function.__name__} failed {times} times") from error
            await asyncio.sleep(backoff(attempt))

"""A program as a user writes it: prints the ms its import, and then its first result, took."""

import asyncio
import time

began = time.perf_counter()
from loom import Runtime, TaskAd  # noqa: E402 - measured

imported = time.perf_counter()


async def work(description: str) -> str:
    return "done"


async def main() -> float:
    runtime = Runtime()
    runtime.add_agent(work)
    await runtime.submit(TaskAd(domain="code", description="first"))
    took = time.perf_counter() - imported
    await runtime.aclose()
    return took


print(1e3 * (imported - began), 1e3 * asyncio.run(main()))

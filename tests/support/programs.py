"""Python programs as processes of their own, without the settings of the machine the tests run on."""

import asyncio
import os
import sys

from support.command import FOREIGN
from support.openai_server import OpenAIServer

WITHIN_S = 40


async def output_of(*arguments: str, model: OpenAIServer | None = None) -> str:
    """Return what `python -W error` prints with these arguments; with `model`, that is the model of the program."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    if model is not None:
        environment |= {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "test"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    async with asyncio.timeout(WITHIN_S):
        out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return out.decode()

"""A web service with FastAPI that opens a Runtime in its lifespan: `uvicorn fastapi_app:app`.

    curl -X POST localhost:8000/tasks -H 'Content-Type: application/json' -d '{"description": "how many words"}'

With NATS_URL set, tasks go to the agents of that cluster. Without it, each worker process starts its own server.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel

from loom import Runtime, TaskAd
from loom.schemas.errors import InvalidTask, LoomError
from loom.types import CapabilityProfile


class Work(BaseModel):
    """The body of a request."""

    description: str
    domain: str = "writing"
    timeout_s: float = 30.0


async def count_words(description: str) -> str:
    """Return the number of words in the description."""
    return f"{len(description.split())} words"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open a Runtime with the app and close it with the app."""
    rt = Runtime()
    rt.add_agent(count_words, name="counter", capabilities=CapabilityProfile(scores={"writing": 0.8}))
    async with rt:
        app.state.loom = rt
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/tasks")
async def do_task(work: Work, request: Request) -> dict[str, str]:
    """Submit a task and return its answer; the task is cancelled if the client disconnects."""
    rt: Runtime = request.app.state.loom
    try:
        answer = await rt.submit(TaskAd(**work.model_dump()), cancel_with_caller=True)
    except InvalidTask as error:
        raise HTTPException(422, {"code": error.code, "message": error.message, "field": error.field}) from None
    except LoomError as error:
        raise HTTPException(502, {"code": error.code, "message": error.message}) from None
    return {"answer": answer}

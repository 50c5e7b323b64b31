"""A web service with Flask and synchronous views: `flask --app flask_app run`.

Views of Django work in the same way. The module creates the Runtime, and the first task of a worker process opens it.
Worker processes that are forked later open their own.
"""

from flask import Flask, request
from flask.typing import ResponseReturnValue

from loom import Runtime, TaskAd
from loom.schemas.errors import InvalidTask, LoomError
from loom.types import CapabilityProfile


def count_words(description: str) -> str:
    """Return the number of words in the description."""
    return f"{len(description.split())} words"


app = Flask(__name__)
rt = Runtime()
rt.add_agent(count_words, name="counter", capabilities=CapabilityProfile(scores={"writing": 0.8}))


@app.post("/tasks")
def do_task() -> ResponseReturnValue:
    """Submit a task and return its answer."""
    try:
        return {"answer": rt.submit_sync(TaskAd(domain="writing", description=request.json["description"]))}
    except InvalidTask as error:
        return {"code": error.code, "message": error.message, "field": error.field}, 422
    except LoomError as error:
        return {"code": error.code, "message": error.message}, 502

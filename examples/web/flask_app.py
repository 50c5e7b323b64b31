"""A web service with Flask, whose views are synchronous: `flask --app flask_app run`.

Django's views work alike. The Runtime is made with the module and opens with the first task, in whichever worker
process needs it; a worker forked afterwards opens one of its own.
"""

from flask import Flask, request
from flask.typing import ResponseReturnValue

from loom import Runtime, TaskAd
from loom.schemas.errors import InvalidTask, LoomError
from loom.types import CapabilityProfile


def count_words(description: str) -> str:
    """Return how many words the description has."""
    return f"{len(description.split())} words"


app = Flask(__name__)
rt = Runtime()
rt.add_agent(count_words, name="counter", capabilities=CapabilityProfile(scores={"writing": 0.8}))


@app.post("/tasks")
def do_task() -> ResponseReturnValue:
    """Have a task done and return its answer."""
    try:
        return {"answer": rt.submit_sync(TaskAd(domain="writing", description=request.json["description"]))}
    except InvalidTask as error:
        return {"code": error.code, "message": error.message, "field": error.field}, 422
    except LoomError as error:
        return {"code": error.code, "message": error.message}, 502

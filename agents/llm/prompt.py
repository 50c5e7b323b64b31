"""Builds the first messages of a job: the system prompt, earlier turns of a conversation, and the task."""

from msgspec.structs import replace

from loom.agents.llm.history import alternating
from loom.agents.values import to_text
from loom.schemas.base import encode
from loom.schemas.decoding.conversation import CONVERSATION, earlier_turns
from loom.schemas.llm import Message
from loom.schemas.run import RunRequest
from loom.schemas.task import Accept


def opening(system_prompt: str, job: RunRequest) -> list[Message]:
    """Return the first messages of the conversation about a job.

    System turns in the job's conversation are appended to the agent's system prompt.
    """
    *earlier, last = [replace(turn, content=to_text(turn.content)) for turn in job.messages]
    system = [system_prompt, *(turn.content for turn in earlier if turn.role == "system")]
    talk = [turn for turn in earlier if turn.role != "system"]
    prompt = "\n\n".join(text for text in system if text)
    first = [Message(role="system", content=prompt)] if prompt else []
    return [*first, *alternating([*talk, replace(last, content=job_message(job))])]


def job_message(job: RunRequest) -> str:
    """Return the text of a job: description, context as JSON, outputs of earlier subtasks, acceptance criteria.

    Turns of a conversation in the context are left out, because they are separate messages.
    """
    context = job.context
    if earlier_turns(context):
        context = {name: value for name, value in context.items() if name != CONVERSATION}
    parts = [job.description]
    if context:
        parts.append(f"Context, as JSON:\n{encode(context).decode()}")
    if job.inputs:
        parts.append("Results of the subtasks this one builds on:")
        parts.extend(f"[{name}]\n{output}" for name, output in job.inputs.items())
    if job.accept is not None and (criteria := acceptance(job.accept)):
        parts.append(criteria)
    return to_text("\n\n".join(parts))


def acceptance(accept: Accept) -> str:
    """Return the acceptance criteria of an answer as text, one sentence per line; empty if there are none."""
    sentences = []
    if accept.json_schema is not None:
        schema = encode(accept.json_schema).decode()
        sentences.append(
            f"The answer must be JSON alone, without a fence or other words, that fits the schema {schema}."
        )
    if accept.contains:
        sentences.append(f"The answer must contain, letter for letter: {encode(accept.contains).decode()[1:-1]}.")
    if accept.pattern is not None:
        sentences.append(f"The answer must contain a match of the regular expression {accept.pattern}")
    if accept.rubric is not None:
        sentences.append(f"The answer is judged by this rubric: {accept.rubric}")
    return "\n".join(sentences)

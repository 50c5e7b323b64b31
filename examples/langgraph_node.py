"""A langgraph graph as a node: it streams, reports its tokens, can be cancelled, and delegates to the cluster.

    pip install loom-nats langgraph langchain-openai
    loom node langgraph_node.py        with OPENAI_API_KEY, or OPENAI_BASE_URL for another server

`GraphAgent` works with each graph whose state has the key `messages`. The graph below lets other nodes collect facts
and writes a text of them.
"""

import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph

from loom import delegate
from loom.schemas.errors import AgentFailed
from loom.schemas.run import RunRequest
from loom.types import AgentEvent, AgentNode, CapabilityProfile, Done, TextDelta, TokenUsage


class GraphAgent:
    """An agent that runs a graph; the last message of the graph is its answer.

    Args:
        graph: A compiled graph; its state has `messages`.
        answering: Names of the graph's nodes whose text is streamed; empty: all.
        steps: Most steps of the graph for one job.
    """

    def __init__(self, graph: CompiledStateGraph, *, answering: Sequence[str] = (), steps: int = 25) -> None:
        self._graph = graph
        self._answering = frozenset(answering)
        self._steps = steps

    async def stream(self, job: RunRequest) -> AsyncIterator[AgentEvent]:
        """Run the graph and yield the text of its models as it comes; last, the answer and the tokens.

        Raises:
            AgentFailed: The graph did not end within its steps; `spent` holds the tokens.
        """
        begun, seen = time.monotonic(), []
        config = {"configurable": {"thread_id": job.key}, "recursion_limit": self._steps}
        events = self._graph.astream({"messages": list(turns(job))}, config, stream_mode=["messages", "updates"])
        try:
            async with aclosing(events):  # a cancelled job ends the graph, and its request to the model
                async for kind, event in events:
                    if kind == "messages":
                        message, origin = event
                        if self._streams(message, origin["langgraph_node"]):
                            yield TextDelta(text=str(message.text))
                    else:
                        seen.extend(new_messages(event))
        except GraphRecursionError as error:
            raise AgentFailed(f"the graph took more than {self._steps} steps", spent=done(seen, begun)) from error
        yield done(seen, begun)

    def _streams(self, message: BaseMessage, node: str) -> bool:
        chosen = not self._answering or node in self._answering
        return chosen and isinstance(message, AIMessage) and bool(message.text)


def turns(job: RunRequest) -> Iterator[tuple[str, str]]:
    """Yield a job's conversation, and the results of the subtasks it builds on."""
    for message in job.messages:
        yield message.role, message.content
    for name, output in job.inputs.items():
        yield "user", f"Result of {name}:\n{output}"


def new_messages(update: dict[str, Any]) -> Iterator[BaseMessage]:
    """Yield the messages that nodes of the graph have added."""
    for change in update.values():
        added = (change or {}).get("messages", ())
        yield from added if isinstance(added, list | tuple) else [added]


def done(messages: Sequence[BaseMessage], begun: float) -> Done:
    """Return the end of a run: the text of its last message, and the tokens of all."""
    used = [message.usage_metadata for message in messages if isinstance(message, AIMessage) and message.usage_metadata]
    asked, written = sum(each["input_tokens"] for each in used), sum(each["output_tokens"] for each in used)
    return Done(
        content=str(messages[-1].text) if messages else "",
        steps=len(messages),
        duration_ms=(time.monotonic() - begun) * 1000,
        tokens_used=asked + written,
        usage=TokenUsage(prompt_tokens=asked, completion_tokens=written, total_tokens=asked + written),
    )


async def research(state: MessagesState) -> MessagesState:
    """Let the best node of the cluster collect facts."""
    facts = await delegate(f"Collect facts: {state['messages'][-1].text}", domain="facts")
    return {"messages": [SystemMessage(f"Facts:\n{facts}")]}


async def write(state: MessagesState) -> MessagesState:
    """Write the text."""
    return {"messages": [await model.ainvoke(state["messages"])]}


model = ChatOpenAI(model=os.environ.get("LOOM_MODEL") or "gpt-4o-mini", stream_usage=True)
builder = StateGraph(MessagesState)
builder.add_node("research", research)
builder.add_node("write", write)
builder.add_edge(START, "research")
builder.add_edge("research", "write")
builder.add_edge("write", END)

nodes = [
    AgentNode(
        id="writer",
        capabilities=CapabilityProfile(scores={"writing": 0.9}),
        agent=GraphAgent(builder.compile(), answering=["write"]),
    )
]

"""Runs a langgraph graph as a node that streams, reports tokens, can be cancelled, and delegates to the cluster.

    pip install loom-nats langgraph langchain-openai
    loom host run langgraph_node.py        with OPENAI_API_KEY, or OPENAI_BASE_URL for another server

`graph_agent` works with every graph whose state has the key `messages`. The graph below delegates the collection of
facts to other nodes, and writes a text from them.
"""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from langchain_core.messages import AIMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph

from loom import Job, delegate
from loom.schemas.errors import AgentFailed
from loom.types import AgentNode, CapabilityProfile

Graph = CompiledStateGraph[Any, Any, Any, Any]


def graph_agent(graph: Graph, *, answering: str, steps: int = 25) -> Callable[[Job], AsyncIterator[str]]:
    """Return an agent that runs a graph.

    Args:
        graph: A compiled graph.
        answering: The name of the graph's node whose text is the answer.
        steps: Maximum number of steps of the graph for one job.
    """

    async def run(job: Job) -> AsyncIterator[str]:
        config: RunnableConfig = {"configurable": {"thread_id": job.key}, "recursion_limit": steps}
        events: Any = graph.astream({"messages": list(turns(job))}, config, stream_mode=["messages", "updates"])
        try:
            async with aclosing(events):  # a cancelled job ends the request to the model
                async for kind, event in events:
                    if kind == "updates":
                        report(job, event)
                    elif event[1]["langgraph_node"] == answering and isinstance(event[0], AIMessage):
                        yield str(event[0].text)
        except GraphRecursionError as error:
            raise AgentFailed(f"the graph took more than {steps} steps") from error

    return run


def turns(job: Job) -> Iterator[tuple[str, str]]:
    """Yield the conversation of a job, and the results of the subtasks that it depends on."""
    for message in job.messages:
        yield message.role, message.content
    for name, output in job.inputs.items():
        yield "user", f"Result of {name}:\n{output}"


def report(job: Job, update: dict[str, Any]) -> None:
    """Report the tokens of the messages added by the graph; raises BudgetExceeded when the budget is spent."""
    for change in update.values():
        for message in (change or {}).get("messages", ()):
            used = message.usage_metadata if isinstance(message, AIMessage) else None
            if used:
                job.report(prompt_tokens=used["input_tokens"], completion_tokens=used["output_tokens"])


async def research(state: MessagesState) -> MessagesState:
    """Delegate the collection of facts to the cluster."""
    facts = await delegate(f"Collect facts: {state['messages'][-1].text}", domain="facts")
    return {"messages": [SystemMessage(f"Facts:\n{facts}")]}


async def write(state: MessagesState) -> MessagesState:
    """Write the text from the facts."""
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
        agent=graph_agent(builder.compile(), answering="write"),
    )
]

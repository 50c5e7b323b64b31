"""Holds an auction among the nodes of one process, with the imports and calls of loom-agent 0.6.

The program needs neither a server nor a model:

    python examples/old_library/cluster_manager.py
"""

from loom import ClusterConfig, ClusterManager, LifecycleManager
from loom.types import AgentNode, Bid, CapabilityProfile, TaskAd

config = ClusterConfig(min_nodes=1, max_nodes=4, max_depth=3, mitosis_threshold=0.6, idle_timeout=120)
cluster = ClusterManager(config)
lifecycle = LifecycleManager(cluster.config)
for name, scores, tools in (
    ("coder", {"code": 0.9, "math": 0.6}, ["python"]),
    ("analyst", {"data": 0.85, "code": 0.4}, ["sql", "python"]),
    ("writer", {"writing": 0.8}, []),
):
    cluster.add_node(AgentNode(id=name, capabilities=CapabilityProfile(scores=scores, tools=tools)))
print("nodes:", ", ".join(node.id for node in cluster.nodes))

task = TaskAd(domain="code", description="Sort a table", estimated_complexity=0.8, required_tools=["python"])
for bid in cluster.collect_bids(task):
    parts = ", ".join(f"{part} {value:.2f}" for part, value in bid.breakdown.items())
    print(f"{bid.agent_id} bids {bid.score:.3f}: {parts}")
winner = cluster.select_winner(task)
assert winner is not None
print("winner:", winner.id, "- split:", lifecycle.should_split(task, winner))
assert cluster.compute_bid(winner, task).score > Bid().score

cluster.update_load("coder", 1.0)
cluster.update_load("gone", 0.5)  # an unknown node: without effect
busy = cluster.select_winner(task)
assert busy is not None
print("winner while the coder is busy:", busy.id)

child = lifecycle.mitosis(winner, cluster)
print(f"mitosis: depth {child.depth}, parent {child.parent_id}, {len(cluster.nodes)} nodes")
cluster.add_node(AgentNode(id="writer", capabilities=CapabilityProfile(scores={"writing": 0.95})))
writer = cluster.get_node("writer")
assert writer is not None
print("writer now claims", writer.capabilities.scores["writing"])
heir = lifecycle.apoptosis(writer, cluster)
print("apoptosis: writer leaves its scores to", heir.id if heir else None)
print("idle:", cluster.find_idle() is not None, "- left:", len(cluster.nodes))
cluster.remove_node(child.id)
for report in map(lifecycle.check_health, cluster.nodes):
    print(f"{report.node_id}: {report.status}, {report.recommendation}")

"""Updates a node with the rewards of its tasks, with the imports and calls of loom-agent 0.6.

The program needs neither a server nor a model:

    python examples/old_library/reward_bus.py
"""

from loom.cluster.reward import RewardBus
from loom.types import AgentNode, CapabilityProfile, RewardRecord, TaskAd

bus = RewardBus(alpha=0.3)
node = AgentNode(id="coder", capabilities=CapabilityProfile(scores={"code": 0.5}))
task = TaskAd(domain="code", description="Sort a table", token_budget=1000)

signal = bus.compute_signal(task, True, 200, 0)
print(f"quality {signal.quality:.2f}, efficiency {signal.efficiency:.2f}, reliability {signal.reliability:.2f}")
print(f"reward {bus.compute_reward(signal):.2f}")
failure = bus.compute_signal(task, success=False, token_cost=10, error_count=1)
print(f"a failure earns {bus.compute_reward(failure):.2f}, however few tokens it took")

for success, cost, errors in ((True, 200, 0), (True, 400, 1), (False, 900, 2), (True, 100, 0)):
    reward = bus.evaluate(node, task, success, cost, errors)
    known = node.capabilities
    print(f"{reward:.2f} -> code {known.scores['code']:.3f}, success rate {known.success_rate:.3f}")
print(f"{node.capabilities.total_tasks} tasks, {node.consecutive_losses} losses in a row")

newest = node.reward_history[-1]
print(f"{len(node.reward_history)} records, the newest {newest.reward:.2f} in {newest.domain}")
assert RewardRecord().reward == 0
before = node.capabilities.scores["code"]
bus.decay(node)
assert abs(node.capabilities.scores["code"] - before) < 1e-6
try:
    RewardBus(alpha=0.3, decay_rate=0.01)  # type: ignore[arg-type]
except TypeError as error:
    print(f"TypeError: {str(error).partition(':')[0]}")

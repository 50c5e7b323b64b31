"""The worlds that the benchmark measures: hosts, nodes, failures, replicas and namespaces."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """One world, and the number of tasks that measure it."""

    name: str
    title: str
    hosts: int = 2
    nodes_each: int = 1
    host_processes: int = 2
    """Processes that the hosts are spread over; each host has a connection of its own."""
    fail_every: int = 0
    """Every so many runs of a host process one fails; 0: none."""
    replicas: int = 1
    """Processes with all six phases."""
    phase_processes: bool = False
    """Whether each phase has a process of its own."""
    namespaces: int = 1
    """Namespaces on one server, each with phases, hosts and a submitter of its own."""
    tasks: int = 2000
    single: int = 200
    """Tasks with one in flight."""
    in_flight: int = 256
    round_s: int = 40
    """Seconds that a round of all systems takes on a machine with two cores."""


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("two-nodes", "2 hosts x 1 node"),
        Scenario("32-nodes", "2 hosts x 16 nodes", nodes_each=16),
        Scenario("200-nodes", "2 hosts x 100 nodes", nodes_each=100),
        Scenario("50-hosts", "50 hosts x 1 node", hosts=50, tasks=1000, single=100),
        Scenario("failures", "5 % failed attempts, 2 hosts x 2 nodes", nodes_each=2, fail_every=20),
        Scenario(
            "1000-hosts",
            "1,000 hosts x 1 node, 16 in flight",
            hosts=1000,
            host_processes=4,
            tasks=100,
            single=10,
            in_flight=16,
            round_s=120,
        ),
        Scenario("six-processes", "a process for each phase", phase_processes=True),
        Scenario("replicas", "4 replicas of each phase", replicas=4),
        Scenario("namespaces", "2 namespaces on one server", namespaces=2),
    )
}

"""What an award takes as hosts and nodes become more: MATCH's own auction over a bus, nothing else going on."""

import sys
from pathlib import Path

from support.evidence import store_profile
from support.wait import until

from bench.bench_cluster import BenchCluster, ad, bench_cluster
from bench.measure import closed_loop, quantile, verdict
from loom.bus import topology
from loom.bus.bus import Bus
from loom.phases.match import Match
from loom.phases.match.ranked_bids import Awarded
from loom.schemas.auction import ANNOUNCED_NODES
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope, Spec
from loom.schemas.learning.profile import DomainEvidence, NodeProfile

HOSTS_FILE = Path(__file__).with_name("hosts.py")
PROCESSES = 4
HOSTS = (2, 10, 50, 200)
NODES = (10, 100, 1000)
ON = 2
"""Hosts the nodes are on."""
EVIDENCE = 20
"""Rewards each node is known by."""
WITHIN_S = 60
MOST_TIMES_DEARER, MOST_P50_MS = 3.0, 25.0


async def auction(hosts: int, nodes_each: int, auctions: int) -> tuple[float, float]:
    """Return p50 and p99 of awarding one task after another, in ms."""
    async with bench_cluster() as running:
        bus = await running.connection(role="match")
        await topology.apply(bus, ClusterConfig())
        names = await _start_hosts(running, hosts, nodes_each)
        await _make_known(bus, names)
        match = Match(bus, ClusterConfig())
        await match.start()
        try:
            directory = match._directory
            announced = hosts * -(-nodes_each // ANNOUNCED_NODES)
            await until(
                lambda: len(directory.awaited_hosts()) == announced, within_s=WITHIN_S, what="all hosts are known"
            )
            await until(lambda: len(directory.profiles) == len(names), within_s=WITHIN_S, what="all profiles are read")

            async def once() -> None:
                spec = Spec(complexity=0.3, domains=("code",), method="given")
                verdict = await match._auctioneer.hold_auction(
                    Envelope(ad=ad(), spec=spec, deadline=bus.clock.now() + WITHIN_S), spec
                )
                assert isinstance(verdict, Awarded), verdict

            await closed_loop(once, 20, 1)
            times = await closed_loop(once, auctions, 1)
        finally:
            await match.drain(0)
    return 1e3 * quantile(times, 0.5), 1e3 * quantile(times, 0.99)


async def _start_hosts(running: BenchCluster, hosts: int, nodes_each: int) -> list[str]:
    """Start hosts spread over a few processes, and return the names of their nodes."""
    names = []
    processes = min(PROCESSES, hosts)
    for number in range(processes):
        here = hosts // processes + (number < hosts % processes)
        words = (sys.executable, str(HOSTS_FILE), str(here), str(nodes_each), f"p{number}")
        await running.start(f"hosts {number}", *words, output="here")
        names += [f"p{number}-{host}-{node}" for host in range(here) for node in range(nodes_each)]
    return names


async def _make_known(bus: Bus, names: list[str]) -> None:
    """Write a profile of every node, as a cluster that has worked for a while has."""
    for name in names:
        evidence = DomainEvidence(count=EVIDENCE, mean=0.5)
        profile = NodeProfile(node_id=name, last_seq=1, domains={"code": evidence})
        await store_profile(bus, profile)


async def many_hosts(*, quick: bool) -> None:
    """Auctions with 2 to 200 hosts of one node each."""
    for hosts in HOSTS:
        p50, p99 = await auction(hosts, 1, 100 if quick else 500)
        promised = f"  ({verdict(p50 < MOST_P50_MS)}: p50 < {MOST_P50_MS:.0f} ms)" if hosts == HOSTS[-1] else ""
        print(f"{hosts:5} hosts, a node each: p50 {p50:7.2f} ms, p99 {p99:7.2f} ms{promised}", flush=True)


async def many_nodes(*, quick: bool) -> None:
    """Auctions with 10 to 1,000 nodes on two hosts."""
    first = 0.0
    for nodes in NODES:
        p50, p99 = await auction(ON, nodes // ON, 100 if quick else 500)
        first = first or p50
        kept = verdict(p50 / first <= MOST_TIMES_DEARER)
        promised = f", {p50 / first:.1f} times {NODES[0]}" if nodes != NODES[0] else ""
        promised += f"  ({kept}: ≤ {MOST_TIMES_DEARER:.0f} times)" if nodes == NODES[-1] else ""
        print(f"{nodes:5} nodes on {ON} hosts: p50 {p50:7.2f} ms, p99 {p99:7.2f} ms{promised}", flush=True)

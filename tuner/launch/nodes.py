"""What the launchers of several nodes tell each other: who came, where the ranks meet, who failed, when all ended."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from tuner.errors import UserError
from tuner.failures import EXIT_UNEXPECTED, Failure, read_failure
from tuner.launch.options import Node

ANSWER_SECONDS = 30.0  # for the first node to answer a question, once the nodes have met
LEAVE_SECONDS = 60.0  # for the slowest node to end its ranks
CONNECT_SECONDS = 5.0
SAY_SECONDS = 30.0  # between two lines about who is missing
LOST = (dist.DistNetworkError, dist.DistStoreError)


class Place(NamedTuple):
    """Where the ranks of this node are among all, and where they meet."""

    first_rank: int
    num_ranks: int
    host: str
    port: int


class Nodes:
    """The nodes of a run, seen from one of them; a run on one node has no store and nobody to talk to."""

    def __init__(self, node: Node, store: dist.Store | None, counts: list[int]) -> None:
        """With the number of processes on each node; `meet` makes one."""
        self.node, self.counts = node, counts
        self._store = store
        self._ranks_store: dist.Store | None = None  # of the attempt under way, kept open on the first node

    def place(self, attempt: int) -> Place:
        """Open, or find, the store where the ranks of this attempt meet.

        Raises:
            UserError: the port cannot be opened.
        """
        node, key = self.node, f"{attempt}/port"
        if node.is_first:
            port = node.port if self._store is None else 0  # the nodes have the port that was asked for
            self._ranks_store = open_store(node.host, port)
            port = self._ranks_store.port
            if self._store is not None:
                self._store.set(key, str(port))
        else:
            port = int(self._ask(lambda store: store.get(key)))
        return Place(sum(self.counts[: node.rank]), sum(self.counts), node.host, port)

    def failure(self, attempt: int) -> Failure | None:
        """What stopped a rank of another node in this attempt, as far as that is told."""
        if self._store is None:
            return None
        try:
            key = f"{attempt}/failure"
            return read_failure(self._store.get(key).decode()) if self._store.check([key]) else None
        except LOST:
            return self._lost()

    def report(self, attempt: int, failure: Failure) -> Failure:
        """Tell all nodes what stopped a rank of this one; returns what counts, which is what was told first."""
        if self._store is None:
            return failure
        text = json.dumps(failure._asdict())
        try:
            return read_failure(self._store.compare_set(f"{attempt}/failure", "", text).decode())
        except LOST:
            return failure

    def all_ended(self, attempt: int) -> bool:
        """Tell the others that this node's ranks have ended and wait for theirs; False if some do not answer."""
        if self._store is None:
            return True
        node, informed = self.node, f"{attempt}/num_informed"
        try:
            is_end = self._is_reached(f"{attempt}/num_ended", node.num_nodes, own=1)
            if node.is_first:  # it has the store, so it stays until all others know
                return is_end and self._is_reached(informed, node.num_nodes - 1, own=0)
            self._store.add(informed, 1)
            return is_end
        except LOST:
            return False

    def _is_reached(self, key: str, number: int, *, own: int) -> bool:
        """Add to a count, and wait until all have."""
        assert self._store is not None
        deadline = time.monotonic() + LEAVE_SECONDS
        count = self._store.add(key, own)
        while count < number and time.monotonic() < deadline:
            time.sleep(0.1)
            count = self._store.add(key, 0)
        return count >= number

    def _ask(self, question: Callable[[dist.Store], Any]) -> Any:
        assert self._store is not None
        try:
            return question(self._store)
        except LOST as error:
            raise UserError(self._lost().message) from error

    def _lost(self) -> Failure:
        node = self.node
        text = f"the first node, {node.host}:{node.port}, does not answer any more; its own output says why."
        return Failure(0, node.host, time.time(), EXIT_UNEXPECTED, text)


def open_store(host: str, port: int) -> dist.TCPStore:
    """A store that this process serves; port 0 takes one that is free.

    Raises:
        UserError: the port cannot be opened.
    """
    try:
        return dist.TCPStore(host, port, None, True, timedelta(seconds=ANSWER_SECONDS), wait_for_workers=False)
    except LOST as error:
        raise UserError(
            f"Port {port} on {host} cannot be opened: most often another run uses it, or {host} is not this machine. "
            "End that run, or choose another port with --master HOST:PORT; on one node leave --master out for a free "
            "one."
        ) from error


def meet(node: Node, *, timeout: float, say: Callable[[str], None]) -> Nodes:
    """Wait for the launchers of all nodes.

    Raises:
        UserError: not all came within `timeout` seconds, two say that they are the same node, they disagree about
            their number, the first does not answer, or its port cannot be opened.
    """
    if node.num_nodes == 1:
        return Nodes(node, None, [node.num_processes])
    deadline = time.monotonic() + timeout
    store = open_store(node.host, node.port) if node.is_first else find_store(node, timeout, say)
    own = {"host": socket.gethostname(), "processes": node.num_processes, "nodes": node.num_nodes}
    with lost_means(f"Node 0 at {node.host}:{node.port} left before all nodes had come; its own output says why."):
        if store.add(f"claims/{node.rank}", 1) > 1:
            raise UserError(f"Two nodes say --node-rank {node.rank}. Count the nodes from 0 to {node.num_nodes - 1}.")
        store.set(f"nodes/{node.rank}", json.dumps(own))
        wait_for_nodes(store, node, deadline, timeout, say)
        nodes = [json.loads(store.get(f"nodes/{rank}")) for rank in range(node.num_nodes)]
        store.add("num_informed", 1)
        while node.is_first and store.add("num_informed", 0) < node.num_nodes and time.monotonic() < deadline:
            time.sleep(0.05)
    return Nodes(node, store, [other["processes"] for other in nodes])


@contextmanager
def lost_means(message: str) -> Iterator[None]:
    """A connection that ends inside is this mistake of the user's."""
    try:
        yield
    except LOST as error:
        raise UserError(message) from error


def find_store(node: Node, timeout: float, say: Callable[[str], None]) -> dist.TCPStore:
    """The store that the first node serves, which may start later than this one."""
    started = said = time.monotonic()
    # asked for without torch, which would bury our message under a trace of its own C++
    while (refusal := try_connection(node.host, node.port)) is not None:
        waited = time.monotonic() - started
        if waited > timeout:
            raise UserError(
                f"Node {node.rank} of {node.num_nodes} came, but node 0 did not answer at {node.host}:{node.port} "
                f"within {timeout:g} s ({refusal}). Start it there, check that --master names it and that no firewall "
                "closes the port; --node-timeout waits longer."
            )
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            say(f"waiting for node 0 at {node.host}:{node.port}, {waited:.0f} s ({refusal})")
        time.sleep(0.2)
    with lost_means(f"What answers at {node.host}:{node.port} is not node 0 of a run. Choose another port: --master."):
        seconds = timedelta(seconds=ANSWER_SECONDS)
        return dist.TCPStore(node.host, node.port, None, False, seconds, wait_for_workers=False)


def try_connection(host: str, port: int) -> str | None:
    """Why nothing answers there; None where something does."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def wait_for_nodes(store: dist.Store, node: Node, deadline: float, timeout: float, say: Callable[[str], None]) -> None:
    """Return when all nodes have come; see `meet` for the errors."""
    said = time.monotonic()
    while missing := [rank for rank in range(node.num_nodes) if not store.check([f"nodes/{rank}"])]:
        came = [rank for rank in range(node.num_nodes) if rank not in missing]
        others = {rank: json.loads(store.get(f"nodes/{rank}")) for rank in came}
        check_number(node, others)
        count = f"{len(came)} of {node.num_nodes} nodes came"
        if time.monotonic() > deadline:
            names = ", ".join(f"{rank} ({other['host']})" for rank, other in others.items())
            raise UserError(
                f"{count} within {timeout:g} s: {names}. Missing: {', '.join(map(str, missing))}. Start them with the "
                f"same --nnodes and --master {node.host}:{node.port}; --node-timeout waits longer."
            )
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            say(f"{count}; waiting for {', '.join(map(str, missing))}")
        time.sleep(0.1)
    check_number(node, {rank: json.loads(store.get(f"nodes/{rank}")) for rank in range(node.num_nodes)})


def check_number(node: Node, others: dict[int, dict[str, Any]]) -> None:
    """UserError where a node counts other nodes than this one."""
    for rank, other in others.items():
        if other["nodes"] != node.num_nodes:
            raise UserError(
                f"Node {node.rank} was started with --nnodes {node.num_nodes}, node {rank} ({other['host']}) with "
                f"--nnodes {other['nodes']}. Give all nodes the same number."
            )

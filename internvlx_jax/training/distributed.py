"""Start of a run on several hosts: Cloud TPU, SLURM, or explicit flags.

(design: training.md 12, platform.md 6)

jax.distributed ends a process without naming anybody when a peer does not come in time. Therefore
the processes meet here first: process 0 listens on the coordinator's port, waits for the others,
tells all of them the result, and leaves the port to jax. Everybody who came learns who is missing.

jax is imported late, so that a command can list its flags without it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterable
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.ranges import COUNT, NUMBER, Range, whole_number

TIMEOUT = 300  # seconds
HELLO_SECONDS = 5  # a peer that has connected introduces itself within this time
NAMED = 16  # missing processes that a message lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """Describes one process of a job.

    Attributes:
        coordinator: HOST:PORT of process 0.
        processes: How many processes the job has.
        process: Number of this one, from 0.
        devices: Numbers of the local devices that belong to it; None means all of them.
    """

    coordinator: str
    processes: int
    process: int
    devices: list[int] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise ConfigError(
                f"--process_id {self.process} is not in 0 to {self.processes - 1} (--num_processes "
                f"{self.processes})"
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator, for a socket."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a job on several hosts, which `start_from` reads."""
    group = parser.add_argument_group(
        "several hosts",
        "Detected under SLURM and on Cloud TPU. Anywhere else, start the same command on each host "
        "with these flags.",
    )
    add = group.add_argument
    add(
        "--coordinator",
        metavar="HOST:PORT",
        default=None,
        help="address of process 0; `auto` insists on SLURM or Cloud TPU",
    )
    add(
        "--num_processes",
        type=whole_number(COUNT),
        default=None,
        help="processes of the job; 1 ignores SLURM and Cloud TPU",
    )
    add(
        "--process_id",
        type=whole_number(NUMBER),
        default=None,
        help="number of this process, from 0",
    )
    add(
        "--port",
        type=whole_number(Range(0, 65535)),
        default=None,
        help="port of the coordinator, where --coordinator names none",
    )
    add(
        "--timeout",
        type=whole_number(COUNT),
        default=TIMEOUT,
        help="seconds to wait for the other processes (%(default)s)",
    )


def start_from(args: argparse.Namespace) -> int:
    """Joins the job that the flags of `add_flags`, or the cluster, describe.

    Has to be called before jax touches a device. Does nothing for a job of one process.

    Returns:
        Number of this process, 0 when it is alone.

    Raises:
        ConfigError: The flags do not describe a job.
        TimeoutError: Processes are missing; the message names them.
    """
    info = find_process(
        args.coordinator, args.port, args.num_processes, args.process_id, args.timeout
    )
    if info is None or info.processes == 1:
        return 0
    import jax

    wait_for_peers(info, args.timeout)
    jax.distributed.initialize(
        info.coordinator,
        info.processes,
        info.process,
        local_device_ids=info.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=args.timeout,
    )
    return info.process


def find_process(
    coordinator: str | None,
    port: int | None,
    processes: int | None,
    process: int | None,
    timeout: int,
) -> ProcessInfo | None:
    """Reads this process's part in a job from the flags, or else from the cluster.

    Args:
        coordinator: HOST:PORT of process 0, `auto`, or None.
        port: Port of the coordinator, if the address has none.
        processes: How many processes the job has.
        process: Number of this process.
        timeout: Seconds that asking a cluster for its coordinator may take.

    Returns:
        None if the process is alone.

    Raises:
        ConfigError: The flags do not describe a job.
    """
    if coordinator is None or coordinator == "auto":
        if process is not None or (processes or 1) > 1:
            raise ConfigError(
                "--num_processes and --process_id need --coordinator HOST:PORT, the address of "
                "process 0"
            )
        if processes == 1:
            return None
        return _from_cluster(port, timeout, required=coordinator == "auto")
    if processes is None or process is None:
        raise ConfigError("--coordinator needs --num_processes and --process_id too")
    _, colon, stated = coordinator.rpartition(":")
    if colon and stated.isdigit():
        if port not in (None, int(stated)):
            raise ConfigError(
                f"--coordinator {coordinator} and --port {port} name different ports; give one of "
                "them"
            )
    elif port is None:
        raise ConfigError(f"--coordinator {coordinator} has no port; give HOST:PORT, or --port too")
    else:
        coordinator = f"{coordinator}:{port}"
    return ProcessInfo(coordinator=coordinator, processes=processes, process=process)


def _from_cluster(port: int | None, timeout: int, *, required: bool) -> ProcessInfo | None:
    """Reads it from SLURM or Cloud TPU; None outside of them and for a job of one process."""
    # jax knows these clusters, but has no public way to ask them without joining the job at once.
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster, SlurmCluster

    known = (GkeTpuCluster, GceTpuCluster, SlurmCluster)
    cluster = next((each for each in known if each.is_env_present()), None)
    if cluster is None and required:
        raise ConfigError(
            "--coordinator auto: neither SLURM (inside srun) nor Cloud TPU is found; give "
            "--coordinator HOST:PORT --num_processes N --process_id I"
        )
    if cluster is None or cluster.get_process_count() <= 1:
        return None
    local = cluster.get_local_process_id()  # under SLURM each process drives one GPU
    return ProcessInfo(
        coordinator=cluster.get_coordinator_address(timeout, None if port is None else str(port)),
        processes=cluster.get_process_count(),
        process=cluster.get_process_id(),
        devices=None if local is None else [local],
    )


# --- waiting for all processes of a job -----------------------------------------------------------

Problem = tuple[str, str]  # ("wrong" or "late", message)


def wait_for_peers(info: ProcessInfo, timeout: float) -> None:
    """Blocks until every process of the job has connected.

    Args:
        info: This process.
        timeout: Seconds to wait.

    Raises:
        TimeoutError: Processes are missing; raised in all that came, naming the others.
        ConfigError: Two processes claim the same number, or they disagree about how many they are.
    """
    problem = _gather(info, timeout) if info.process == 0 else _report(info, timeout)
    if problem:
        kind, text = problem
        raise (ConfigError if kind == "wrong" else TimeoutError)(text)


def _gather(info: ProcessInfo, timeout: float) -> Problem | None:
    """Waits, as process 0, for all others, and tells them the result."""
    deadline = time.monotonic() + timeout
    problem: Problem | None = None
    with contextlib.ExitStack() as open_sockets:
        server = open_sockets.enter_context(_listen(info.address[1]))
        connected: dict[int, socket.socket] = {}
        answered: list[socket.socket] = []
        while problem is None and (left := deadline - time.monotonic()) > 0:
            if len(connected) == info.processes - 1:
                # A process may have died while it waited; the one that replaces it comes again.
                connected = {number: peer for number, peer in connected.items() if _is_open(peer)}
                if len(connected) == info.processes - 1:
                    break
            server.settimeout(left)
            try:
                peer = open_sockets.enter_context(server.accept()[0])
                process, processes = _receive_hello(peer)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nobody came, or a stranger such as a port scanner did
            problem = _contradiction(info, connected, process, processes)
            connected[process] = peer  # one that comes again has been restarted
            answered.append(peer)
        missing = sorted(set(range(1, info.processes)) - connected.keys())
        if problem is None and missing:
            problem = (
                "late",
                f"{_name(missing)} of {info.processes} did not come to {info.coordinator} within "
                f"{timeout:g} s. Look at their logs; they need the same --coordinator and "
                "--num_processes, and must reach that port. More time: --timeout",
            )
        for peer in answered:
            with contextlib.suppress(OSError):
                _send(peer, problem)
    return problem


def _contradiction(
    info: ProcessInfo, connected: dict[int, socket.socket], process: int, processes: int
) -> Problem | None:
    """Returns what is wrong with a process that introduces itself, if anything is."""
    if processes != info.processes:
        return (
            "wrong",
            f"process {process} was started with {processes} processes, process 0 with "
            f"{info.processes}; give all the same --num_processes",
        )
    if process in connected and _is_open(connected[process]):
        return (
            "wrong",
            f"two processes were started as process {process}; give each its own --process_id",
        )
    return None


def _report(info: ProcessInfo, timeout: float) -> Problem | None:
    """Introduces this process to process 0, and waits for the result."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        with (
            contextlib.suppress(OSError, ValueError),
            socket.create_connection(info.address, timeout=left) as server,
        ):
            _send(server, {"process": info.process, "processes": info.processes})
            server.settimeout(timeout + HELLO_SECONDS)  # process 0 may have begun only just now
            return _receive(server)
        time.sleep(min(0.2, max(left, 0)))
    return (
        "late",
        f"process 0 does not answer at {info.coordinator} within {timeout:g} s (this is process "
        f"{info.process} of {info.processes}). Look at its log, and check that this host reaches "
        "that port. More time: --timeout",
    )


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
            )
        return socket.create_server(("", port), backlog=4096)
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen on port {port} ({os.strerror(error.errno or 0)}); choose "
            "another port of the coordinator, the same for all processes"
        ) from error


def _receive_hello(peer: socket.socket) -> tuple[int, int]:
    """Returns (its number, how many processes it expects)."""
    peer.settimeout(HELLO_SECONDS)
    hello = _receive(peer)
    return int(hello["process"]), int(hello["processes"])


def _send(peer: socket.socket, value: Any) -> None:
    peer.sendall(json.dumps(value).encode() + b"\n")


def _receive(peer: socket.socket) -> Any:
    line = peer.makefile("rb").readline(4096)
    if not line.endswith(b"\n"):
        raise ConnectionError("the connection ended")
    return json.loads(line)


def _is_open(peer: socket.socket) -> bool:
    peer.setblocking(False)
    try:
        return peer.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _name(processes: Iterable[int]) -> str:
    """Returns `process 3`, or `processes 1, 2, ...`."""
    numbers = list(processes)
    listed = ", ".join(map(str, numbers[:NAMED])) + (
        f" and {len(numbers) - NAMED} more" if numbers[NAMED:] else ""
    )
    return f"process{'es' if len(numbers) > 1 else ''} {listed}"

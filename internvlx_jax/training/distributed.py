"""Start of a run on several hosts: Cloud TPU, SLURM, or explicit flags (design: training.md 12, platform.md 6).

jax.distributed ends the process, without naming anybody, when a peer does not come in time. So the processes meet
here first: the first one calls the roll on the coordinator's port, tells all others the result, and leaves the port to
jax. Whoever is missing is named by everybody who is there.
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

import jax

# jax finds the peers on a cluster, but has no public way to ask for them before it waits for them.
from jax._src.clusters import GceTpuCluster, GkeTpuCluster, SlurmCluster

from internvlx_jax.core.errors import ConfigError

TIMEOUT = 300  # seconds
HELLO_SECONDS = 5  # a peer that has connected says who it is within this time
NAMED = 16  # missing processes that a message lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Of a process in a job.

    Attributes:
        coordinator: host:port of process 0.
        processes, process: how many there are, and the number of this one.
        devices: local devices that belong to it; None is all of them.
    """

    coordinator: str
    processes: int
    process: int
    devices: list[int] | None = None

    def __post_init__(self):
        if not 0 <= self.process < self.processes:
            raise ConfigError(
                f"--process_id {self.process} is not in 0 to {self.processes - 1} (--num_processes "
                f"{self.processes})"
            )

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a job on several hosts; `start_from` reads them."""
    group = parser.add_argument_group(
        "several hosts",
        "Found by itself under SLURM and on Cloud TPU; otherwise start the "
        "same command on each host with these.",
    )
    add = group.add_argument
    add(
        "--coordinator",
        metavar="HOST:PORT",
        default=None,
        help="of process 0; `auto` insists on what SLURM or Cloud TPU say",
    )
    add(
        "--num_processes",
        type=int,
        default=None,
        help="processes of the job; 1 ignores SLURM and Cloud TPU",
    )
    add("--process_id", type=int, default=None, help="number of this process, from 0")
    add(
        "--port",
        type=int,
        default=None,
        help="port of the coordinator, where it is not in --coordinator",
    )
    add(
        "--timeout",
        type=int,
        default=TIMEOUT,
        help="seconds to wait for the other processes (%(default)s)",
    )


def start_from(args: argparse.Namespace) -> None:
    """Join the job that the flags of `add_flags`, or the cluster, describe; does nothing for a job of one process.

    To be called before jax touches a device. Raises ConfigError for flags that do not make a job, and TimeoutError naming
    the processes that have not come.
    """
    place = find_place(
        args.coordinator, args.port, args.num_processes, args.process_id, args.timeout
    )
    if place is None or place.processes == 1:
        return
    wait_for_peers(place, args.timeout)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=args.timeout,
    )


def find_place(
    coordinator: str | None,
    port: int | None,
    processes: int | None,
    process: int | None,
    timeout: int,
) -> Place | None:
    """From flags, else from the cluster; None when this process is alone."""
    if coordinator in (None, "auto"):
        if process is not None or (processes or 1) > 1:
            raise ConfigError(
                "--num_processes and --process_id need --coordinator HOST:PORT, the address of process 0"
            )
        if processes == 1:
            return None
        cluster = next(
            (
                each
                for each in (GkeTpuCluster, GceTpuCluster, SlurmCluster)
                if each.is_env_present()
            ),
            None,
        )
        if cluster is not None and cluster.get_process_count() > 1:
            local = cluster.get_local_process_id()  # SLURM: one process a GPU
            return Place(
                coordinator=cluster.get_coordinator_address(timeout, port and str(port)),
                processes=cluster.get_process_count(),
                process=cluster.get_process_id(),
                devices=None if local is None else [local],
            )
        if coordinator == "auto" and cluster is None:
            raise ConfigError(
                "--coordinator auto: neither SLURM (inside srun) nor Cloud TPU is found; give "
                "--coordinator HOST:PORT --num_processes N --process_id I"
            )
        return None
    if processes is None or process is None:
        raise ConfigError("--coordinator needs --num_processes and --process_id too")
    host, colon, stated = coordinator.rpartition(":")
    if colon and stated.isdigit():
        if port not in (None, int(stated)):
            raise ConfigError(
                f"--coordinator {coordinator} and --port {port} name different ports; give one of them"
            )
    elif port is None:
        raise ConfigError(f"--coordinator {coordinator} has no port; give HOST:PORT, or --port too")
    else:
        coordinator = f"{coordinator}:{port}"
    return Place(coordinator=coordinator, processes=processes, process=process)


# --- roll call ----------------------------------------------------------------------------------------------------


def wait_for_peers(place: Place, timeout: float) -> None:
    """Returns in all processes when all are there. Raises TimeoutError, in all that are there, naming the others, and
    ConfigError when two claim the same number or they disagree about how many they are."""
    problem = _ask_all(place, timeout) if place.process == 0 else _report(place, timeout)
    if problem:
        kind, text = problem
        raise (ConfigError if kind == "wrong" else TimeoutError)(text)


Problem = tuple[str, str] | None


def _ask_all(place: Place, timeout: float) -> Problem:
    deadline = time.monotonic() + timeout
    problem: Problem = None
    with contextlib.ExitStack() as open_sockets:
        server = open_sockets.enter_context(_listen(place.address[1]))
        here: dict[int, socket.socket] = {}
        answered: list[socket.socket] = []
        while problem is None and (left := deadline - time.monotonic()) > 0:
            if len(here) == place.processes - 1:
                here = {
                    process: peer for process, peer in here.items() if _is_open(peer)
                }  # others have died waiting
                if len(here) == place.processes - 1:
                    break
            server.settimeout(left)
            try:
                peer = open_sockets.enter_context(server.accept()[0])
                peer.settimeout(HELLO_SECONDS)
                hello = _receive(peer)
                process, processes = int(hello["process"]), int(hello["processes"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # nobody came; or something else, such as a port scanner, that is no process of a job
            if processes != place.processes:
                problem = (
                    "wrong",
                    (
                        f"process {process} was started with {processes} processes, process 0 with "
                        f"{place.processes}; give all the same --num_processes"
                    ),
                )
            elif process in here and _is_open(here[process]):
                problem = (
                    "wrong",
                    f"two processes were started as process {process}; give each its own --process_id",
                )
            here[process] = peer  # one that comes again has been restarted
            answered.append(peer)
        missing = sorted(set(range(1, place.processes)) - here.keys())
        if problem is None and missing:
            problem = (
                "late",
                (
                    f"{_name(missing)} of {place.processes} did not come to {place.coordinator} within "
                    f"{timeout:g} s. Look at their logs; they need the same --coordinator and "
                    "--num_processes, and must reach that port. More time: --timeout"
                ),
            )
        for peer in answered:
            with contextlib.suppress(OSError):
                _send(peer, problem)
    return problem


def _report(place: Place, timeout: float) -> Problem:
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        with (
            contextlib.suppress(OSError, ValueError),
            socket.create_connection(place.address, timeout=left) as server,
        ):
            _send(server, {"process": place.process, "processes": place.processes})
            server.settimeout(timeout + HELLO_SECONDS)  # process 0 may have begun to wait just now
            return _receive(server)
        time.sleep(min(0.2, max(left, 0)))
    return "late", (
        f"process 0 does not answer at {place.coordinator} within {timeout:g} s (this is process "
        f"{place.process} of {place.processes}). Look at its log, and see that this host reaches that port. "
        "More time: --timeout"
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
            f"process 0 cannot listen on port {port} ({os.strerror(error.errno)}); choose another port of the "
            "coordinator, the same for all processes"
        ) from error


def _send(peer: socket.socket, value: object) -> None:
    peer.sendall(json.dumps(value).encode() + b"\n")


def _receive(peer: socket.socket) -> object:
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
    """`process 3`, or `processes 1, 2, ...`."""
    numbers = list(processes)
    listed = ", ".join(map(str, numbers[:NAMED])) + (
        f" and {len(numbers) - NAMED} more" if numbers[NAMED:] else ""
    )
    return f"process{'es' if len(numbers) > 1 else ''} {listed}"

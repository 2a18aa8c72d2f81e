"""A root with the connections of thousands of nodes: python -m tests.train.comm.root_of_thousands NODES SECONDS

Each node's first rank is one connection of another process, over loopback, which sends what a rank sends as often as
a rank does. Prints the CPU time of the root's watchdog as JSON, then one connection breaks, and the root ends the job.
"""

import json
import os
import socket
import sys
import threading
from pathlib import Path
from subprocess import PIPE, Popen
from time import clock_gettime, monotonic, pthread_getcpuclockid, sleep

from hpc_train.core.world import World
from hpc_train.train.comm import connections, watchdog
from hpc_train.train.comm.connections import Link, RankListener, call
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.watchdog import Watchdog

TOKEN = bytes(range(16))
STACK = "\n".join(f"  /home/user/hpc-train/hpc_train/train/loop.py:{line} train" for line in range(15))
DIES = 7


def send_heartbeats(port: int, num_nodes: int) -> None:
    """Connects as ranks 1 to num_nodes, and sends their heartbeats evenly over time. At a line of input one dies."""
    connections._allow_open_files(num_nodes + 512)
    links = {rank: call(("127.0.0.1", port), TOKEN, rank) for rank in range(1, num_nodes + 1)}
    assert all(links.values())
    print("connected", flush=True)
    threading.Thread(target=follow, args=(links[DIES],), daemon=True).start()
    step, next_s = 0, monotonic()
    while True:
        for rank, link in links.items():
            beat = {"rank": rank, "step": step, "waits": True, "stack": STACK, "ago_s": 0.1, "lowest": step}
            watchdog._send(link, beat)
            next_s += watchdog._MAX_BEAT_S / num_nodes
            sleep(max(0, next_s - monotonic()))
        step += 1


def follow(link: socket.socket) -> None:
    """Breaks the connection at a line of input, and ends this process when the root's has ended."""
    if sys.stdin.readline():
        link.shutdown(socket.SHUT_RDWR)
    sys.stdin.read()
    os._exit(0)


def lead(num_nodes: int, seconds: float) -> None:
    """The root: a real watchdog, which a real MPI_Abort ends."""
    from mpi4py import MPI

    server = connections._listen(["127.0.0.1"], num_nodes + 1)
    assert server is not None
    listener = RankListener(server, TOKEN, num_nodes + 1)
    words = [sys.executable, "-m", __spec__.name, "send", str(listener.address[1]), str(num_nodes)]
    with Popen(words, stdin=PIPE, stdout=PIPE, text=True) as nodes:
        try:
            nodes.stdout.readline()
            links = {rank: Link(link, f"node-{rank}") for rank, link in listener.close().items()}
            assert len(links) == num_nodes
            with Watchdog(Context(World(0, num_nodes + 1), MPI.COMM_WORLD), 600.0, links) as watching:
                watching.step = 0
                clock = pthread_getcpuclockid(watching._thread.ident)
                before_s = clock_gettime(clock)
                sleep(seconds)
                cpu_s = clock_gettime(clock) - before_s
                rss = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
                print(json.dumps({"nodes": num_nodes, "share_of_a_core": cpu_s / seconds, "peak": rss.split()[1:]}))
                sys.stdout.flush()
                nodes.stdin.write("now\n")
                nodes.stdin.flush()
                sleep(60)  # until the watchdog ends this process
        finally:
            nodes.kill()


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send_heartbeats(int(sys.argv[2]), int(sys.argv[3]))
    else:
        lead(int(sys.argv[1]), float(sys.argv[2]))

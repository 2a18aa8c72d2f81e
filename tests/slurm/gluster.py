"""A GlusterFS volume on the test cluster: three nodes hold a full replica each, and every node mounts it."""

import shutil
from pathlib import Path

from tests.slurm.slurm import NODES, Cluster, until

SERVERS = NODES[:3]
MOUNTED = Path("/run/gv")  # on every node; /run is each node's own
STATE = ("/var/lib/glusterd", "/var/log/glusterfs")
PING_S = 3  # after which a server that is silent is gone; 42 otherwise


def why_not() -> str | None:
    missing = {"glusterd": "glusterfs-server", "glusterfs": "glusterfs-client"}
    lacking = [package for command, package in missing.items() if not shutil.which(command)]
    return f"not installed: {', '.join(lacking)} (the names are Debian's)" if lacking else None


class Volume:
    """It is up once constructed, and ends with the cluster's nodes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        for server in SERVERS:
            self.start(server)
        for server in SERVERS[1:]:
            self._gluster("peer", "probe", server)
        until(lambda: self._gluster("peer", "status").count("(Connected)") == 2, "servers know each other", 20)
        bricks = [f"{server}:/run/brick/gv" for server in SERVERS]
        self._gluster("volume", "create", "gv", "replica", 3, *bricks, "force")
        self._gluster("volume", "set", "gv", "network.ping-timeout", PING_S)
        self._gluster("volume", "start", "gv")
        for node in NODES:
            self.mount(node)

    def start(self, server: str) -> None:
        """Starts the node's daemon, with its own state because all hosts share /var."""
        fresh = [f"mount -t tmpfs tmpfs {folder}" for folder in STATE]
        daemon = "setsid glusterd --no-daemon >/run/glusterd.out 2>&1 </dev/null &"
        self._cluster.on(server, "sh", "-ec", "\n".join(["mkdir -p /run/brick /run/gluster", *fresh, daemon]))
        until(lambda: "localhost" in self._gluster("pool", "list", on=server, check=False), f"glusterd on {server}", 20)

    def mount(self, node: str) -> None:
        client = "glusterfs --volfile-server=n1 --volfile-id=gv --log-file=/run/gv.log /run/gv"
        words = f"mkdir -p /run/gv /run/gluster; {client} </dev/null >/dev/null 2>&1; grep -q ' /run/gv ' /proc/mounts"
        self._cluster.on(node, "sh", "-ec", words)

    def _gluster(self, *words: object, on: str = "n1", check: bool = True) -> str:
        return self._cluster.on(on, "gluster", "--mode=script", *words, timeout_s=60, check=check)

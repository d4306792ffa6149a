"""Nodes in network namespaces on this machine, joined by a bridge."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack


class Network:
    """A bridge with the address SUBNET.1, and the nodes that join it. `stack` removes all of them.

    Args:
        subnet: first three numbers of the addresses, such as 10.213.77.

    Raises:
        ValueError: this user or this machine may not create it.
    """

    def __init__(self, stack: ExitStack, subnet: str):
        self.subnet, self._stack, self._bridge = subnet, stack, f"drnet{os.getpid()}"[:15]
        sh(f"ip link add {self._bridge} type bridge")
        stack.callback(sh, f"ip link del {self._bridge}")
        sh(f"ip addr add {subnet}.1/24 dev {self._bridge}", f"ip link set {self._bridge} up")

    def join(self, number: int) -> str:
        """Add a namespace whose eth0 has the address SUBNET.number, and return its name."""
        space, link = f"{self._bridge}-{number}", f"dv{os.getpid()}-{number}"[:15]
        sh(f"ip netns add {space}")
        self._stack.callback(sh, f"ip netns del {space}")
        sh(
            f"ip link add {link} type veth peer name eth0 netns {space}",
            f"ip link set {link} master {self._bridge} up",
            f"ip -n {space} addr add {self.subnet}.{number}/24 dev eth0",
            f"ip -n {space} link set eth0 up",
            f"ip -n {space} link set lo up",
        )
        return space


def limit(space: str, bits_per_second: float) -> None:
    """Limit the rate at which a namespace sends."""
    rate = f"rate {max(1, round(bits_per_second / 1000))}kbit burst 128kb latency 200ms"
    sh(f"tc -n {space} qdisc replace dev eth0 root tbf {rate}")


def sh(*commands: str) -> None:
    """Run commands. Raise ValueError if one is missing or fails."""
    for command in commands:
        try:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            problem = done.stderr.strip() if done.returncode else None
        except FileNotFoundError as error:
            problem = str(error)
        if problem is not None:
            raise ValueError(
                f"`{command}` failed: {problem}. Network namespaces need root (CAP_NET_ADMIN and CAP_SYS_ADMIN) and "
                "Debian's package iproute2, on a kernel with bridge, veth and tbf. Run this where they are allowed."
            )

"""Two hosts on one machine: network namespaces with addresses, names and a cable of their own.

A host shares the machine's files and clock, as hosts on a shared file system do; everything between them goes over the
cable. Needs root and iproute2.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CABLE = "eth0"
_ETC = Path("/etc/netns")
# Of a namespace's name: then the pid of the process that made it, and a letter.
_PREFIX = "rd"


def missing() -> list[str]:
    """What this machine lacks for hosts of its own."""
    lacks = [] if os.geteuid() == 0 else ["root (namespaces and links are the system's)"]
    tools = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux"}
    lacks += [f"{tool} (Debian: {package})" for tool, package in tools.items() if shutil.which(tool) is None]
    if not lacks and subprocess.run(["ip", "netns", "list"], capture_output=True).returncode:
        lacks.append("a kernel with network namespaces")
    return lacks


def _call(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        space: Its network namespace, a name no other process of this machine uses.
        name: Its own host name.
        address: Its IPv4 address on the cable.
    """

    space: str
    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` on this host, in one process whose pid is the command's."""
        named = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self.space, "unshare", "-u", "sh", "-c", named, self.name, *words]

    def pids(self) -> list[int]:
        """Every process that runs here."""
        return [int(pid) for pid in _call("ip", "netns", "pids", self.space).split()]

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to every process that runs here, launchers first."""
        for pid in sorted(self.pids()):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def link(self, up: bool) -> None:
        """Plug the cable in, or pull it out."""
        _call("ip", "-n", self.space, "link", "set", CABLE, "up" if up else "down")

    def limit(self, rate: str | None) -> None:
        """Let this host send no faster than `rate` ("20mbit"); None lifts the limit."""
        queue = ["ip", "netns", "exec", self.space, "tc", "qdisc"]
        if rate is None:
            # An error where there is none.
            subprocess.run([*queue, "del", "dev", CABLE, "root"], capture_output=True, timeout=30)
        else:
            _call(*queue, "replace", "dev", CABLE, "root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")


def _make(host: Host, others: list[Host]) -> None:
    _call("ip", "netns", "add", host.space)
    _call("ip", "-n", host.space, "link", "set", "lo", "up")
    folder = _ETC / host.space
    folder.mkdir(parents=True, exist_ok=True)
    # `ip netns exec` shows its processes this file as /etc/hosts.
    lines = ["127.0.0.1 localhost", *(f"{one.address} {one.name}" for one in [host, *others])]
    (folder / "hosts").write_text("\n".join(lines) + "\n")


def _remove(host: Host) -> None:
    if Path("/run/netns", host.space).exists():
        host.signal_all(signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", host.space], capture_output=True, timeout=30)
    shutil.rmtree(_ETC / host.space, ignore_errors=True)


def _remove_leftovers() -> None:
    """The hosts of a process that was killed before it could remove them."""
    for space in Path("/run/netns").glob(f"{_PREFIX}*"):
        pid = space.name.removeprefix(_PREFIX)[:-1]
        if pid.isdigit() and not Path("/proc", pid).exists():
            _remove(Host(space.name, "", ""))


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts joined by a cable; both, and all that runs on them, are gone afterwards."""
    _remove_leftovers()
    mark = f"{_PREFIX}{os.getpid()}"
    first, second = Host(f"{mark}a", "node-a", "10.99.0.1"), Host(f"{mark}b", "node-b", "10.99.0.2")
    try:
        _make(first, [second])
        _make(second, [first])
        ends = f"name {CABLE} netns {first.space} type veth peer name {CABLE} netns {second.space}"
        _call("ip", "link", "add", *ends.split())
        for host in (first, second):
            _call("ip", "-n", host.space, "addr", "add", f"{host.address}/24", "dev", CABLE)
            host.link(up=True)
        yield first, second
    finally:
        _remove(first)
        _remove(second)

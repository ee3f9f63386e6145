"""Stand-ins for ssh, srun and scontrol that record requests and run them on this machine."""

import importlib.util
import os
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SSH = """#!/bin/bash
# ssh HOST COMMAND: the host's behaviour lies in $STATE.
export HOST="$1"
echo "$1" >>"$STATE/reached"
[ ! -e "$STATE/unreachable.$1" ] || { echo "ssh: connect to host $1: No route to host" >&2; exit 255; }
exec bash -c "$2"
"""
# A host's Python: answers `probe`, otherwise does what the test wrote for this host.
PYTHON = """#!/bin/bash
if [ "$2" = probe ]; then cat "$STATE/probe.$HOST"; exit; fi
printf '%s\\n' "$@" >"$STATE/words.${HOST:-$SLURM_NODEID}"
env >"$STATE/env.${HOST:-$SLURM_NODEID}"
[ ! -e "$STATE/does.${HOST:-$SLURM_NODEID}" ] || . "$STATE/does.${HOST:-$SLURM_NODEID}"
"""
# srun OPTIONS COMMAND: one task per node at once, signals forwarded to all, the highest status.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >>"$STATE/srun"; shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node ${TASK_PREFIX:+$TASK_PREFIX $node} "$@" & tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -TERM "${tasks[@]}"' TERM
highest=0
for task in "${tasks[@]}"; do
  while :; do
    wait "$task"; status=$?
    kill -0 "$task" 2>/dev/null || break
  done
  wait "$task"; again=$?
  [ $again = 127 ] || status=$again
  [ $status -le $highest ] || highest=$status
done
exit $highest
"""
SCONTROL = """#!/bin/bash
echo "$*" >>"$STATE/scontrol"
[ "$1" != show ] || printf '%s\\n' ${NODE_NAMES:-node-a node-b}
"""


def write(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def node_module():
    """launch/node.py as a module."""
    spec = importlib.util.spec_from_file_location("launch_node", ROOT / "launch" / "node.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stage:
    """A folder of stand-ins, and the scripts run with them."""

    def __init__(self, folder):
        self.state = folder / "state"
        self.bin = folder / "bin"
        for made in (self.state, self.bin):
            made.mkdir()
        self.python = write(self.bin / "python", PYTHON)
        self.ssh = write(self.bin / "stand-in-for-ssh", SSH)
        write(self.bin / "srun", SRUN)
        write(self.bin / "scontrol", SCONTROL)
        self.env = os.environ | {"STATE": str(self.state), "PATH": f"{self.bin}:{os.environ['PATH']}"}
        self.env |= {"SSH": str(self.ssh), "REMOTE_PYTHON": str(self.python), "PYTHON": str(self.python)}

    def host(self, name, does="", probe='probe {"alike": {"commit": "c1"}, "port": 40001, "resolves": true}\n'):
        """Set a host's answer to `probe`, and what it does when its part is started."""
        (self.state / f"probe.{name}").write_text("Welcome to the cluster\n" + probe)
        (self.state / f"does.{name}").write_text(does)

    def start(self, script, *words, cwd=None, **env):
        command = ["bash", str(ROOT / "launch" / script), *words]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # Background test runs ignore SIGINT, and bash cannot trap a signal that was ignored at its start.
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        return subprocess.Popen(command, env=self.env | env, cwd=cwd or ROOT, start_new_session=True, **pipe, **heard)

    def run(self, script, *words, cwd=None, **env):
        process = self.start(script, *words, cwd=cwd, **env)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def read(self, name):
        path = self.state / name
        return path.read_text().splitlines() if path.exists() else []

    def settings(self, name):
        return dict(line.split("=", 1) for line in self.read(f"env.{name}") if "=" in line)

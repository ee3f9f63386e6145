"""`robust-dist verify`: green where all is right, red with the part's name where something was broken."""

import json
import os

import pytest

from robust_dist.cli import main as command
from robust_dist.verify.parts import PARTS
from tests.forked import ROOT, python

# Put into a part's process before anything else is imported: what is broken in it.
CONSTANT = "from robust_dist.verify import correct; correct.BACKENDS['fused']['eps'] = 1e-7"
OTHER_BACKEND = """
import os
from functools import partial
from robust_dist.verify import correct, together
if os.environ["RANK"] == "1":
    together.stepped = partial(correct.stepped, foreach=False)
"""
LOST_TENSOR = """
from robust_dist.verify import together
save = together.TorchRun.save
def losing(self, folder):
    next(iter(self.optimizer.state.values()))["exp_avg"].zero_()
    save(self, folder)
together.TorchRun.save = losing
"""
HANGS = "import time; time.sleep(600)"
DIES = "import os; os.abort()"


def verify(folder, *words, broken=None, launcher=()):
    """Exit status, what was printed and the report of a verification whose parts were broken by name."""
    env = {"OMP_NUM_THREADS": "1"}
    if broken:
        (folder / "broken").mkdir()
        lines = [
            "import sys",
            "part = sys.orig_argv[sys.orig_argv.index('--part') + 1] if '--part' in sys.orig_argv else ''",
        ]
        lines += [f"if part == {part!r}:\n    exec({code!r})" for part, code in broken.items()]
        (folder / "broken" / "sitecustomize.py").write_text("\n".join(lines))
        env["PYTHONPATH"] = os.pathsep.join([str(folder / "broken"), str(ROOT)])
    run = [*launcher, "-m", "robust_dist.verify", "--out", folder / "out", *words]
    code, said = python(*run, cwd=ROOT, timeout=500, **env)
    report = json.loads((folder / "out" / "report.json").read_text())
    return code, said, {part["part"]: part for part in report["parts"]}


def wrong_claims(part):
    return [claim["what"] for claim in part["claims"] if claim["verdict"] == "wrong"]


def test_two_ranks_of_a_launcher_are_verified_together_and_nothing_is_wrong(tmp_path):
    config = str(ROOT / "configs" / "accelerate" / "cpu.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    code, output, parts = verify(tmp_path, "--only", "augmentation", "ranks", launcher=launcher)
    assert code == 0, output
    assert [(part["state"], part["wrong"]) for part in parts.values()] == [("done", False)] * 2
    assert {claim["rank"] for part in parts.values() for claim in part["claims"]} == {0, 1}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| Equalize by native: pixels that differ from torch on the CPU | 0 | 0 | right |" in page
    assert "| step of the switch on every rank, by share | 9 | 9 | right |" in page
    assert "nothing is wrong" in output


def test_what_is_broken_turns_its_part_red_and_no_other(tmp_path):
    broken = {"optimizer": CONSTANT, "ranks": OTHER_BACKEND, "ddp": LOST_TENSOR, "augmentation": DIES}
    code, output, parts = verify(tmp_path, "--only", "machine", *broken, broken=broken)
    assert code == 1
    assert [name for name, part in parts.items() if part["wrong"]] == ["optimizer", "augmentation", "ranks", "ddp"]
    assert wrong_claims(parts["optimizer"])[0].startswith("RAdaBeliefW, fused on cpu")
    assert {*wrong_claims(parts["ranks"])} == {"optimizer's bits on every rank"}
    assert (
        wrong_claims(parts["ddp"])
        == ["DDP: a run killed after its checkpoint, gone on with, against one that was not"] * 2
    )
    assert parts["augmentation"]["state"] == "failed"
    assert "WRONG optimizer" in output
    assert "something is WRONG" in output


def test_a_part_that_hangs_is_ended_in_time_and_what_is_left_is_not_run(tmp_path):
    code, output, parts = verify(tmp_path, "--only", "machine", "ranks", "--minutes", "0.1", broken={"machine": HANGS})
    assert code == 1, output
    assert (parts["machine"]["state"], parts["ranks"]["state"]) == ("hung", "not run")


def test_a_folder_with_files_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "report.md").write_text("mine")
    assert command(["verify", "--out", str(tmp_path)]) == 2
    assert "it holds files already, which stay" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text() == "mine"


def test_all_that_is_wrong_with_the_command_is_said_at_once(capsys):
    assert command(["verify", "--minutes", "0", "--ranks", "0", "--only", "optimiser"]) == 2
    said = capsys.readouterr().err
    assert all(
        one in said for one in ("--minutes=0.0", "--ranks=0", "there is no such part; there are machine, optimizer")
    )


@pytest.mark.slow
def test_the_whole_verification_on_two_cpu_ranks_is_green(tmp_path):
    code, output, parts = verify(tmp_path, "--minutes", "8")
    assert code == 0, output
    assert list(parts) == [part.name for part in PARTS]
    assert {part["state"] for part in parts.values()} == {"done"}

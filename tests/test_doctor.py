"""doctor: every finding has a name, a status and, if something is wrong, a command."""

import pytest
import torch

from robust_dist import doctor, extras
from robust_dist.augment import backends
from robust_dist.doctor import Check, exit_code, format_report, report
from robust_dist.optim import fused_cpu
from tests.forked import python

METADATA = """Metadata-Version: 2.4
Name: robust_dist
Version: 9.9
Provides-Extra: train
Provides-Extra: all
Requires-Dist: torch>=2.6
Requires-Dist: pytest[x]>=1.0; extra == "train"
Requires-Dist: no-such-package-here>=1; extra == "train"
Requires-Dist: ruff<9999,>=9998.1 ; python_version >= "3" and extra == 'all'
Requires-Dist: robust-dist[train]; extra == "all"
"""

BLOCKED = """
import sys
missing = ("torchvision", "sklearn", "matplotlib", "accelerate", "deepspeed", "timm", "PIL", "numpy")
sys.modules.update(dict.fromkeys([*missing, *(name for name in sys.modules if name.partition(".")[0] in missing)]))
from robust_dist.doctor import exit_code, format_report, report
checks = report()
print(format_report(checks))
sys.exit(exit_code(checks))
"""


@pytest.fixture(scope="module")
def checks():
    return report()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A real installation record of the package, with extras that cannot be satisfied."""
    folder = tmp_path / "robust_dist-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(str(tmp_path))


def by_name(checks, name):
    return next(check for check in checks if check.name == name)


def test_nothing_fails_where_the_tests_run(checks):
    assert exit_code(checks) == 0
    assert not [check for check in checks if "this check failed to run" in check.detail]


def test_trackers_that_are_installed_are_named_and_those_that_are_not(checks):
    detail = by_name(checks, "trackers").detail
    there, _, missing = detail.partition("(not installed: ")
    assert "tensorboard " in there
    for name in doctor.TRACKERS:
        assert (f"{name} " in there) != (name in missing)


def test_versions_devices_backends_and_data_are_all_reported(checks):
    names = {check.name for check in checks}
    assert {"python", "torch", "packages", "trackers", "cpu", "foreach (cpu)", "fused (cpu)", "digits"} <= names
    assert names & {"gpu", "cuda:0"}
    assert torch.__version__ in by_name(checks, "torch").detail


def test_everything_that_is_wrong_has_a_remedy(checks):
    assert all(check.remedy for check in checks if check.status != "ok")


def test_foreach_is_available_on_the_cpu(checks):
    assert by_name(checks, "foreach (cpu)") == Check("foreach (cpu)", "ok", "available")


def test_the_backend_of_the_augmentation_is_named_or_what_it_lacks(checks, monkeypatch):
    assert by_name(checks, "augmentation (cpu)").detail.startswith(("native, ", "torch's operations; native is not"))
    monkeypatch.setattr(backends, "_found", lambda name: "it was not built")
    found = by_name(list(doctor._augment_backends()), "augmentation (cpu)")
    assert found == Check("augmentation (cpu)", "ok", "torch's operations; native is not available: it was not built")


def test_with_torch_alone_it_runs_and_names_the_extra():
    code, said = python("-c", BLOCKED)
    assert code == 0, said
    assert "needs sklearn: pip install 'robust_dist[train]'" in said
    assert "this check failed to run" not in said


def test_an_incomplete_extra_names_each_package_and_the_command(installed):
    found = {check.name: check for check in doctor._extras()}
    assert found["[train]"].status == "warn"
    assert found["[train]"].detail == "no-such-package-here is missing"
    assert found["[train]"].remedy == "pip install 'robust_dist[train]'"
    assert "9998.1 or later is required; no-such-package-here is missing" in found["[all]"].detail


def test_an_extra_within_an_extra_is_resolved(installed):
    names = [requirement.name for requirement in extras.extra_requirements("all")]
    assert names == ["ruff", "pytest", "no-such-package-here"]


def test_a_package_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(extras, "PACKAGE", "robust_dist_not_installed")
    (check,) = doctor._extras()
    assert (check.status, check.remedy) == ("warn", "pip install -e '.[train]'")


@pytest.mark.parametrize(
    ("version", "numbers"), [("2.10.0+cu130", (2, 10)), ("0.21", (0, 21)), ("2.6.0rc1", (2, 6)), ("", ())]
)
def test_versions_are_compared_by_their_numbers(version, numbers):
    assert extras.version_tuple(version) == numbers


def test_a_torch_that_is_too_old_fails():
    check = doctor._at_least("torch", "2.5.1", doctor.LOWEST_TORCH, "pip install -U torch")
    assert (check.status, check.detail) == ("fail", "2.5.1, but 2.6 or later is required")
    assert exit_code([check]) == 1


def test_too_many_threads_are_a_warning():
    cores, before = max(1, int(doctor.surroundings.usable_cores())), torch.get_num_threads()
    torch.set_num_threads(cores + 1)
    (check,) = doctor._cpu()
    torch.set_num_threads(before)
    assert (check.status, check.remedy) == ("warn", f"export OMP_NUM_THREADS={cores}")


@pytest.mark.skipif(fused_cpu.why_not() is not None, reason="the fused step is not compiled")
def test_the_threads_of_an_offloaded_step_are_said(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cores, before = max(1, int(doctor.surroundings.usable_cores())), torch.get_num_threads()
    for threads in {1, cores}:
        torch.set_num_threads(threads)
        (check,) = doctor._offload()
        torch.set_num_threads(before)
        assert check.detail.startswith(f"ZeRO-Offload's step takes {threads} of {cores} cores")
        wanted = ("warn", f"export OMP_NUM_THREADS={cores}") if threads < cores else ("ok", None)
        assert (check.status, check.remedy) == wanted


def test_an_offloaded_step_without_the_c_library_is_a_warning(monkeypatch):
    monkeypatch.setattr(fused_cpu, "why_not", lambda: "it was not built")
    (check,) = doctor._offload()
    assert (check.status, "it was not built" in check.detail) == ("warn", True)


def test_a_check_that_breaks_stops_no_other():
    def _broken():
        yield Check("first", "ok", "fine")
        raise OSError("no such thing")

    first, broken = doctor._guarded(_broken)
    assert first.name == "first"
    assert broken == Check("broken", "warn", "this check failed to run: OSError: no such thing")


def test_the_text_has_a_line_a_check_and_one_a_remedy():
    text = format_report([Check("a", "ok", "good"), Check("longer", "warn", "bad", "mend it"), Check("c", "fail", "x")])
    assert text.splitlines() == [
        "ok    a       good",
        "warn  longer  bad",
        "              -> mend it",
        "fail  c       x",
        "",
        "1 ok, 1 warn, 1 fail",
    ]


def test_warnings_alone_exit_with_zero():
    assert exit_code([Check("a", "warn", "bad")]) == 0
    assert exit_code([]) == 0

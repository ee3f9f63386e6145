"""The benchmark of the host's part of an optimizer step."""

import pytest

from robust_dist.bench import host_step
from robust_dist.bench.host_step import COUNTS, GATHERING, GUARDED, IN_C, LARGE, LARGE_GUARDED, STEP, bench_host
from robust_dist.cli import main


def test_both_versions_have_a_column_and_the_ratios_are_theirs(monkeypatch, tmp_path):
    (tmp_path / "robust_dist" / "optim").mkdir(parents=True)
    turns = iter([(40.0, 60.0, 30.0), (50.0, 300.0, 150.0), (30.0, 90.0, 30.0), (60.0, 400.0, 120.0)])
    monkeypatch.setattr(
        host_step, "_measured_by", lambda root: dict(zip((GATHERING, STEP, IN_C), next(turns), strict=True))
    )
    text = bench_host(rounds=2, beside=str(tmp_path))
    assert f"| {STEP} | 161 | 60.0 | 300.0 |" in text
    assert f"{STEP}: 2.00 times {GATHERING}" in text
    assert text.endswith(f"{STEP} 0.20, {IN_C} 0.25")


def test_what_a_measured_rate_costs_stands_as_a_ratio(monkeypatch):
    found = {GATHERING: 40.0, STEP: 60.0, IN_C: 50.0, GUARDED: 60.0, LARGE: 1000.0, LARGE_GUARDED: 1150.0}
    monkeypatch.setattr(host_step, "_measured_by", lambda root: found)
    text = bench_host(rounds=1)
    assert f"| {LARGE_GUARDED} | 1 | 1150.0 |" in text
    assert f"{GUARDED}: 1.20 times {IN_C}" in text
    assert f"{LARGE_GUARDED}: 1.15 times {LARGE}" in text


def test_a_version_is_measured_in_a_process_of_its_own():
    found = host_step._measured_by(host_step.Path(host_step.__file__).parents[2])
    assert set(found) == set(COUNTS)
    assert min(found.values()) > 0


def test_a_folder_without_a_version_is_refused(tmp_path, capsys):
    assert main(["bench", "host", "--beside", str(tmp_path)]) != 0
    assert "--beside must be a folder that holds robust_dist/optim" in capsys.readouterr().err


def test_a_version_that_cannot_be_timed_is_named(tmp_path):
    folder = tmp_path / "robust_dist" / "optim"
    folder.mkdir(parents=True)
    (tmp_path / "robust_dist" / "__init__.py").touch()
    (folder / "__init__.py").write_text("raise ImportError('no such thing')")
    with pytest.raises(ValueError, match=r"cannot be timed: .*no such thing"):
        host_step._measured_by(tmp_path)

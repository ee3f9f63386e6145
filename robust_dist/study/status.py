"""`robust-dist study status`: who trains what, what is finished, what failed."""

from collections import Counter

from robust_dist.ranks.claim import RunClaim
from robust_dist.study.folder import StudyFolder
from robust_dist.study.grid import Run
from robust_dist.train.folder import RunFolder


def status(folder: StudyFolder) -> str:
    """The state of all runs, as text.

    Args:
        folder: The study's folder.

    Raises:
        StudyError: It is no study's folder.
    """
    study = folder.study()
    counts: Counter[str] = Counter()
    lines = []
    for run in study.runs():
        kind, line = _state(folder, run, study.base.get("epochs", "?"))
        counts[kind] += 1
        if line:
            lines.append(line)
    names = ("finished", "diverged", "failed", "running", "waiting")
    head = f"{study.name}: {sum(counts.values())} runs, " + ", ".join(f"{counts[name]} {name}" for name in names)
    return "\n".join([head, *lines])


def _state(folder: StudyFolder, run: Run, epochs: object) -> tuple[str, str]:
    result = folder.result(run)
    if result is not None:
        return ("diverged", f"{run}: diverged: {result.diverged}") if result.diverged else ("finished", "")
    worker = RunClaim.worker_of(folder.of("claims", run))
    if worker is not None:
        rows = RunFolder(folder.of("runs", run)).metrics()
        accuracy = rows[-1].get("eval_accuracy") if rows else None
        seen = "" if accuracy is None else f", accuracy {accuracy:.2%}"
        of = run.cell.settings.get("epochs", epochs)
        where = f"process {worker.pid} on {worker.host}"
        return "running", f"{run}: epoch {rows[-1].get('epoch') if rows else 0} of {of}{seen} ({where})"
    failure = folder.failure(run)
    if failure is not None:
        end = failure.log.splitlines()[-1] if failure.log else ""
        return "failed", f"{run}: failed with status {failure.status}: {end}"
    return "waiting", ""

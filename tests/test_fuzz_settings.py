"""Settings and our own files, damaged in every way: the outcome is a named error or the right value.

It takes a few seconds by default. With --slow, ROBUST_DIST_FUZZ examples of each kind are drawn (default 2,000) from
the seed ROBUST_DIST_FUZZ_SEED; -s prints the counts.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from robust_dist.checkpoint import CheckpointStore
from robust_dist.checkpoint.dcp import OPTIMIZER_FOLDER, read_metadata, write_dcp
from robust_dist.checkpoint.training_state import TrainingState
from robust_dist.data.decode import decode_rgb
from robust_dist.data.errors import BadImageError
from robust_dist.data.hub import open_hub
from robust_dist.data.shards import open_webdataset
from robust_dist.documents import dump_yaml, parse_yaml
from robust_dist.engines.deepspeed.config import check_config
from robust_dist.study.folder import StudyFolder, status
from robust_dist.study.grid import study_dict, study_from_dict
from robust_dist.study.outcome import Failure
from robust_dist.study.parse import load_study
from robust_dist.study.summary import summarize
from robust_dist.train.folder import RunFolder
from robust_dist.train.keys import keys_of
from robust_dist.train.metrics import read_rows
from robust_dist.train.recipe import Recipe, flatten, load_recipe, parse_recipe, recipe_dict
from tests.damage import CHANGES, SNIPPETS, damaged
from tests.data.tiny_sets import write_parquet, write_shards
from tests.study.studies import result

ROOT = Path(__file__).parents[1]
RECIPES = [path.read_bytes() for path in sorted(ROOT.glob("configs/recipes/*.yaml"))]
STUDY = f"""base: {ROOT}/configs/recipes/quickstart.yaml
description: a small one
set: {{batch_size: 512, precision.mixed: no}}
budget: {{epochs: 1}}
seeds: [0, 1]
compare: method
reference: A
axes:
  method:
    A: {{optimizer.name: adamw, optimizer.weight_decay: 0.1}}
    B: {{optimizer.name: RAdaBeliefW}}
  optimizer.lr: [0.1, 1e-2]
paper: {{A: {{0.1: 95.0, 0.01: diverged}}}}
""".encode()
JSONS = [path.read_bytes() for path in sorted(ROOT.glob("configs/deepspeed/*.json"))]
MANY = int(os.environ.get("ROBUST_DIST_FUZZ", "2000"))
SEED = int(os.environ.get("ROBUST_DIST_FUZZ_SEED", "0"))
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.fixture(
    params=[False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(14_400)])], ids=["few", "many"]
)
def fuzz(request):
    """Run a check on a few fixed examples, or on many from a seed; it returns the outcome of each."""

    def run(check, *strategies, few):
        counts = Counter()

        def one(found):
            counts[check(*found)] += 1

        wrapped = given(st.tuples(*strategies))(one)
        if request.param:
            seed(SEED)(settings(max_examples=MANY, **QUIET)(wrapped))()
        else:
            settings(max_examples=few, derandomize=True, **QUIET)(wrapped)()
        print(f"\n{request.node.name}: {dict(counts)}")

    return run


@contextlib.contextmanager
def folder():
    path = Path(tempfile.mkdtemp(prefix="robust-dist-fuzz-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def outcome(action):
    """The outcome of a call: its value, or the message for the user."""
    told, error = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            return action(), None
    except (SystemExit, ValueError) as caught:
        error = caught
    if isinstance(error, SystemExit):
        assert error.code == 0 or (error.code == 2 and "error:" in told.getvalue())
        return None, told.getvalue()
    # A ValueError of int() or of json would name nothing.
    ours = type(error).__module__.startswith("robust_dist")
    known = ("it must be", "is for data.name", "the DeepSpeed JSON", ".json ", "write MODULE:NAME")
    named = any(words in str(error) for words in known)
    assert ours or named, repr(error)
    return None, str(error)


def agrees(ours, theirs):
    """Whether a recipe's value is what a plain YAML reader finds in its place, or its spelling."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(agrees(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(agrees, ours, theirs))
    if ours == theirs or ours != ours or (not ours and theirs in (None, "")):
        return True
    if isinstance(ours, str) and not isinstance(theirs, str):
        # For text keys, 007 and no are kept as spelled.
        return theirs != theirs or yaml.safe_load(ours) == theirs
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return float(ours) == float(theirs)
    if isinstance(theirs, str):
        # 1e-3 and [1, 2] in quotes.
        return agrees(ours, parse_yaml(theirs, "").data) if parse_yaml(theirs, "").data != theirs else False
    return False


def check_recipe(content: bytes) -> str:
    with folder() as place:
        path = place / "r.yaml"
        path.write_bytes(content)
        recipe = outcome(lambda: load_recipe(path))[0]
        if recipe is None:
            return "named"
        written = recipe_dict(recipe)
        plain = yaml.safe_load(content.decode("utf-8-sig"))
        for key, value in flatten(plain or {}).items():
            ours = flatten(written).get(key)
            assert value is None or key == "run_dir" or agrees(ours, value), (key, ours, value)
        path.write_text(dump_yaml(written))
        assert recipe_dict(load_recipe(path)) == written
        return "right"


def test_a_damaged_recipe_is_a_named_error_or_says_what_a_plain_reader_reads(fuzz):
    def check(content, changes):
        return check_recipe(damaged(content, changes))

    fuzz(check, st.sampled_from(RECIPES), CHANGES, few=30)


SCALARS = st.one_of(
    st.sampled_from(SNIPPETS),
    st.integers(-3, 10**12).map(str),
    st.floats().map(repr),
    st.text(max_size=8),
    st.sampled_from(
        ["no", "yes", "~", "0o17", "[0.9, 0.99]", "[a, b]", "{a: 1}", "{a: {class_path: b}}", "auto", "resnet8"]
    ),
)
KNOWN = keys_of(Recipe)
KEYS = st.sampled_from(sorted([*KNOWN.values, *KNOWN.mappings, *KNOWN.sections, "x", "data.x"]))
FITTING = {
    "float": ["0.5", "1e-3", "1", ".25", "'0.5'"],
    "int": ["8", "1_000", "0x10", "'8'"],
    "bool": ["true", "no", "Off", "'yes'"],
    "str": ["a", "no", "007", "1e10", "'x y'", "~/a"],
    "list": ["[a, no]", "[]", "[0.1, 0.2]"],
    "tuple": ["[0.5, 0.9]", "[0.1, '0.2', 0.3]"],
}


def fitting(key):
    """A key, and values of which some are valid for it."""
    hint = str(KNOWN.values.get(key, ""))
    texts = [text for kind, texts in FITTING.items() if kind in hint for text in texts]
    return st.tuples(st.just(key), st.sampled_from([*texts, "null"]))


PAIRS = st.one_of(KEYS.flatmap(fitting), KEYS.flatmap(fitting), st.tuples(KEYS, SCALARS))


def test_a_key_with_any_value_is_a_named_error_or_that_value(fuzz):
    def check(pairs):
        return check_recipe("".join(f"{key}: {text}\n" for key, text in pairs).encode("utf-8", "surrogatepass"))

    fuzz(check, st.lists(PAIRS, max_size=3), few=30)


def test_a_command_line_is_a_named_error_or_what_it_says(fuzz):
    def check(pairs, more):
        words = [
            word for (key, raw), one in pairs for word in ([f"--{key}={raw}"] if one else [f"--{key}", raw])
        ] + more
        recipe, _ = outcome(lambda: parse_recipe(words))
        if recipe is None:
            return "named"
        given = {key: raw for (key, raw), _ in pairs if key in KNOWN.values}
        for key, raw in given.items():
            under = [name for (name, _), _ in pairs if name in KNOWN.sections and key.startswith(f"{name}.")]
            ours = flatten(recipe_dict(recipe)).get(key)
            assert under or key == "run_dir" or ours == raw or agrees(ours, parse_yaml(raw, "").data), (key, ours, raw)
        return "right"

    fuzz(check, st.lists(st.tuples(PAIRS, st.booleans()), max_size=3), st.lists(SCALARS, max_size=1), few=30)


def test_nothing_that_a_recipe_names_is_imported(fuzz):
    def check(form, key):
        value = (form % b"tests.canary.sing").decode()
        inner = "".join(f"\n  {line}" for line in value.splitlines()) if "\n" in value else value
        text = f"{key}: {inner}\n"
        with folder() as place:
            (place / "r.yaml").write_text(text)
            for words in (
                ["--config", str(place / "r.yaml")],
                [f"--{key}", value],
                [f"--{key}.class_path", "tests.canary.sing"],
            ):
                recipe, _ = outcome(lambda words=words: parse_recipe(words))
                assert "tests.canary" not in sys.modules
                assert recipe is None or isinstance(flatten(recipe_dict(recipe)).get(key, ""), (str, list))
        return "named"

    fuzz(
        check,
        st.sampled_from([b"class_path: %s\n", b"{class_path: %s}", b"[{a: {class_path: %s, init_args: {}}}]"]),
        KEYS,
        few=25,
    )


def test_a_damaged_study_is_a_named_error_or_a_whole_one(fuzz):
    def check(changes):
        with folder() as place:
            path = place / "s.yaml"
            path.write_bytes(damaged(STUDY, changes))
            found, _ = outcome(lambda: load_study(path))
            if found is None:
                return "named"
            study, recipes = found
            assert len(recipes) == len(study.cells()) > 0
            assert study_from_dict(parse_yaml(dump_yaml(study_dict(study)), "").data) == study
            for cell in study.cells():
                ours = flatten(recipe_dict(recipes[cell.name]))
                assert all(agrees(ours[key], value) for key, value in cell.settings.items() if key in ours)
            return "right"

    fuzz(check, CHANGES, few=25)


def test_a_damaged_deepspeed_json_is_a_named_error_or_without_fault(fuzz):
    def check(content, changes):
        with folder() as place:
            path = place / "c.json"
            path.write_bytes(damaged(content, changes))
            error = outcome(lambda: check_config(path, auto=True))[1]
            if error is not None:
                return "named"
            pairs = []
            json.loads(path.read_text("utf-8-sig"), object_pairs_hook=lambda one: pairs.append([key for key, _ in one]))
            assert all(len(set(keys)) == len(keys) for keys in pairs)
            return "right"

    fuzz(check, st.sampled_from(JSONS), CHANGES, few=25)


def test_a_damaged_manifest_is_passed_over_for_the_good_checkpoint_before(fuzz):
    def check(changes):
        with folder() as place:
            store = CheckpointStore(place, keep=5)
            for step in (4, 8):
                (store.begin(step) / "weights").write_bytes(b"x" * step)
                store.commit(step, {"recipe": {"epochs": 3}, "loss_sums": [0.5], "eval_accuracy": None})
            path = place / "step-00000008" / "manifest.json"
            whole = json.loads(path.read_bytes())
            path.write_bytes(damaged(path.read_bytes(), changes))
            found, rejected = store.newest()
            if found.step == 4:
                assert len(rejected) == 1
                assert "step-00000008" in rejected[0]
                return "named"
            assert (found.step, found.metadata) == (8, whole["metadata"])
            return "right"

    fuzz(check, CHANGES, few=25)


ROWS = "".join(
    json.dumps({"epoch": e, "step": 12 * e, "train_loss": 1 / e, "eval_accuracy": e / 10, "eval_samples": 359}) + "\n"
    for e in range(1, 5)
).encode()


def test_no_row_is_lost_and_what_is_odd_is_said(fuzz):
    def check(changes, epochs):
        with folder() as place:
            run = RunFolder(place)
            run.metrics_path.write_bytes(damaged(ROWS, changes))
            before = run.metrics_path.read_bytes()
            notes, error = outcome(lambda: run.rewind(12 * epochs, 12))
            if error is not None:
                assert run.metrics_path.read_bytes() == before
                assert str(run.metrics_path) in error
                return "named"
            kept, faults = read_rows(run.metrics_path)
            assert faults == []
            assert [row["step"] for row in kept] == sorted({row["step"] for row in kept})
            assert all(row["step"] <= 12 * epochs and row["step"] % 12 == 0 for row in kept)
            erased = place / "metrics.erased.jsonl"
            left = len(kept) + (len([x for x in erased.read_text().split("\n") if x.strip()]) if erased.exists() else 0)
            assert left == len([line for line in before.decode("utf-8-sig").split("\n") if line.strip()])
            assert notes or [row["step"] for row in kept] == list(range(12, 12 * epochs + 1, 12))
            return "right"

    fuzz(check, CHANGES, st.integers(0, 5), few=25)


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """The folders of a run and a study, as on disk."""
    home = tmp_path_factory.mktemp("homes")
    run = RunFolder(home / "run")
    run.claim(Recipe(run_dir=str(home / "run")), {"python": "3", "command": ["train.py"]})
    run.note_stop({"signal": "SIGTERM", "step": 3, "total_steps": 9, "checkpoint": "c", "launchers": ["a"]})
    run.release()
    (home / "s.yaml").write_bytes(STUDY)
    study, _ = load_study(home / "s.yaml")
    found = StudyFolder(home / "study")
    found.claim(study)
    runs = list(study.runs())
    found.write_result(runs[0], result(0.5))
    found.write_failure(runs[1], Failure(1, "it\nbroke"))
    found.make("claims", runs[2]).write_text(json.dumps({"host": "a", "pid": 1, "kernel": "b"}))
    return home


def test_damaged_files_of_a_run_are_named_errors(fuzz, homes):
    files = ("recipe.yaml", "environment.json", "stopped.json")

    def check(name, changes):
        with folder() as place:
            shutil.copytree(homes / "run", place / "run")
            path = place / "run" / name
            before = damaged(path.read_bytes(), changes)
            path.write_bytes(before)
            run = RunFolder(place / "run")
            assert run.stop_note().get("step", 0) >= -(10**9)
            _, error = outcome(lambda: run.claim(Recipe(run_dir=str(homes / "run")), {}))
            run.release()
            assert error is None or (name == "recipe.yaml" and path.read_bytes() == before)
            if name == "environment.json" and len(json.loads(path.read_bytes())["starts"]) != 2:
                assert before in (place / "run" / "environment.damaged.json").read_bytes()
            return "right" if error is None else "named"

    fuzz(check, st.sampled_from(files), CHANGES, few=25)


def test_damaged_files_of_a_study_are_named_errors(fuzz, homes):
    files = sorted(
        str(path.relative_to(homes / "study"))
        for path in (homes / "study").rglob("*")
        if path.is_file() and path.name[0] != "."
    )

    def check(name, changes):
        with folder() as place:
            shutil.copytree(homes / "study", place / "study")
            path = place / "study" / name
            path.write_bytes(damaged(path.read_bytes(), changes))
            found = StudyFolder(place / "study")
            study, _ = load_study(homes / "s.yaml")
            errors = [
                outcome(lambda: status(found))[1],
                outcome(lambda: summarize(found))[1],
                outcome(lambda: found.claim(study))[1],
                outcome(lambda: found.forget_failures(study))[1],
            ]
            assert all(error is None or str(place / "study") in error for error in errors)
            return "named" if any(errors) else "right"

    fuzz(check, st.sampled_from(files), CHANGES, few=25)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    place = tmp_path_factory.mktemp("dcp")
    weight = torch.ones(3, 2)
    state = {"w": {"step": torch.tensor(1.0), "exp_avg": weight, "exp_avg_sq": weight}}
    write_dcp(TrainingState({"w": weight}, state, [{"params": ["w"], "lr": 0.1, "betas": (0.9, 0.99)}]), place)
    return place / OPTIMIZER_FOLDER


def test_a_damaged_dcp_folder_is_a_named_error_and_runs_nothing(fuzz, metadata):
    def check(changes):
        with folder() as home:
            place = home / "dcp"
            shutil.copytree(metadata, place)
            path = place / ".metadata"
            path.write_bytes(damaged(path.read_bytes(), changes))
            found, error = outcome(lambda: read_metadata(place))
            assert found is not None or str(place) in error
            return "right" if error is None else "named"

    fuzz(check, CHANGES, few=30)


LABELS = [0, 1, 2, 1, 0, 2]


@pytest.fixture(scope="module")
def image_files(tmp_path_factory):
    """A shard with its index, and a parquet file, of six images each."""
    home = tmp_path_factory.mktemp("images")
    write_shards(home, LABELS, per_shard=6)
    open_webdataset("train-000000.tar", root=home)
    write_parquet(home / "table", LABELS, files=1, group=3, classes=("a", "b", "c"))
    return home


def samples(source):
    """Each sample's place, size and label; None for one reported as bad."""
    found = []
    for index in range(len(source)):
        try:
            data, label = source.read(index)
            assert 0 <= label < len(source.classes)
            decode_rgb(data)
            found.append((source.where(index), len(data), label))
        except BadImageError:
            found.append(None)
    return found


def test_a_damaged_shard_or_index_is_a_named_error_bad_images_or_the_same_samples(fuzz, image_files):
    index = next(path.name for path in image_files.glob(".index-*"))

    def check(name, changes, keeps_time):
        with folder() as place:
            for path in (image_files / "train-000000.tar", image_files / index):
                shutil.copy2(path, place / path.name)
            whole = samples(open_webdataset("train-000000.tar", root=place))
            path = place / name
            stat = path.stat()
            path.write_bytes(damaged(path.read_bytes(), changes))
            if keeps_time:
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            found, error = outcome(lambda: samples(open_webdataset("train-000000.tar", root=place)))
            if error is not None:
                assert str(path) in error or "train-000000.tar" in error
                return "named"
            left = [sample for sample in found if sample is not None]
            # A label is text without a checksum: one of its digits may change, its place and its image may not.
            assert {sample[:2] for sample in left} <= {sample[:2] for sample in whole}
            return "right" if found == whole else "bad images named, or a label's digit changed"

    fuzz(check, st.sampled_from(["train-000000.tar", index]), CHANGES, st.booleans(), few=25)


def test_a_damaged_parquet_file_is_a_named_error_bad_images_or_as_many_samples(fuzz, image_files):
    (table,) = (image_files / "table" / "data").glob("*.parquet")

    def check(changes):
        with folder() as place:
            path = place / "data" / table.name
            path.parent.mkdir()
            path.write_bytes(damaged(table.read_bytes(), changes))
            opened = lambda: open_hub(str(place), "train", streaming=True, spool_dir=place)  # noqa: E731
            found, error = outcome(lambda: samples(opened()))
            if error is not None:
                assert str(place) in error
                return "named"
            assert len(found) == len(LABELS)
            return "bad images named" if None in found else "right"

    fuzz(check, CHANGES, few=15)

"""Recipes: YAML and command line into a dataclass, errors that name the key."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from robust_dist.documents import dump_yaml
from robust_dist.private import HIDDEN, hidden, hidden_text, hidden_words, remember_secrets
from robust_dist.train.failures import Rank, record_failure
from robust_dist.train.keys import keys_of
from robust_dist.train.recipe import Recipe, conflicts, flatten, load_recipe, parse_recipe, recipe_dict

RECIPES = sorted(Path(__file__).parents[2].glob("configs/recipes/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_runs_in_a_folder_of_its_own(path):
    assert load_recipe(path).run_dir == f"runs/{path.stem}"


def test_the_paper_s_settings_are_the_defaults():
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.label_smoothing, recipe.ema_decay) == (300, 128, 0.0, None)
    assert (recipe.optimizer.betas, recipe.optimizer.eps, recipe.optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert recipe.schedule.weight_decay_off_at == 0.75
    assert (recipe.augment.cutmix_alpha, recipe.augment.cutmix_p) == (1.0, 1.0)


def test_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("optimizer: {lr: 5e-4, betas: [0.9, 0.99]}\nmodel: {name: resnet8}\nepochs: 7\n")
    recipe = parse_recipe(["--config", str(path), "--epochs", "3", "--augment.crop", "2"])
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.epochs) == (5e-4, (0.9, 0.99), 3)
    assert (recipe.model.name, recipe.augment.crop) == ("resnet8", 2)


def test_a_recipe_written_as_yaml_is_read_back_the_same(tmp_path):
    recipe = parse_recipe(["--optimizer.lr", "0.3", "--ema_decay", "0.99", "--optimizer.no_decay", "[bias]"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(recipe)))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--optimizer.lrr", "1"], "optimizer.lrr"),
        (["--optimizer.lr", "fast"], "optimizer.lr"),
        (["--augment.cutmix_mode", "both"], "augment.cutmix_mode"),
        (["--epochs", "1.5"], "epochs"),
    ],
)
def test_an_unknown_key_or_a_wrong_type_is_an_error_that_names_the_key(words, named, capsys):
    with pytest.raises(SystemExit):
        parse_recipe(words)
    assert named in capsys.readouterr().err


def test_an_unknown_key_in_a_file_is_an_error_that_names_it(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("optimiser: {lr: 0.1}\n")
    with pytest.raises(SystemExit):
        load_recipe(path)
    assert "optimiser" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", "-1"),
        ("optimizer.lr", ".nan"),
        ("optimizer.betas", "[0.9, 1.0]"),
        ("optimizer.weight_decay", "-0.1"),
        ("optimizer.clip_norm", "0"),
        ("schedule.weight_decay_off_at", "1.5"),
        ("augment.cutmix_p", "2"),
        ("augment.cutmix_alpha", "0"),
        ("checkpoint.every_steps", "0"),
        ("checkpoint.keep", "0"),
        ("epochs", "0"),
        ("batch_size", "0"),
        ("accumulation", "0"),
        ("label_smoothing", "1"),
        ("ema_decay", "1"),
        ("seed", "-1"),
        ("data.block", "0"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_the_setting(key, value):
    with pytest.raises(ValueError, match=key):
        parse_recipe([f"--{key}", value])


def test_unknown_keys_wrong_types_and_values_out_of_range_are_one_message(capsys):
    words = ["--optimizer.lrr", "1", "--batch_size", "many", "--optimizer.eps", "-1", "--epochs", "0"]
    with pytest.raises(SystemExit):
        parse_recipe(words)
    said = capsys.readouterr().err
    assert all(f"{key}" in said for key in ("--optimizer.lrr", "batch_size", "optimizer.eps=-1", "epochs=0"))


def test_conflicts_name_what_changes_the_result_and_nothing_else():
    ours, theirs = Recipe(run_dir="a"), Recipe(run_dir="b")
    theirs.tracking.progress = False
    theirs.checkpoint.every_steps = 3
    theirs.data.keep_on, theirs.cuda_graph = "host", True
    assert conflicts(recipe_dict(ours), recipe_dict(theirs)) == []
    theirs.optimizer.lr = 0.5
    theirs.model.options = {"depth": 3}
    lines = conflicts(recipe_dict(ours), recipe_dict(theirs))
    assert "optimizer.lr: 0.01 here, 0.5 in the folder" in lines
    assert any(line.startswith("model.options.depth") for line in lines)


def test_a_key_that_an_older_folder_does_not_have_counts_as_its_default():
    ours, theirs = recipe_dict(Recipe()), recipe_dict(Recipe())
    del theirs["ema_decay"], theirs["augment"]
    assert conflicts(ours, theirs) == []
    assert conflicts(recipe_dict(Recipe(ema_decay=0.9)), theirs) == ["ema_decay: 0.9 here, None in the folder"]


def refusal(action, capsys):
    """The message for the user."""
    with pytest.raises((SystemExit, ValueError)) as caught:
        action()
    return capsys.readouterr().err + str(caught.value)


CANARY = "{class_path: canary.sing, init_args: {loudly: true}}"


@pytest.mark.parametrize("key", ["model.options", "optimizer.options", "data.data_files", "tracking.options"])
@pytest.mark.parametrize("form", ["%s", "{tensorboard: %s}", "{tensorboard: {deep: [%s]}}"])
def test_options_are_plain_values_and_code_that_they_name_is_refused_by_name(tmp_path, monkeypatch, capsys, key, form):
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'sang')!r}, 'w')\ndef sing(loudly): open('sang', 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    section, name = key.split(".")
    path = tmp_path / "r.yaml"
    path.write_text(f"{section}:\n  {name}: {form % CANARY}\n")
    for words in ([f"--{key}", form % CANARY], ["--config", str(path)], [f"--{key}.class_path", "canary.sing"]):
        assert f"{key}." in refusal(lambda words=words: parse_recipe(words), capsys)
    for words in (
        [f"--{section}", "canary.sing"],
        [f"--{section}", CANARY],
        [f"--{section}.class_path", "canary.sing"],
    ):
        refusal(lambda words=words: parse_recipe(words), capsys)
    assert not (tmp_path / "sang").exists()
    assert "canary" not in sys.modules


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "optimizer:\n  lr: 0.1\nbatch_size: 32\noptimizer:\n  eps: 1\n",
            "'optimizer' is given twice, in lines 1 and 4",
        ),
        ("optimizer:\n  lr: 0.1\n  lr: 0.2\n", "'optimizer.lr' is given twice, in lines 2 and 3"),
        ("optimizer:\n  lr: 0.1\noptimizer.lr: 0.2\n", "line 3: the key 'optimizer.lr' is given twice"),
        ("batch_size:\n", "line 1: batch_size is empty"),
        ("augment:\n  cutmix: ~\n", "line 2: augment.cutmix is empty"),
        ("epochs: 010\n", "line 1: 010 is read as octal"),
        ("timeout_seconds: 1:30\n", "line 1: 1:30 is read as base 60"),
        ("optimizer:\n\tlr: 1\n", "line 2: found character"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1: tags are not supported"),
        ("[" * 100_000, "nested more than"),
        ("\n".join(" " * i + "a:" for i in range(500)), "nested more than"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 9)),
            "after expanding aliases",
        ),
        ("a: &a [*a]\n", "nested more than"),
        ("epochs: 1\n---\nepochs: 2\n", "another document"),
        ("epochs: 1\nepoch: 2\n", "line 2: a recipe has no key 'epoch'; did you mean 'epochs'?"),
        ("- epochs\n", "must be a mapping"),
        ("optimizer: fast.yaml\n", "optimizer must be a mapping"),
        ("seed: 1e400\n", "is too large"),
        (f"epochs: {10**30}\n", "epochs="),
        ("run_dir: ''\n", "run_dir='' is not valid"),
        ("run_dir: ~nobody-of-this-name/a\n", "run_dir="),
        ("augment:\n  crop: 65\n", "augment.crop=65 is not valid: it must be at most 64"),
        ("timeout_seconds: 1e12\n", "timeout_seconds="),
        ("data:\n  workers: 100000\n", "data.workers="),
        ("tracking:\n  project: ../../elsewhere\n", "tracking.project="),
        ("tracking:\n  project: /elsewhere\n", "tracking.project="),
    ],
)
def test_a_file_that_says_two_things_or_none_is_an_error_that_names_the_place(tmp_path, capsys, text, told):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert told in refusal(lambda: load_recipe(path), capsys)


def test_all_that_is_wrong_is_told_at_once(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("epoch: 1\nseed:\noptimizer: {lr: fast}\n")
    told = refusal(lambda: load_recipe(path), capsys)
    assert all(words in told for words in ("'epoch'", "seed is empty", "optimizer.lr='fast'"))
    path.write_text("epochs: 0\noptimizer: {lr: -1}\n")
    told = refusal(lambda: load_recipe(path), capsys)
    assert "epochs=0" in told
    assert "optimizer.lr=-1" in told


@pytest.mark.parametrize("content", [b"epochs: \xff\n", "epochs: 1\n".encode("utf-16"), None, b"epochs: \x00"])
def test_what_is_no_text_file_is_an_error_that_names_it(tmp_path, capsys, content):
    path = tmp_path / "r.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert str(path) in refusal(lambda: load_recipe(path), capsys)
    assert "/dev/zero" in refusal(lambda: load_recipe("/dev/zero"), capsys)
    assert "nowhere.yaml" in refusal(lambda: load_recipe(tmp_path / "nowhere.yaml"), capsys)


def test_yaml_is_read_as_people_mean_it(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfoptimizer: &o\n  lr: 1e-3\n  betas: [0.9, '0.99']\n"
        b"  options: {beta2: yes, name: 'yes', at: 2001-01-01}\n"
        b"precision:\n  mixed: no\ndata:\n  revision: 007\n  download: off\n  name: hub\n  path: 1e10\n"
        b"tracking:\n  trackers: [no, 'on']\nschedule:\nlabel_smoothing: '0.1'\nseed: 0x1F\nprofile: [20, 3]\n"
    )
    recipe = load_recipe(path)
    ours = recipe.optimizer
    assert (ours.lr, ours.betas, ours.options) == (
        1e-3,
        (0.9, 0.99),
        {"beta2": True, "name": "yes", "at": "2001-01-01"},
    )
    assert (recipe.precision.mixed, recipe.data.revision, recipe.data.path) == ("no", "007", "1e10")
    assert (recipe.data.download, recipe.tracking.trackers) == (False, ["no", "on"])
    assert (recipe.label_smoothing, recipe.seed, recipe.profile, recipe.schedule) == (
        0.1,
        31,
        (20, 3),
        Recipe().schedule,
    )
    path.write_text(dump_yaml(recipe_dict(recipe)))
    assert load_recipe(path) == recipe


def test_anchors_and_merge_keys_mean_what_they_say(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model:\n  options: &shared {depth: 3, width: 4}\noptimizer:\n  options:\n    <<: *shared\n    width: 5\n"
    )
    recipe = load_recipe(path)
    assert (recipe.model.options, recipe.optimizer.options) == ({"depth": 3, "width": 4}, {"depth": 3, "width": 5})


def test_words_of_the_command_line_are_read_as_they_stand():
    words = ["--data.name", "webdataset", "--data.train", "[0-9]*.tar", "--data.eval", "[a.tar, b.tar]"]
    data = parse_recipe(words).data
    assert (data.train, data.eval) == ("[0-9]*.tar", ["a.tar", "b.tar"])
    recipe = parse_recipe(["--model.options.depth", "3", "--model.options.note", "a: b", "--model.options.on", "true"])
    assert recipe.model.options == {"depth": 3, "note": "a: b", "on": True}
    assert parse_recipe(["--model.options", "{a: 1}", "--model.options.b", '"2"']).model.options == {"a": 1, "b": "2"}


def test_a_folder_below_the_home_is_where_the_user_means_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_recipe(["--run_dir", "~/runs/a"]).run_dir == f"{tmp_path}/runs/a"


def test_secrets_are_hidden_at_any_depth_and_other_values_are_not():
    options = {"wandb": {"api_key": "XYZ", "entity": "us", "deep": [{"hfToken": "XYZ"}], "password": 123}}
    shown = hidden({"tracking": {"options": options}, "model": {"options": {"class_token": True, "num_tokens": 7}}})
    assert "XYZ" not in str(shown)
    assert "123" not in str(shown)
    assert shown["tracking"]["options"]["wandb"]["entity"] == "us"
    assert shown["model"]["options"] == {"class_token": True, "num_tokens": 7}
    assert hidden({"uri": "http://me:XYZ@host/x"}) == {"uri": f"http://me:{HIDDEN}@host/x"}
    line = [
        "t.py",
        "--a.api_key",
        "XYZ",
        "--b.token=XYZ",
        "--c",
        "{d: {secret: XYZ}}",
        "--e",
        "{password: XYZ",
        "--epochs",
        "3",
    ]
    assert "XYZ" not in str(hidden_words(line))
    assert hidden_words(line)[-2:] == ["--epochs", "3"]


def test_another_packages_error_is_shown_without_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "environment-0123")
    remember_secrets({"tracking": {"options": {"wandb": {"api_key": "option-4567", "entity": "somebody"}}}})
    said = (
        "401 for somebody: key option-4567 (or environment-0123) at https://me:pass@host/x?token=abc&signature=def, "
        "Authorization: Bearer abcdefgh123, hf_ABCDEFGHIJKL"
    )
    shown = hidden_text(said)
    secrets = ("option-4567", "environment-0123", "pass@", "token=abc", "=def", "abcdefgh123", "hf_ABC")
    assert [secret for secret in secrets if secret in shown] == []
    assert shown.startswith(f"401 for somebody: key {HIDDEN} (or {HIDDEN}) at https://me:{HIDDEN}@host/x")
    rank = Rank()
    rank.claimed(tmp_path)
    record = record_failure(RuntimeError(said), rank)
    written = (tmp_path / "errors" / "rank-0.json").read_text()
    assert [secret for secret in secrets if secret in written + record.summary + record.traceback] == []


def test_a_secret_is_given_again_and_makes_no_other_run(tmp_path):
    recipe = parse_recipe(["--tracking.options", "{tensorboard: {api_key: XYZ}}", "--model.options.token", "XYZ"])
    path = tmp_path / "r.yaml"
    path.write_text(dump_yaml(hidden(recipe_dict(recipe))))
    again = load_recipe(path)
    assert (again.tracking.options, again.model.options) == ({"tensorboard": {}}, {})
    assert conflicts(recipe_dict(again), hidden(recipe_dict(recipe))) == []
    assert conflicts(recipe_dict(recipe), hidden(recipe_dict(recipe))) == []


def test_the_whole_recipe_can_be_printed_and_every_key_has_its_help(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_recipe(["--epochs", "7", "--print_config"])
    path = tmp_path / "r.yaml"
    path.write_text(capsys.readouterr().out)
    assert ended.value.code == 0
    assert load_recipe(path) == Recipe(epochs=7)
    with pytest.raises(SystemExit):
        parse_recipe(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{key} " in said for key in flatten(recipe_dict(Recipe())))


def test_the_page_of_expectations_names_keys_that_there_are_and_argues_what_is_absent():
    page = (Path(__file__).parents[2] / "robust_dist" / "train" / "EXPECTATIONS.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ") and "| here |" not in line]
    assert len(rows) > 40
    known = keys_of(Recipe)
    for expected, here in rows:
        answer = here.strip()
        assert answer.startswith(("yes: ", "absent", "of the augmentation: ")), expected
        assert all(": " in absent for absent in re.findall("[aA]bsent[^.]*", answer)), f"{expected}: no reason"
        named = [
            key for key in re.findall(r"`([a-z_]+\.[a-z0-9_]+)[^`]*`", answer) if key.split(".")[0] in known.sections
        ]
        assert all(known.is_known(key) for key in named), f"{expected}: {named}"


def test_the_working_directory_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/home/somebody/pictures")
    monkeypatch.setenv("DB_PWD", "correct horse")
    assert hidden_text("/home/somebody/pictures/cat: correct horse") == f"/home/somebody/pictures/cat: {HIDDEN}"

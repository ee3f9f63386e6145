"""A trained model is used: what comes out is what the run evaluated, under whatever engine it was trained."""

import csv
import json
import math
import shutil
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import robust_dist
from robust_dist.checkpoint import CheckpointError, CheckpointStore, convert
from robust_dist.checkpoint.conversion import read_weights
from robust_dist.cli import main
from robust_dist.data import load_dataset
from robust_dist.data.decode import CentralCrop, decode_rgb
from robust_dist.inference.evaluate import calibration_error
from robust_dist.inference.runs import Run, figure_of, table
from robust_dist.inference.trained import choose
from robust_dist.models import build_model
from robust_dist.ranks.claim import FolderClaim
from robust_dist.train.folder import RunFolder
from tests.inference.runs import CLASSES, RUNS


def last_row(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def evaluation(*words):
    """What `robust-dist evaluate` wrote."""
    out = words[words.index("--out") + 1]
    assert main(["evaluate", *map(str, words)]) == 0
    return json.loads((out / "evaluation.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation_gives_the_logged_accuracy_and_loss_again_to_the_bit(trained, name, tmp_path, capsys):
    run = trained.runs[name]
    found, row = evaluation(run, "--out", tmp_path / "new"), last_row(run)
    assert (found["accuracy"], found["loss"]) == (row["eval_accuracy"], row["eval_loss"])
    assert (found["images"], found["step"]) == (row["eval_samples"], row["step"])
    assert found["logged_accuracy"] == row["eval_accuracy"]
    assert ", the same)" in capsys.readouterr().out
    right = sum(found["confusion"][number][number] for number in range(len(found["classes"])))
    assert right / found["images"] == found["accuracy"]
    assert [row["images"] for row in found["classes"]] == [sum(row) for row in found["confusion"]]
    assert (found["top5_accuracy"] is None) == (len(found["classes"]) < 6)
    assert found["top5_accuracy"] == row["eval_top5_accuracy"]
    assert [of["accuracy"] for of in found["classes"]] == row["eval_class_accuracy"]
    assert (tmp_path / "new" / "confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_two_lines_load_a_model_that_takes_the_pixels_of_the_run_s_evaluation(trained, tmp_path):
    state = torch.get_rng_state()
    model, preprocess = robust_dist.load(trained.runs["ddp"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert preprocess.classes == tuple("0123456789")
    digits = load_dataset("digits", tmp_path, train=False)
    image = Image.fromarray(digits.images[7].permute(1, 2, 0).numpy())
    image.save(tmp_path / "digit.png")
    wanted = preprocess.normalize(digits.images[7:8])[0]
    for same in (tmp_path / "digit.png", str(tmp_path / "digit.png"), image, digits.images[7]):
        assert torch.equal(preprocess(same), wanted)
    assert model(wanted[None]).shape == (1, 10)
    # Another size is resized by its shorter side.
    assert preprocess(image.resize((64, 80))).shape == (3, 32, 32)


def test_images_from_files_are_resized_and_cropped_as_the_run_s_evaluation_does(trained):
    _, preprocess = robust_dist.load(trained.runs["average"])
    path = trained.images / "val" / "bee" / "3.png"
    cropped = CentralCrop(16, 20)(decode_rgb(path.read_bytes()), 0)
    assert torch.equal(preprocess(path), preprocess.normalize(cropped[None])[0])
    assert torch.equal(preprocess(Image.open(path)), preprocess(path))


def test_weights_are_the_same_bits_in_every_engine_s_files(trained, tmp_path):
    source, _ = choose(RunFolder(trained.runs["fsdp2"]), "last")
    wanted = read_weights(source)
    for to, whole in (("ddp", False), ("fsdp", False), ("fsdp", True), ("zero0", False), ("zero1", False)):
        place = tmp_path / f"{to}{whole}"
        convert(source, place, to, 2, full_state_dict=whole)
        found = read_weights(place, wanted)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), to
    convert(source, tmp_path / "zero3", "zero3", 3)
    assert all(torch.equal(value, wanted[key]) for key, value in read_weights(tmp_path / "zero3").items())


def test_of_a_checkpoint_that_no_run_of_ours_wrote_the_weights_are_exported(trained, tmp_path, capsys):
    for number, name in enumerate(("ddp", "fsdp2", "zero2", "zero3")):
        place, _ = choose(RunFolder(trained.runs[name]), "last")
        shutil.copytree(place, tmp_path / name)
        out = tmp_path / f"{number}"
        assert main(["export", str(tmp_path / name), str(out)]) == 0
        model, _ = robust_dist.load(trained.runs[name])
        found, wanted = load_file(out / "model.safetensors"), model.state_dict()
        assert set(found) == set(wanted)
        assert all(torch.equal(found[key].to(value.dtype), value) for key, value in wanted.items())
    assert main(["export", str(tmp_path / "ddp"), str(tmp_path / "0")]) == 2
    assert "already exists" in capsys.readouterr().err
    for more in (["--format", "onnx"], ["--checkpoint", "best"]):
        assert main(["export", str(tmp_path / "ddp"), str(tmp_path / "new"), *more]) == 2
        assert "only the weights can be exported" in capsys.readouterr().err
    next((tmp_path / "ddp").glob("model*")).write_bytes(b"torn")
    assert main(["export", str(tmp_path / "ddp"), str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
    assert main(["evaluate", str(tmp_path / "fsdp2")]) == 2
    assert "has neither a run's recipe.yaml" in capsys.readouterr().err


def test_a_run_with_a_model_and_images_of_your_own_is_loaded_into_that_model(trained, tmp_path):
    run = shutil.copytree(trained.runs["ddp"], tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["name"] = recipe["data"]["name"] = recipe["optimizer"]["name"] = "own"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=r"robust_dist\.load\(RUN, model=\.\.\.\)"):
        robust_dist.load(run)
    wanted, preprocess = robust_dist.load(trained.runs["ddp"])
    for own in (lambda classes: build_model("resnet8", classes), build_model("resnet8", 10)):
        model, same = robust_dist.load(run, model=own)
        assert same.pixels == preprocess.pixels
        assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in model.state_dict().items())


def weights_of(run, checkpoint="last"):
    return read_weights(choose(RunFolder(run), checkpoint)[0])


@pytest.mark.parametrize(("name", "source"), [("average again", "average"), ("fsdp2 again", "fsdp2 bf16")])
def test_a_run_begins_with_the_bits_of_another_and_with_a_new_schedule(trained, name, source):
    run, before = trained.runs[name], trained.runs[source]
    found, wanted = weights_of(run), weights_of(before)
    parameters = [key for key in wanted if "running" not in key and "tracked" not in key]
    assert all(torch.equal(found[key], wanted[key]) for key in parameters)
    assert [path.name for path in sorted(run.glob("checkpoints/step-*"))] == ["step-00000002", "step-00000003"]
    assert f"weights: {before}, step 3, head included" in trained.output[name]


def test_a_run_with_a_moving_average_goes_on_with_the_one_that_it_began_with(trained):
    counts = [int(load_file_of_average(trained.runs[name])["n_averaged"]) for name in ("average", "average again")]
    assert counts == [3, 6]


def load_file_of_average(run):
    return torch.load(choose(RunFolder(run), "last")[0] / "custom_checkpoint_0.pkl", weights_only=True)


def test_under_an_engine_that_shards_the_head_has_a_rate_of_its_own(trained):
    found, before = weights_of(trained.runs["zero3 head"]), weights_of(trained.runs["fsdp2 again"])
    moved = {key for key in before if not torch.allclose(found[key], before[key], rtol=0, atol=1e-7)}
    assert moved == {"head.weight", "head.bias"}


def test_the_moving_average_is_what_is_loaded(trained):
    run = trained.runs["average"]
    model, _ = robust_dist.load(run)
    raw = load_file(choose(RunFolder(run), "last")[0] / "model.safetensors")
    assert not torch.equal(model.state_dict()["fc.weight"], raw["fc.weight"])


@pytest.mark.parametrize(("name", "formats"), [("ddp", "safetensors,torch.export"), ("zero2 bf16", "safetensors")])
def test_an_export_needs_no_run_and_gives_its_outputs_to_the_bit(trained, name, formats, tmp_path):
    run, out = shutil.copytree(trained.runs[name], tmp_path / "run"), tmp_path / "out"
    model, preprocess = robust_dist.load(run)
    assert main(["export", str(run), str(out), "--format", formats]) == 0
    shutil.rmtree(run)
    again, same = robust_dist.load(out)
    images = torch.randint(256, (5, 3, same.pixels.size, same.pixels.size), dtype=torch.uint8)
    inputs = torch.stack([preprocess(image) for image in images])
    assert torch.equal(torch.stack([same(image) for image in images]), inputs)
    wanted = model(inputs)
    assert torch.equal(again(inputs), wanted)
    if "torch.export" in formats:
        program = torch.export.load(out / "model.pt2").module()
        for count in (1, 5):
            torch.testing.assert_close(program(inputs[:count]), wanted[:count], rtol=1e-4, atol=1e-5)
    record, row = json.loads((out / "model.json").read_text()), last_row(trained.runs[name])
    assert record["classes"] == list(preprocess.classes)
    assert record["recipe"]["precision"]["mixed"] == "bf16"
    assert "tracking" not in record["recipe"]
    assert record["robust_dist"] == robust_dist.__version__
    assert record["checkpoint"]["eval_accuracy"] == row["eval_accuracy"]
    assert record["preprocessing"]["size"] == preprocess.pixels.size
    assert evaluation(out, "--out", tmp_path / "new")["accuracy"] == row["eval_accuracy"]


def test_an_onnx_export_gives_the_run_s_outputs(trained, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", str(trained.runs["ddp"]), str(tmp_path / "out"), "--format", "onnx"]) == 0
    model, _ = robust_dist.load(tmp_path / "out")
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for count in (1, 3):
        inputs = torch.randn(count, 3, 32, 32)
        (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(inputs), rtol=1e-3, atol=1e-4)


def test_onnx_without_its_package_is_an_error_that_names_what_to_install(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", str(trained.runs["ddp"]), str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert "pip install 'robust_dist[export]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_and_folders_are_predicted_and_what_is_no_image_is_named(trained, tmp_path, capsys):
    run, folder = trained.runs["average"], shutil.copytree(trained.images / "val", tmp_path / "pictures")
    (folder / "bee" / "torn.png").write_bytes((folder / "bee" / "0.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no image")
    words = ["predict", str(run), str(folder), "--top-k", "2", "--format", "jsonl", "--batch-size", "7"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "torn.png" in said.err
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["path"] for row in rows] == [str(folder / name / f"{i}.png") for name in CLASSES for i in range(6)]
    model, preprocess = robust_dist.load(run)
    for row in rows[::5]:
        chances = model(preprocess(row["path"])[None]).softmax(1)[0]
        best = [CLASSES[number] for number in chances.argsort(descending=True)[:2]]
        assert [one["class"] for one in row["top"]] == best
        assert row["class"] == best[0]
        assert row["probability"] == pytest.approx(chances.max().item(), rel=1e-4)


def test_predictions_are_written_as_csv_and_as_a_picture_and_never_over_a_file(trained, tmp_path, capsys):
    run, image = str(trained.runs["ddp"]), str(trained.images / "val" / "cat" / "1.png")
    out, sheet = tmp_path / "found.csv", tmp_path / "sheet.png"
    words = ["predict", run, image, "--format", "csv", "--top-k", "2", "--out", str(out), "--contact-sheet", str(sheet)]
    assert main(words) == 0
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert row["path"] == image
    assert float(row["probability_1"]) >= float(row["probability_2"]) > 0
    assert sheet.read_bytes()[:4] == b"\x89PNG"
    before = out.read_bytes()
    assert main(words) == 2
    assert "found.csv" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["predict", run, image]) == 0
    assert capsys.readouterr().out.startswith(f"{image}  {row['class_1']} ")


def test_a_folder_of_classes_is_evaluated_as_the_run_s_own_images(trained, tmp_path):
    run = trained.runs["fsdp2 bf16"]
    wanted = last_row(run)["eval_accuracy"]
    found = evaluation(run, trained.images / "val", "--out", tmp_path / "a")
    assert (found["accuracy"], found["images"], found["logged_accuracy"]) == (wanted, 24, None)
    # The same images elsewhere are still the run's own.
    moved = shutil.copytree(trained.images, tmp_path / "images")
    found = evaluation(run, "--data.root", moved, "--out", tmp_path / "b")
    assert (found["accuracy"], found["logged_accuracy"]) == (wanted, wanted)
    found = evaluation(run, "--data.eval=train", "--out", tmp_path / "c")
    assert (found["images"], found["logged_accuracy"]) == (48, None)


def test_an_image_that_cannot_be_read_is_named_and_does_not_count(trained, tmp_path, capsys):
    folder = shutil.copytree(trained.images / "val", tmp_path / "val")
    (folder / "dog" / "2.png").write_bytes(b"\x89PNG")
    found = evaluation(trained.runs["average"], folder, "--out", tmp_path / "new")
    assert found["images"] == 23
    assert found["unreadable"][0]["where"] == str(folder / "dog" / "2.png")
    assert "dog/2.png" in capsys.readouterr().out


def test_an_evaluation_is_written_beside_the_run_and_never_over_another(trained, tmp_path, capsys):
    run = shutil.copytree(trained.runs["ddp"], tmp_path / "run")
    assert main(["evaluate", str(run)]) == 0
    assert (run / "evaluation-12" / "evaluation.txt").read_text() in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 2
    assert "evaluation-12 already exists; choose another folder with --out DIR" in (capsys.readouterr().err)
    assert main(["evaluate", str(run), str(tmp_path / "nowhere")]) == 2
    assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_an_evaluation_of_other_images_has_a_folder_of_its_own_beside_the_run(trained, tmp_path, capsys):
    run = shutil.copytree(trained.runs["average"], tmp_path / "run")
    assert main(["evaluate", str(run)]) == 0
    assert main(["evaluate", str(run), str(trained.images / "val")]) == 0
    assert len(list(run.glob("evaluation-*"))) == 2
    assert len(list(run.glob("evaluation-*-val"))) == 1


def test_the_expected_calibration_error_is_the_mean_gap_over_15_bins():
    confidence = torch.tensor([0.95, 0.96, 0.5, 0.5, 1 / 15], dtype=torch.float64)
    correct = torch.tensor([True, False, True, False, False])
    # Two images at 0.955 on average of which half are right, two at 0.5 of which half are right, one at 1/15.
    wanted = (2 * (0.955 - 0.5) + 0 + 1 / 15) / 5
    assert math.isclose(calibration_error(confidence, correct), wanted)


def test_the_best_checkpoint_is_that_of_the_highest_logged_accuracy_and_the_last_the_newest(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    for step, accuracy in ((5, None), (10, 0.9), (20, 0.8), (25, None)):
        (store.begin(step) / "weights").write_text("0")
        store.commit(step, {"eval_accuracy": accuracy})
    run = RunFolder(tmp_path)
    assert choose(run, "best")[1].step == 10
    assert choose(run, "last")[1].step == 25
    assert choose(run, 20)[1].step == choose(run, "20")[1].step == 20
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; there are those of step 5, 10, 20, 25"):
        choose(run, 7)
    with pytest.raises(ValueError, match="'newest' is not last, best or a step"):
        choose(run, "newest")


def torn(run):
    path = sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def without(name):
    def remove(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (torn, "model.safetensors: missing, short or changed since it was written; name another checkpoint"),
        (without("checkpoints"), "has no checkpoint yet"),
        (without("data.json"), "has no data.json, which names the classes"),
        (without("recipe.yaml"), "has neither a run's recipe.yaml nor an export's model.json"),
    ],
)
def test_a_run_that_cannot_be_used_says_why_in_one_message(trained, tmp_path, damage, said):
    run = shutil.copytree(trained.runs["ddp"], tmp_path / "run")
    damage(run)
    with pytest.raises(ValueError, match=said):
        robust_dist.load(run)


def test_a_folder_inside_a_run_is_told_from_the_run(trained, tmp_path):
    run = trained.runs["ddp"]
    with pytest.raises(ValueError, match=f"it belongs to a run: name {run}"):
        robust_dist.load(run / "checkpoints")
    with pytest.raises(ValueError, match="there is no such folder"):
        robust_dist.load(tmp_path / "nothing")


def test_what_a_schedule_free_optimizer_trains_is_not_taken_for_what_is_evaluated(trained):
    with pytest.raises(CheckpointError, match=r"saved within an epoch, so it holds the weights that .* trains"):
        robust_dist.load(trained.runs["schedule-free"], checkpoint=2)
    robust_dist.load(trained.runs["average"], checkpoint=2)


def test_wrong_images_are_refused_with_what_would_be_right(trained, tmp_path, capsys):
    _, preprocess = robust_dist.load(trained.runs["ddp"])
    with pytest.raises(ValueError, match=r"must be uint8 \[3, H, W\], got uint8 \[1, 32, 32\]"):
        preprocess(torch.zeros(1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="got float32"):
        preprocess(torch.zeros(3, 32, 32))
    (tmp_path / "no.png").write_text("no image")
    with pytest.raises(ValueError, match=r"no\.png: not an image"):
        preprocess(tmp_path / "no.png")
    run, folder = str(trained.runs["average"]), shutil.copytree(trained.images / "val", tmp_path / "val")
    (folder / "bee").rename(folder / "wasp")
    words = ["--out", str(tmp_path / "new")]
    for named, said in [
        ([run, str(folder)], "lacks 'bee' and also has 'wasp'"),
        ([run, str(tmp_path / "none")], "there is no folder"),
        ([run, str(folder), "--data.root", "x"], "both name images"),
        ([run, "--data.rot", "x"], "did you mean '--data.root'"),
        ([str(trained.runs["ddp"]), "--data.name", "fashion_mnist", "--data.download", "false"], "ashion"),
    ]:
        assert main(["evaluate", *named, *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert not (tmp_path / "new").exists()
    assert main(["predict", run, str(tmp_path / "nowhere.png")]) == 2
    assert "nowhere.png: there is no such file" in capsys.readouterr().err


def test_evaluation_images_that_have_changed_are_told(trained, tmp_path, capsys):
    moved = shutil.copytree(trained.images, tmp_path / "images")
    run = shutil.copytree(trained.runs["average"], tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(trained.images), str(moved)))
    (moved / "val" / "ant" / "0.png").unlink()
    assert main(["evaluate", str(run)]) == 2
    assert "evaluating on 24 images" in capsys.readouterr().err


def test_a_run_s_last_line_names_the_next_command_and_the_data_by_their_path(trained):
    run = trained.runs["average"]
    lines = trained.output["average"].splitlines()
    assert lines[-1] == f"use it: robust-dist evaluate {run}; robust-dist predict {run} IMAGE ..."
    assert f"24 held-out images of {trained.images}" in lines[-3]
    assert "359 held-out images of digits" in trained.output["ddp"]


@pytest.mark.parametrize("name", ["zero2 bf16", "zero3"])
def test_early_stopping_ends_every_rank_after_the_same_epoch_and_saves_it(trained, name, capsys):
    run = trained.runs[name]
    assert [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert choose(RunFolder(run), "last")[1].step == last_row(run)["step"]
    said = trained.output[name]
    assert "stopped early: eval_accuracy has not improved by more than 1 for 1 epoch; its best value, " in said
    assert "held-out images of" in said
    assert ", in epoch 2 of 5\n" in said
    assert said.count("warning: early_stopping.patience=1: the learning rate's decay") == 1
    main(["runs", str(run)])
    assert "  stopped early  2/5 " in capsys.readouterr().out


def test_runs_that_differ_in_their_length_and_start_say_so_in_table_and_legend():
    rows = [{"epoch": epoch, "eval_accuracy": epoch / 10} for epoch in (1, 2)]
    own = [
        {"init_from": None, "model.weights": None, "optimizer.name": "adamw", "optimizer.lr": 0.1},
        {"init_from": "runs/" + "a_long_name_" * 20, "model.weights": None, "optimizer.name": "sgd", "optimizer.lr": 1},
        {"init_from": None, "model.weights": "DEFAULT", "optimizer.name": "lion", "optimizer.lr": 1e-3},
    ]
    runs = [Run(f"{n}" * 30, "finished", {"epochs": 2 + n, **recipe}, rows) for n, recipe in enumerate(own)]
    head, first, *_ = table(runs).splitlines()
    assert head.split()[2:] == ["epochs", "best", "last", "top-5", "images/s", *own[0]]
    assert first.split()[-4:] == ["null", "null", "adamw", "0.1"]
    figure = figure_of(runs)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    said = " ".join(text.get_text() for text in legend.get_texts())
    assert all(word in said for word in ("epochs=3", "init_from=null", "model.weights=DEFAULT", "optimizer.lr=0.001"))
    low, high = legend.get_window_extent().get_points()
    assert 0 <= low[0] < high[0] <= figure.bbox.width
    assert 0 <= low[1] < high[1] <= figure.bbox.height / 2


def test_runs_below_a_folder_are_listed_with_what_became_of_them_and_in_what_they_differ(trained, tmp_path, capsys):
    for name in ("ddp", "zero2"):
        shutil.copytree(trained.runs[name], tmp_path / "group" / name)
    (tmp_path / "group" / "zero2" / "metrics.jsonl").unlink()
    picture = tmp_path / "curves.png"
    assert main(["runs", str(tmp_path), "--plot", str(picture)]) == 0
    head, first, second, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "epochs", "best", "last", "top-5", "images/s", "precision.mixed"]
    accuracy = f"{last_row(trained.runs['ddp'])['eval_accuracy']:.2%}"
    assert first.split()[:5] == ["group/ddp", "finished", "1/1", accuracy, accuracy]
    assert first.split()[-1] == "bf16"
    assert second.split() == ["group/zero2", "stopped", "0/1", "-", "-", "-", "-", "no"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    claim = FolderClaim(tmp_path / "group" / "zero2")
    claim.take()
    try:
        main(["runs", str(tmp_path)])
        assert "running" in capsys.readouterr().out.splitlines()[2]
    finally:
        claim.release()
    assert main(["runs", str(tmp_path / "nowhere")]) == 2

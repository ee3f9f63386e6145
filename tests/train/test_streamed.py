"""Every recipe for streamed sets on a tiny set of its format: whole and killed runs, on one rank and on two."""

import contextlib
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.data.tiny_sets import bad_images
from tests.engines.matrix import assert_passed, run_scenarios
from tests.ranks import run_ranks
from tests.train import streamed
from tests.train.streamed import EPOCHS, EVAL, STEPS, N, by_step, cut_back, on_first_rank, rows, run, steps
from tests.versions import TORCH_2_7

pytest.importorskip("datasets")
# Its evaluation images are split off; test_every_recipe.py trains it.
SPLIT = {"imagefolder_small"}
RECIPES = [name for name in streamed.recipes("") if name not in SPLIT]
FORMATS = ["imagefolder", "imagenet_resnet50_shards", "hub", "hub, streaming"]
SAME_ON_ONE = ["imagefolder", "hub, streaming"]
# ZeRO last: DeepSpeed changes functions of torch when it is first used.
SHARDED = ["fsdp1", *["fsdp2"] * TORCH_2_7, "zero2"]
BAD = 5


def weights(run_dir):
    return load_file(Path(run_dir, "checkpoints", f"step-{EPOCHS * STEPS:08d}", "model.safetensors"))


def same_weights(run_dir, other):
    ours, theirs = weights(run_dir), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def trains(recipe, sets, folder):
    log = Path(f"{folder}/{recipe}.{dist.get_rank()}.log")
    out = run(recipe, sets, f"{folder}/{recipe}", log=log)
    found = rows(f"{folder}/{recipe}")
    assert [row["step"] for row in found] == [STEPS, 2 * STEPS], out
    assert [(row["eval_samples"], row["bad_images"], row["eval_bad_images"]) for row in found] == [(EVAL, 0, 0)] * 2
    dist.barrier()
    read = [streamed.logged(Path(f"{folder}/{recipe}.{rank}.log")) for rank in range(dist.get_world_size())]
    assert sorted(chain(*read)) == sorted(list(range(N)) * EPOCHS)
    assert all(len(one) == N * EPOCHS / len(read) for one in read)


def goes_on(recipe, sets, folder, *words):
    """A run killed in mid-epoch ends like an undisturbed one, and reads only what is left."""
    whole, killed = f"{folder}/{recipe}", f"{folder}/{recipe} killed"
    on_first_rank(lambda: (shutil.copytree(whole, killed), cut_back(killed, 6)))
    log = Path(f"{killed}.{dist.get_rank()}.log")
    out = run(recipe, sets, killed, *words, log=log)
    assert dist.get_rank() or "at step 6 of 8" in out, out
    assert rows(killed) == rows(whole)
    assert same_weights(killed, whole)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if not words:
        assert by_step(Path(f"{folder}/{recipe}.{rank}.log"), world_size)[6:] == [
            streamed.logged(log)[:8],
            streamed.logged(log)[8:],
        ]


def with_bad(sets, folder):
    """A copy of the image folder with spoiled images."""
    shutil.copytree(f"{sets}/folder", folder)
    content = [*bad_images().values()]
    for part, count in {"train": BAD, "val": 2}.items():
        for number, path in enumerate(sorted(Path(folder, part).rglob("*.jpg"))[:: N // BAD // 2][:count]):
            path.write_bytes(content[number])


def skips_bad(sets, folder):
    bad, run_dir = ["--data.root", f"{folder}/bad", "--data.max_bad_share", "0.2"], f"{folder}/imagefolder bad"
    on_first_rank(lambda: with_bad(sets, f"{folder}/bad"))
    with weights_seen() as seen:
        out = run("imagefolder", sets, run_dir, *bad)
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, sum(int((one == 0).sum()) for one in seen))
    assert sum(ranks) == BAD * EPOCHS
    named = Path(run_dir, "bad_images.txt").read_text().splitlines()
    assert len(named) == len({line.partition("\t")[0] for line in named}) == BAD + 2, out
    assert all(line.startswith(f"{folder}/bad/") and "\t" in line for line in named)
    counts = [(row["bad_images"], row["eval_bad_images"], row["eval_samples"]) for row in rows(run_dir)]
    assert counts == [(BAD, 2, EVAL - 2)] * EPOCHS
    assert dist.get_rank() or "images could not be read (see" in out
    dist.barrier()
    on_first_rank(lambda: (shutil.copytree(run_dir, f"{run_dir} killed"), cut_back(f"{run_dir} killed", 6)))
    run("imagefolder", sets, f"{run_dir} killed", *bad)
    assert rows(f"{run_dir} killed") == rows(run_dir)
    assert same_weights(f"{run_dir} killed", run_dir)


@contextlib.contextmanager
def weights_seen():
    """The weights passed to the training loss, step by step."""
    from robust_dist.train import step

    seen, real = [], step.summed_loss

    def noting(logits, targets, weights, label_smoothing):
        seen.extend([] if weights is None else [weights])
        return real(logits, targets, weights, label_smoothing)

    step.summed_loss = noting
    try:
        yield seen
    finally:
        step.summed_loss = real


def under_engine(engine, sets, folder):
    """DDP's run with bad images, sharded; under FSDP2, killed in mid-epoch, it ends like the undisturbed one."""
    bad = ["--data.root", f"{folder}/bad", "--data.max_bad_share", "0.2"]
    whole, killed = f"{folder}/imagefolder {engine}", f"{folder}/imagefolder {engine} killed"
    run("imagefolder", sets, whole, *bad, engine=engine)
    for mine, theirs in zip(rows(whole), rows(f"{folder}/imagefolder bad"), strict=True):
        assert all(mine[key] == pytest.approx(value, rel=1e-4) for key, value in theirs.items()), (mine, theirs)
    if engine != "fsdp2":
        return
    on_first_rank(lambda: (shutil.copytree(whole, killed), cut_back(killed, 6)))
    out = run("imagefolder", sets, killed, *bad, engine=engine)
    assert dist.get_rank() or "at step 6 of 8" in out, out
    assert rows(killed) == rows(whole)


def too_many_bad(sets, folder):
    """Two of 52 are more than 2 %, whichever of the five come first."""
    run_dir, root = f"{folder}/too bad", f"{folder}/bad training images"

    def prepare():
        shutil.copytree(f"{folder}/bad/train", f"{root}/train")
        shutil.copytree(f"{sets}/folder/val", f"{root}/val")

    on_first_rank(prepare)
    words = ["--data.root", root, "--data.max_bad_share", "0.02"]
    out = run("imagefolder", sets, run_dir, *words, fails=True)
    assert dist.get_rank() or "of 52 images could not be read, more than data.max_bad_share=0.02" in out, out
    assert dist.get_rank() or f"{run_dir}/bad_images.txt" in out
    assert Path(run_dir, "metrics.jsonl").read_text() == ""
    assert 0 < max(steps(run_dir)) < STEPS
    assert 2 <= len(Path(run_dir, "bad_images.txt").read_text().splitlines()) <= BAD


def another_set(sets, folder):
    """One more image means another order, the rest of which a run cannot use."""
    run_dir, more = f"{folder}/another set", f"{folder}/more"

    def prepare():
        shutil.copytree(f"{folder}/imagefolder", run_dir)
        cut_back(run_dir, 6)
        shutil.copytree(f"{sets}/folder", more)
        image = next(Path(more, "train").rglob("*.jpg"))
        shutil.copy(image, image.with_name("more.jpg"))

    on_first_rank(prepare)
    out = run("imagefolder", sets, run_dir, "--data.root", more, fails=True)
    assert dist.get_rank() or f"training on {N} images, but {more}/train has {N + 1}" in out, out
    assert max(steps(run_dir)) == 6


def hosts_differ():
    from accelerate import Accelerator

    from robust_dist.data.decode import CentralCrop
    from robust_dist.data.stream_set import StreamSet
    from robust_dist.train.sources import check_ranks_see_the_same
    from tests.data.coloured import Coloured
    from tests.train.under_engines import engine

    def opened(*sizes):
        return StreamSet(Coloured(*sizes), CentralCrop(4, 4), torch.device("cpu"))

    with engine("ddp"):
        Accelerator(cpu=True)
        check_ranks_see_the_same(opened(3, 4), opened(5))
        for sizes, differ in (([(7, 4), (7, 3)], "images: rank 0: 11; rank 1: 10"), ([(7, 4), (4, 7)], "checksum: ")):
            with pytest.raises(ValueError, match=rf"the same images in coloured.*\n  {differ}"):
                check_ranks_see_the_same(opened(5), opened(*sizes[dist.get_rank()]))


def on_two(sets, folder):
    scenarios = {f"trains {one}": lambda one=one: trains(one, sets, folder) for one in RECIPES}
    scenarios |= {f"goes on {one}": lambda one=one: goes_on(one, sets, folder) for one in FORMATS}
    scenarios["skips bad"] = lambda: skips_bad(sets, folder)
    scenarios["too many bad"] = lambda: too_many_bad(sets, folder)
    scenarios["another set"] = lambda: another_set(sets, folder)
    scenarios["hosts differ"] = hosts_differ
    scenarios |= {one: lambda one=one: under_engine(one, sets, folder) for one in SHARDED}
    return run_scenarios(scenarios)


def same_on_one(recipe, sets, folder, two):
    """One rank takes the same steps over the same batches, to the same metrics within rounding."""
    log = Path(f"{folder}/{recipe}.log")
    run(recipe, sets, f"{folder}/{recipe}", log=log)
    ranks = [by_step(Path(f"{two}/{recipe}.{rank}.log"), 2) for rank in range(2)]
    assert by_step(log) == [first + second for first, second in zip(*ranks, strict=True)]
    for mine, theirs in zip(rows(f"{folder}/{recipe}"), rows(f"{two}/{recipe}"), strict=True):
        assert all(mine[key] == pytest.approx(value, rel=1e-4) for key, value in theirs.items()), (mine, theirs)


def one_takes_up(recipe, sets, folder, two):
    """One rank resumes a run of two in mid-epoch, and reads the rest, each image once."""
    taken = f"{folder}/{recipe} taken"
    shutil.copytree(f"{two}/{recipe}", taken)
    cut_back(taken, 2)
    log = Path(f"{taken}.log")
    out = run(recipe, sets, taken, log=log)
    assert "at step 2 of 8" in out, out
    ranks = [by_step(Path(f"{two}/{recipe}.{rank}.log"), 2) for rank in range(2)]
    whole = [first + second for first, second in zip(*ranks, strict=True)]
    read = streamed.logged(log)
    assert read == [*chain(*whole[2:])]
    assert sorted([*chain(*whole[:2]), *read]) == sorted(list(range(N)) * EPOCHS)
    for mine, theirs in zip(rows(taken), rows(f"{two}/{recipe}"), strict=True):
        assert all(mine[key] == pytest.approx(value, rel=1e-4) for key, value in theirs.items()), (mine, theirs)


def on_one(sets, folder, two):
    scenarios = {f"same {one}": lambda one=one: same_on_one(one, sets, folder, two) for one in SAME_ON_ONE}
    scenarios |= {f"taken {one}": lambda one=one: one_takes_up(one, sets, folder, two) for one in SAME_ON_ONE}
    scenarios["workers"] = lambda: goes_on("imagefolder", sets, folder, "--data.workers", "1")
    return run_scenarios(scenarios)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [str(tmp_path_factory.mktemp(name)) for name in ("sets", "two", "one")]
    streamed.write_sets(made[0])
    return made


@pytest.fixture(scope="module")
def two(folders):
    return run_ranks(on_two, 2, folders[0], folders[1], timeout=120.0)


@pytest.fixture(scope="module")
def one(folders, two):
    return run_ranks(on_one, 1, folders[0], folders[2], folders[1], timeout=120.0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_end_to_end_and_each_epoch_reads_every_image_once(two, recipe):
    assert_passed(two, f"trains {recipe}")


def test_every_recipe_for_streamed_sets_is_run():
    from robust_dist.train.recipe import load_recipe

    shipped = {path.stem for path in Path(streamed.ROOT, "configs", "recipes").glob("*.yaml")}
    found = {name for name in shipped if load_recipe(f"{streamed.ROOT}/configs/recipes/{name}.yaml").data.streamed}
    assert found == SPLIT | {recipe.partition(",")[0] for recipe in RECIPES}


@pytest.mark.parametrize("recipe", FORMATS)
def test_a_run_killed_in_mid_epoch_goes_on_bit_for_bit_and_reads_only_the_rest(two, recipe):
    assert_passed(two, f"goes on {recipe}")


@pytest.mark.parametrize("recipe", SAME_ON_ONE)
def test_one_rank_takes_the_same_global_batches_as_two(one, recipe):
    assert_passed(one, f"same {recipe}")


@pytest.mark.parametrize("recipe", SAME_ON_ONE)
def test_a_run_taken_up_at_another_world_size_reads_the_rest_exactly_once(one, recipe):
    assert_passed(one, f"taken {recipe}")


def test_workers_do_not_change_a_run(one):
    assert_passed(one, "workers")


def test_bad_images_are_counted_named_and_left_out_also_over_a_kill(two):
    assert_passed(two, "skips bad")


@pytest.mark.parametrize("engine", SHARDED)
def test_a_sharded_run_is_ddp_s_and_goes_on_with_bad_images_among_what_it_reads(two, engine):
    pytest.importorskip("deepspeed")
    assert_passed(two, engine)


def test_too_many_bad_images_are_an_error_on_every_rank_before_anything_is_recorded(two):
    assert_passed(two, "too many bad")


def test_ranks_that_see_different_files_are_told_so(two):
    assert_passed(two, "hosts differ")


def test_a_run_does_not_go_on_with_another_number_of_images(two):
    assert_passed(two, "another set")

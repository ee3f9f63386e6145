"""The benchmark of whole training steps."""

import pytest

from tests.ranks import run_ranks

SMALL = {"models": ["resnet8"], "batch": 8, "rounds": 1, "threads": 1, "device": "cpu"}


def bench(folder):
    from robust_dist.bench import train

    found, run = [], train.run
    train.run = lambda **settings: found.append(run(**settings)) or found[0]  # in a process of its own
    return train.bench_train(**SMALL, cuda_graph=True, out=folder), found[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return run_ranks(bench, 1, str(folder), timeout=300.0)[0], folder


def test_every_way_of_augmenting_has_its_row_and_its_share(made):
    rows = {row.augmentation: row for row in made[0][1].rows}
    assert {"none", "torch"} <= set(rows)
    for row in rows.values():
        assert row.share == row.alone.median / row.timing.median
        assert 0 < row.share < 1
        assert row.to_none == rows["none"].timing.median / row.timing.median


def test_the_table_is_printed_and_written_with_a_picture_and_says_what_there_is_not(made):
    (text, _), folder = made
    assert "| model | augmentation | images/s | slowest to fastest |" in text
    assert "| resnet8 | none |" in text
    assert "- left out: the whole step as a CUDA graph: there is no GPU" in text
    assert (folder / "train.md").read_text() == text + "\n"
    assert (folder / "train.png").read_bytes().startswith(b"\x89PNG")


def untrainable():
    from robust_dist.bench.train import run

    with pytest.raises(ValueError, match="resnet7 cannot be trained here: unknown model"):
        run(**SMALL | {"models": ["resnet7"]})


def test_a_model_that_cannot_be_trained_is_an_error_that_names_it():
    run_ranks(untrainable, 1, timeout=300.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch=0 is below 1"),
        ({"rounds": 0}, "rounds=0 is below 1"),
        ({"precision": "fp8"}, "precision must be"),
        ({"models": []}, "models must name"),
        ({"device": "tpu9"}, "device='tpu9'"),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(settings, message):
    from robust_dist.bench.train import run

    with pytest.raises(ValueError, match=message):
        run(**settings)

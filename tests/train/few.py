"""The first images of the digits, as `fit` takes them: a run of seconds."""

from robust_dist.data import load_dataset


def few_digits(training: int, evaluation: int) -> dict:
    """So many images to train and to evaluate on, by `fit`'s names."""
    found = {}
    for name, count in (("train_set", training), ("eval_set", evaluation)):
        whole = load_dataset("digits", "data", train=name == "train_set")
        found[name] = type(whole)(whole.images[:count], whole.labels[:count], whole.classes, whole.name)
    return found

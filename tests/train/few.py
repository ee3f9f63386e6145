"""The first images of the digits, in `fit`'s form: a run of seconds."""

from robust_dist.data import load_dataset


def few_digits(training: int, evaluation: int) -> dict:
    """This many training and evaluation images, by `fit`'s argument names."""
    found = {}
    for name, count in (("train_set", training), ("eval_set", evaluation)):
        whole = load_dataset("digits", "data", train=name == "train_set")
        found[name] = type(whole)(whole.images[:count], whole.labels[:count], whole.classes, whole.name)
    return found

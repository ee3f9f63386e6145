"""The engines: what each one does to optimizers, schedules and checkpoints, in a file or folder of its own."""

from robust_dist.engines.accelerate_scheduler import is_copy
from robust_dist.schedule.repeated_calls import add_test

add_test(is_copy)

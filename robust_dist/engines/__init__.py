"""One file per engine: what it does to optimizers, schedules and checkpoints."""

"""Recipe, loop, evaluation."""

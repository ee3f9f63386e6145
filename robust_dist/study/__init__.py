"""Studies: a grid of recipes and seeds, shared by any number of workers, and a report of it."""

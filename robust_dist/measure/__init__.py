"""The cost of work: operators, memory, arithmetic, the rates of GPUs, and the tables that show it."""

"""What work costs: operators, memory, arithmetic, the rates of GPUs, and the tables that show it."""

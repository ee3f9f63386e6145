"""Communication of ranks: shared values, decisions and errors, votes without waiting, claims on folders."""

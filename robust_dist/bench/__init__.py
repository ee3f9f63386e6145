"""Speed compared with the peers and the machine's limit, measured in one run."""

"""`robust-dist verify`: whether the package works correctly on this machine, and how fast.

Run `robust-dist verify` on one machine, or `accelerate launch ... -m robust_dist.verify` on the ranks of a job.
"""

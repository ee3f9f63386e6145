"""`robust-dist verify`: whether the package is right, and how fast, on the machine at hand.

Run `robust-dist verify` on one machine, or `accelerate launch ... -m robust_dist.verify` on the ranks of a job.
"""

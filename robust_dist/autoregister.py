"""Importing this module calls `robust_dist.register()`, for places that can import but not call."""

from robust_dist.engines import register

register()

"""`import robust_dist.autoregister` does what `robust_dist.register()` does, where no function can be called."""

from robust_dist.engines import register

register()

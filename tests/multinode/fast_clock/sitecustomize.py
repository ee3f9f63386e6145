"""Found first on the PYTHONPATH of a host under faketime, which breaks the call that Python's own sleep makes."""

import select
import time

time.sleep = lambda seconds: select.select([], [], [], seconds)

"""Python imports this first, in every process whose PYTHONPATH names this folder: the clock shows another time of day.

The clock that measures how long something takes runs as ever, as on a host with a wrong date.
"""

import os
import time

_SHIFT = int(os.environ["CLOCK_SHIFT"])  # seconds
_time, _time_ns = time.time, time.time_ns

time.time = lambda: _time() + _SHIFT
time.time_ns = lambda: _time_ns() + _SHIFT * 10**9

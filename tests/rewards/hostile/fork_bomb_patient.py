"""Forks whenever it may again, each child sleeping."""

# ends as: processes, crash, time-out, wrong, memory
# memory: what the kernel has not freed yet of forks that it refused counts as the program's
import os
import time

while True:
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError:
        pass

"""Forks without end."""

# ends as: processes, crash, time-out, memory
# memory: what the kernel has not freed yet of forks that it refused counts as the program's
import os

while True:
    os.fork()

"""Sends every signal to the first process of its namespaces, the sandbox's own."""

# ends as: wrong
import os
import signal
import time

if os.getpid() < 10:  # else there is no such namespace, and 1 would be the machine's
    for number in signal.valid_signals():
        try:
            os.kill(1, number)
        except OSError:
            pass
    time.sleep(0.1)
print("alive")

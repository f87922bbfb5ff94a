"""Takes a name that is no text, which whoever counts processes reads, and stays to be counted."""

# ends as: time-out
import ctypes
import time

ctypes.CDLL(None).prctl(15, b"\xff) Z 1 \xfe\n", 0, 0, 0)
time.sleep(60)

"""The right answer with a failure."""

# ends as: crash
import os
import sys

print(5)
sys.stdout.flush()
os._exit(3)

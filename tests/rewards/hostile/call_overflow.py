"""Answers by the channel itself, with a number that is beyond floats."""

# ends as: wrong
import os
import struct


def add(a, b):
    answer = b'V{"t":"float","v":1' + b"0" * 400 + b"}"
    os.write(3, struct.pack(">I", len(answer)) + answer)
    return 5

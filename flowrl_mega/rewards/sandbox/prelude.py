"""What LiveCodeBench puts before a program, and others with it: LeetCode writes List without importing it."""

STARRED = """string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys
json builtins typing""".split()
TEXT = "".join(f"from {name} import *\n" for name in STARRED) + f"import {', '.join(STARRED)}\n"
DIGITS = "import sys\ngetattr(sys, 'set_int_max_str_digits', id)(50000)\n"  # of a number; Python's own limit is 4300
TEXT += f"{DIGITS}sys.setrecursionlimit(50000)\n"

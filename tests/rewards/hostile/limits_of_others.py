"""Reads the limits of its namespaces' init, as it could lower them: no CPU time left would end it."""

# ends as: wrong
import os
import resource

try:
    print(5 if resource.prlimit(os.getppid(), resource.RLIMIT_CPU) else "")
except PermissionError:
    print("refused", resource.getrlimit(resource.RLIMIT_CPU), resource.prlimit(0, resource.RLIMIT_CPU))

"""`flowrl-mega eval`: any policy on benchmarks, every answer kept, graded again whenever one likes."""

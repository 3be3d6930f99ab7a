"""The benchmark: subjects, ours and others', measured in one run and counted in the same bytes.

``semid bench`` runs it; ``docs/benchmarks.md`` says what it measures and how.
"""

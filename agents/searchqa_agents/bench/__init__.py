"""The benchmark: suites of tasks, jobs that train on them, results files and what they say together."""

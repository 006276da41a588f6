"""The toy world and its report, benchmarks, a plan of memory and time, a look at data."""

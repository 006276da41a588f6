"""The toy world, its report, and the benchmarks."""

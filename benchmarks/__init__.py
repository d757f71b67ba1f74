"""One script for each table of BENCHMARKS.md."""

"""One file per claim: `python -m benchmarks.<name> [--short] [--json FILE] [--corpus PATH]`."""

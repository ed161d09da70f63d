"""The worker: claims jobs, moves them through a backend, writes results back. Knows no HTTP."""

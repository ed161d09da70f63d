"""The truth: jobs, keys and finished pictures, kept where a crash cannot reach them.

Knows SQL and files. Knows nothing of HTTP, tensors, settings or what a job's input means.
"""

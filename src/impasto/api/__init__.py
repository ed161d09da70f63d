"""The HTTP service: requests become rows of the job store, rows become answers.

Knows HTTP, JSON and the store's interface. Knows nothing of tensors, models on disk or how a picture is made.
"""

"""Whether a picture or a prompt may pass: checkers, what becomes of flagged pictures, the operator's deny-list.

Knows pictures, prompts and weights of checkers. Knows no jobs, requests of the API or settings; the worker asks it.
"""

"""The recipe of the built-in model: fetch art, prepare it, train, export, evaluate.

Nothing in the package ``impasto`` imports this one; it only leaves files where ``impasto`` finds them.
"""

"""The second edition of the built-in model: hundreds of subjects, three styles, scenes, one course for each machine.

Stands beside the first edition, whose weights still ship, and takes from it what did not change (the shapes of the
networks, the linear start, the team, the checkpoints). Nothing in ``impasto`` imports it.
"""

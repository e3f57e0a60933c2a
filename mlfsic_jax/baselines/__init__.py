"""The peers: one file each, one interface.

A baseline is a pure function ``(support, labels, query) -> scores``: float [S, n], bool [S, C], float [Q, n] ->
float [Q, C], whose scores read as probabilities where 0.5 is the decision threshold.
"""

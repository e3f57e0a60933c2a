"""The peers: one file each, one interface.

A baseline is a pure function ``(support, labels, query) -> scores``: float [S, n], bool [S, C], float [Q, n] ->
float [Q, C], higher for likelier labels, with the decision threshold at 0.5.
"""

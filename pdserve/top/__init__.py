"""A live view of a cluster: what `pdserve top` shows.

Watch (a router, a decode worker) ──▶ Cluster: rows, rates from counters ──▶ screen: rich
"""

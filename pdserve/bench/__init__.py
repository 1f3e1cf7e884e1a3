"""A load generator for routers: what `pdserve bench` runs. docs/bench.md defines every figure.

workload, arrivals ──▶ load ──▶ following ──▶ Sent ──▶ figures ──▶ tables, report, picture, comparison
                       └────── in processes of their own ──────┘
"""

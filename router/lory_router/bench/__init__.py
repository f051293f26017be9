"""`lory bench`: load on a running server, and figures of what came back.

    workload (what is asked) -> load, client (asking) -> figures (numbers) -> command (table, JSON)

It must not know torch, or how the server it measures works.
"""

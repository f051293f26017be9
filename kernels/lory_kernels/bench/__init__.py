"""`python -m lory_kernels.bench`: every op alone, against its limit, its reference and its peers.

    shapes, popularity                      what is asked of an op
    sgmv, linears, nf4, attention,
    elementwise                             its cases: inputs, work, contenders
    peers, peer_vllm, peer_sglang, foreign  others' kernels, from a folder given by the caller
    limits, clock                           what the machine can do; how long a call takes
    measure, run, table                     correctness first, then time; one table, one JSON

It must not know servers, schedules or adapters' files.
"""

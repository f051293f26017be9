"""Where adapters come from when they are not in the local folder: named, fetched, kept, shared.

    reference -> access (may this caller read it, which revision) -> disk (is it here)
              -> flight -> download (hub, s3, web) -> disk -> a name that the engine knows

Everything runs on the router's event loop, the slow parts of a disk in threads.
"""

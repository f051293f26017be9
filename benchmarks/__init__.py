"""Measurements of Lory and of what people would use instead; results lie in `results`."""

import logging

# bitsandbytes warns at import of kernels it could fetch; what runs here is its own library.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

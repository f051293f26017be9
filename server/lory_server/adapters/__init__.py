"""Adapters: is it valid (config, format), which bytes (store), where are they now (cache)."""

"""The engine: scheduler, KV blocks, adapters, model, sampler, accounting."""

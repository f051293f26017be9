"""The model: one decoder for many families, its weights, its runner and its sampler."""

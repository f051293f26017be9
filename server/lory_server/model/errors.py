"""The one error of loading a base: every refusal, with the reason and the fix.

It must not know torch, HTTP or the engine.
"""


class ModelError(ValueError):
    """The base cannot be served as asked; the message names the field or tensor, and the fix."""

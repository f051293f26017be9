"""The training companion: a YAML file in, a plain PEFT adapter folder out.

It must not know the router or the engine; an adapter folder is all they share.
"""

"""What ranks do to a step: what they tell each other, and how their gradients become one sum.

`ranks_of(model)` chooses: `Alone`, `Replicated`, or `Sharded` for FSDP2 and HSDP.
"""

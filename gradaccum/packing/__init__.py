"""Run a padded micro-batch as one row without padding, and what rows begin with alike only once.

`plan.py` says which token goes where, `attention.py` who sees whom, `backbone.py` puts both around
the body of a transformers model. What surrounds the body (heads, losses, metrics) notices nothing:
it gives (B, T) tokens and finds (B, T, D) hidden states.
"""

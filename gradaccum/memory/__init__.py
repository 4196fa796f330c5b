"""How much memory a step takes, before it runs: traced, probed, planned."""

"""Adapters to the frameworks that people train with; each imports its framework itself."""

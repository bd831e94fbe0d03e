"""Layers whose routing is known before they run: see `ahead.model_chunk`."""

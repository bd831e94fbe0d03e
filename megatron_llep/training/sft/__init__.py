"""Supervised fine-tuning: JSONL -> conversations -> tokens and answers -> packs -> one step."""

"""How results are told: text tables, pictures, JSON files and self-contained HTML pages."""

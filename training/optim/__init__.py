"""AdamW, Muon and their parameter groups."""

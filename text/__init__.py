"""What dataset.py stands on: readers, cleaning, shards, tokenizer, chat template and the generated demo world."""

"""Learning from preferences (DPO and its relatives) and from rewards (GRPO): samples, references, losses."""

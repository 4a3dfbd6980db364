"""Generation from the latent cache: runners, sampling, drafts, many sequences at once."""

"""Tasks for lm-evaluation-harness: local exams, problems with answers, texts and the demo world's questions."""

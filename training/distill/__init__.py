"""Learning from a teacher: from its distributions, from its answers, or from its judgement of the student's own."""

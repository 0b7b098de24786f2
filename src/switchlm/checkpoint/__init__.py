"""Training state that a run resumes from, bit for bit, on any mesh."""

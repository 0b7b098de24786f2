"""The one training loop: objective, optimisers, schedules, precision, and what it reports."""

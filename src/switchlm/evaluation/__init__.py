"""Evaluate models: held-out loss, task metrics, expert assignment, diagnostics."""

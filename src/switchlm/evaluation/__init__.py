"""How good a model is: held-out loss, and who goes to which expert."""

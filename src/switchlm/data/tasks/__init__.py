"""Tasks as text to text: T5's and GLUE's by name, or a file of the user's."""

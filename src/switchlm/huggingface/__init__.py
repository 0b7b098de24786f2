"""Model folders in the Hugging Face format: read from anybody's, written for everybody."""

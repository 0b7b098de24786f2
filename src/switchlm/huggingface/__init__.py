"""Model folders in the Hugging Face format: read and write them."""

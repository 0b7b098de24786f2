"""What a run leaves on disk: training state to resume from, models in the Hugging Face format."""

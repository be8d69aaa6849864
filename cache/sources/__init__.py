"""Where adapters come from: a directory of the operator's, or the Hugging Face Hub."""

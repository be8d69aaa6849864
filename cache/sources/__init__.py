"""Where adapters come from: the operator's directory, the Hugging Face Hub, S3, web servers."""

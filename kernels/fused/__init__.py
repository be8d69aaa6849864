"""What a decoder layer does between its matrix products."""
